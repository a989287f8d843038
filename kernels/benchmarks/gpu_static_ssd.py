"""Instructions of the dual scan's kernels on Hopper, counted without a device, beside those of mamba_ssm's Triton.

    python kernels/benchmarks/gpu_static_ssd.py
    python kernels/benchmarks/gpu_static_ssd.py --mamba-source mamba   # a checkout of state-spaces/mamba

Kernels are compiled for sm_90, bfloat16, heads of 64 channels, 128 states, 8 heads of a group in turn. A row gives for
one position of one head the instructions of all its warps, those of the special-function units among them, and the
multiply-adds on tensor cores; loops are weighted by how often they run, causal ones by their mean. mamba_ssm chooses
among configurations by timing: shown is 64 x 64 x 32 with 4 warps, of its chunks of 256 positions. No time follows.
"""

import argparse
import ast
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambacore.benchmarking import print_table
from mambacore.ssd import triton as ssd
from mambacore.triton.compilation import Compiled, compiled, disassembled, loops_of, resource_usage, without_predicate

CAPABILITY, WIDTH, STATES, HEADS, CHUNK, PEER_CHUNK = 90, 64, 128, 8, 64, 256
SHAPE = {"REVERSE": False, "RANK": 1, "CHUNK": CHUNK, "BLOCK_ROWS": CHUNK, "BLOCK_WIDTH": WIDTH, "BLOCK_STATES": STATES,
         "HAS_SKIP": True, "HAS_STATE": True, "BLOCK": ssd.PASS_BLOCK}  # fmt: skip
HEADER = ["kernel", "warps", "registers", "spilled bytes", "instructions", "MUFU", "tensor-core multiply-adds"]


class Piece(NamedTuple):
    """A kernel: its switches, warps, the (position, head) pairs of a program, and turns of its loop."""

    kernel: Any
    switches: dict[str, Any]
    warps: int
    pairs: float
    turns: float = 1


def own_pieces() -> dict[str, Piece]:
    """This project's kernels, in the order in which they run."""
    passed = Piece(ssd.pass_states, SHAPE | {"BACKWARD": False}, 1, CHUNK * ssd.PASS_BLOCK / (WIDTH * STATES))
    matrices = {
        f"backward, {name} matrix": Piece(
            ssd.read_back_matrix, SHAPE | {"INTO": into}, ssd.BACKWARD_WARPS, CHUNK * HEADS, HEADS
        )
        for name, into in (("input", True), ("output", False))
    }  # fmt: skip
    return {
        "forward, added states": Piece(ssd.add_states, SHAPE, 4, CHUNK),
        "forward, states passed on": passed,
        "forward, outputs": Piece(ssd.read_out, SHAPE, 4, CHUNK),
        "backward, read states": Piece(ssd.add_states, SHAPE, 4, CHUNK),
        "backward, states passed on": passed._replace(switches=SHAPE | {"BACKWARD": True}),
        "backward, inputs": Piece(ssd.read_back_inputs, SHAPE, ssd.BACKWARD_WARPS, CHUNK),
    } | matrices


# Causal loops run over the blocks up to a row's own, or from it on.
MEAN_TURNS = sum(range(1, PEER_CHUNK // 64 + 1)) * 64 / 32 / (PEER_CHUNK // 64)
PEERS = {
    "forward, outputs": ("ssd_chunk_scan.py", "_chunk_scan_fwd_kernel", 64, MEAN_TURNS),
    "backward, states": ("ssd_chunk_scan.py", "_chunk_scan_bwd_dstates_kernel", PEER_CHUNK / 2, PEER_CHUNK / 32),
    "backward, inputs": ("ssd_combined.py", "_chunk_scan_chunk_state_bwd_dx_kernel", 64, MEAN_TURNS),
    "backward, input matrix": ("ssd_chunk_state.py", "_chunk_state_bwd_db_kernel", 64 * HEADS / 2, HEADS),
    "backward, output matrix": ("ssd_chunk_scan.py", "_chunk_scan_bwd_dc_kernel", 64 * HEADS / 2, HEADS),
    "backward, scores": ("ssd_chunk_scan.py", "_chunk_scan_bwd_dcb_kernel", PEER_CHUNK * HEADS / 10, HEADS),
}
OF_INPUTS = re.compile(r"(cb|x|out|C|c|B|b|dout|dx|D|z|dz|outz|out_x)_ptr")
PEER_SWITCHES = {
    "BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "BLOCK_SIZE_DSTATE": STATES, "IS_CAUSAL": True,
    "HAS_D": True, "HAS_DDA_CS": True, "IS_TRITON_22": True, "DETERMINISTIC_REDUCTION": False,
}  # fmt: skip


def dynamic(code: Compiled, piece: Piece) -> tuple[float, float, float]:
    """Instructions, MUFU and multiply-adds for a position of a head."""
    text = disassembled(code.cubin)
    lines = [found.group(1) for found in re.finditer(r"/\*[0-9a-f]+\*/\s+(.*?);", text)]
    loops = loops_of(text)
    weights = [1.0] * len(lines)
    if loops and piece.turns > 1:
        for number in range(loops[0].first, loops[0].first + loops[0].size):
            weights[number] = piece.turns
    elif loops:  # over the chunks: what is before it is once for the sequence
        weights = [float(loops[0].first <= number < loops[0].first + loops[0].size) for number in range(len(lines))]
    instructions = special = products = 0.0
    for line, weight in zip(lines, weights, strict=True):
        name = without_predicate(line).split()[0]
        instructions += weight
        special += weight * name.startswith("MUFU")
        wide = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name)
        if wide:  # by four warps together
            sizes = [int(size) for size in wide.groups()]
            products += weight * sizes[0] * sizes[1] * sizes[2] / 4
        elif name.startswith("HMMA.16816"):
            products += weight * 16 * 8 * 16
    scale = piece.warps / piece.pairs
    return instructions * scale, special * scale, products * scale


def peer_kernel(source: Path, file: str, name: str, folder: Path) -> Any:
    """A kernel of mamba_ssm by itself, without its tuner and what else its module imports."""
    text = (source / "mamba_ssm" / "ops" / "triton" / file).read_text(encoding="utf-8")
    found = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    module = folder / f"{name}.py"
    body = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n" + ast.unparse(found) + "\n"
    module.write_text(body, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def compiled_peer(kernel: Any) -> Compiled:
    """Compile for tensors that begin at multiples of 16 bytes, whose last dimension is contiguous."""
    constants: dict[str, Any] = {}
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        inner = re.search(r"stride_.*_(hdim|dstate|csize|csize_k|csize_n|n)$", name)
        if parameter.is_constexpr:
            constants[name] = PEER_SWITCHES.get(name, False)
        elif name in ("z_ptr", "out_x_ptr", "seq_idx_ptr") or (inner and "states" not in name):
            constants[name] = None if name.endswith("_ptr") else 1
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*bf16" if OF_INPUTS.fullmatch(name) else "*fp32"
        else:
            signature[name] = "i32"
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(signature)
        if signature[name] != "constexpr" and "ratio" not in name and "nheads" not in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": 4})
    return Compiled(resource_usage(binary.asm["cubin"]), binary.asm["cubin"])


def row(name: str, piece: Piece, code: Compiled) -> list[str]:
    """A row of the table."""
    instructions, special, products = dynamic(code, piece)
    used = code.used
    return [
        name, str(piece.warps), str(used["REG"]), str(used["STACK"]), f"{instructions:.1f}", f"{special:.2f}",
        f"{products:,.0f}",
    ]  # fmt: skip


def peer_rows(source: Path) -> Iterator[list[str]]:
    """The rows of mamba_ssm's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, function, pairs, turns) in PEERS.items():
            try:
                code = compiled_peer(peer_kernel(source, file, function, Path(folder)))
            except Exception as error:  # another version of it, or of Triton
                print(f"{function} does not compile: {error}", file=sys.stderr)
                continue
            yield row(f"mamba_ssm {name}", Piece(None, {}, 4, pairs, turns), code)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mamba-source", type=Path, help="checkout of mamba_ssm, for its rows")
    arguments = parser.parse_args()
    rows = [
        row(name, piece, compiled(piece.kernel, piece.switches, CAPABILITY, "bf16", piece.warps))
        for name, piece in own_pieces().items()
    ]
    if arguments.mamba_source is not None:
        rows += peer_rows(arguments.mamba_source)
    print(f"sm_{CAPABILITY}, bf16, Triton {triton.__version__}: per position and head\n")
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
