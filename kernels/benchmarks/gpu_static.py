"""Instructions of the scan's kernels on Hopper, counted without a device, beside those of mamba_ssm.

    python kernels/benchmarks/gpu_static.py
    python kernels/benchmarks/gpu_static.py --mamba-source mamba   # a checkout of state-spaces/mamba; needs nvcc

Kernels are compiled for sm_90 and their loops disassembled. A state element is one state of one channel at one
position; a row gives what a thread executes for each, loops inside loops weighted by how often they run, and a branch
that is seldom taken (noting a boundary state) counted as if it always were. MUFU are the instructions of the
special-function units, which take four times as long. No time follows from these counts: nothing here waits for memory.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from mambacore.benchmarking import print_table
from mambacore.layout import DEVICE_INTERVAL
from mambacore.scan import triton as scan
from mambacore.scan import triton_backward, triton_forward
from mambacore.triton.compilation import Compiled, Loop, compiled, disassembled, loops_of, resource_usage

CAPABILITY = 90
LANES = 32
# The sizes that the plans are made for: one sequence of 2^20 positions, 1,024 channels, on a device that it fills.
BATCH, LENGTH, CHANNELS, PROCESSORS = 1, 1 << 20, 1024, 132
SCAN = {"SOFTPLUS": True, "REVERSE": False, "HAS_GATE": True, "HAS_BIAS": True, "HAS_RESETS": False, "HAS_SKIP": True,
        "INTO_FIXED": False, "OUT_OF_FIXED": False, "INTERVAL": DEVICE_INTERVAL}  # fmt: skip
WALK = SCAN | {"SUMMARY": False, "HAS_STATE": True, "KEEP_BOUNDARIES": True}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "forward": (triton_forward.walk, WALK),
    "forward, summary": (triton_forward.walk, WALK | {"SUMMARY": True, "HAS_STATE": False, "KEEP_BOUNDARIES": False}),
    "backward": (triton_backward.retreat, SCAN | {"HAS_CARRY": True}),
    "backward, summary": (triton_backward.summary, SCAN),
}
HEADER = ["kernel", "states", "channels", "warps", "registers", "spilled bytes", "instructions", "MUFU"]
# Of mamba_ssm: a thread takes so many positions of one channel, and walks over the states in the innermost loop.
PEER_ITEMS, PEER_STATES = 16, 16
PEER_KERNELS = {
    "mamba_ssm forward": (
        "selective_scan_fwd_kernel.cuh",
        "selective_scan_fwd_kernel<Selective_Scan_fwd_kernel_traits<128, 16, 1, true, true, true, true, "
        "at::BFloat16, float>>(SSMParamsBase)",
    ),
    "mamba_ssm backward": (
        "selective_scan_bwd_kernel.cuh",
        "selective_scan_bwd_kernel<Selective_Scan_bwd_kernel_traits<128, 16, true, true, true, true, true, "
        "at::BFloat16, float>>(SSMParamsBwd)",
    ),
}


class Counts(NamedTuple):
    """What a thread executes for one state element."""

    instructions: float
    special: float


def positions_of(loop: Loop, elements: float) -> int:
    """Positions in one turn of a loop over positions, which the compiler may have unrolled.

    Every element of a position takes one exponential, and its channel a few more.
    """
    exponentials = sum("MUFU.EX2" in text for text in loop.instructions)
    return max(1, int(exponentials // elements))


def counted(code: Compiled, elements: float) -> Counts:
    """Counts of a kernel whose outermost loop is over positions, or over intervals of them.

    Args:
        code: the kernel.
        elements: of one position that a thread holds; a complex one takes as many exponentials.
    """
    loops = code.loops()
    outer = loops[0]
    last = outer.first + outer.size
    inner = [loop for loop in loops[1:] if outer.first <= loop.first and loop.first + loop.size <= last]
    if not inner:
        positions = positions_of(outer, elements)
        return Counts(outer.size / positions / elements, outer.special / positions / elements)
    # The walk through an interval and the walk back; what is left of the outer loop is once for the interval.
    instructions = (outer.size - sum(loop.size for loop in inner)) / DEVICE_INTERVAL
    special = (outer.special - sum(loop.special for loop in inner)) / DEVICE_INTERVAL
    for loop in inner:
        positions = positions_of(loop, elements)
        instructions += loop.size / positions
        special += loop.special / positions
    return Counts(instructions / elements, special / elements)


def own_rows(states: int, is_complex: bool, dtype: str) -> Iterator[list[str]]:
    """The rows of this project's kernels for a number of states."""
    numbers = states * (2 if is_complex else 1)
    for name, (kernel, switches) in KERNELS.items():
        backward = name.startswith("backward")
        plan = scan.plan_of(BATCH, LENGTH, CHANNELS, 1, numbers, backward, PROCESSORS, is_complex)
        sizes = {"IS_COMPLEX": is_complex, "BLOCK_STATES": states, "BLOCK_CHANNELS": plan.block_channels}
        code = compiled(kernel, switches | sizes, CAPABILITY, dtype, plan.warps)
        elements = plan.block_channels * states / LANES / plan.warps
        shown = f"{states} complex" if is_complex else str(states)
        yield row(name, shown, str(plan.block_channels), str(plan.warps), code.used, counted(code, elements))


def peer_rows(source: Path, nvcc: str) -> Iterator[list[str]]:
    """The rows of mamba_ssm's kernels, compiled from its sources."""
    folder = source / "csrc" / "selective_scan"
    torch_include = Path(torch.__file__).parent / "include"
    for name, (header, instance) in PEER_KERNELS.items():
        with tempfile.TemporaryDirectory() as place:
            unit = Path(place, "kernel.cu")
            unit.write_text(f'#include "{header}"\ntemplate __global__ void {instance};\n')
            command = [
                nvcc, "-cubin", f"-arch=sm_{CAPABILITY}", "-std=c++17", "-O3", "--use_fast_math",
                "--expt-relaxed-constexpr", "--expt-extended-lambda", "-w", f"-I{folder}", f"-I{torch_include}",
                f"-I{torch_include / 'torch' / 'csrc' / 'api' / 'include'}", str(unit), "-o", str(Path(place, "out")),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name} does not compile: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            cubin = Path(place, "out").read_bytes()
        loops = loops_of(disassembled(cubin))
        outer = loops[0]
        inside = [loop for loop in loops[1:] if outer.first <= loop.first < outer.first + outer.size]
        of_states = inside[0]  # the longest loop inside the one over stretches of the sequence
        instructions = of_states.size / PEER_ITEMS + (outer.size - of_states.size) / PEER_ITEMS / PEER_STATES
        special = of_states.special / PEER_ITEMS + (outer.special - of_states.special) / PEER_ITEMS / PEER_STATES
        yield row(name, str(PEER_STATES), "1", "4", resource_usage(cubin), Counts(instructions, special))


def row(name: str, states: str, channels: str, warps: str, used: dict[str, int], found: Counts) -> list[str]:
    """A row of the table."""
    return [
        name, states, channels, warps, str(used["REG"]), str(used["STACK"]), f"{found.instructions:.1f}",
        f"{found.special:.2f}",
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mamba-source", type=Path, help="checkout of mamba_ssm, for its rows")
    parser.add_argument("--states", type=int, nargs="+", default=[8, 16, 32], help="states per channel")
    parser.add_argument("--complex-states", type=int, nargs="*", default=[16], help="complex states per channel")
    parser.add_argument("--dtype", default="bf16", help="fp32, bf16 or fp16")
    arguments = parser.parse_args()
    rows = [found for states in arguments.states for found in own_rows(states, False, arguments.dtype)]
    rows += [found for states in arguments.complex_states for found in own_rows(states, True, arguments.dtype)]
    nvcc = shutil.which("nvcc")
    if arguments.mamba_source is not None and nvcc is not None:
        rows += peer_rows(arguments.mamba_source, nvcc)
    print(f"sm_{CAPABILITY}, {arguments.dtype}, Triton {triton.__version__}: per state element and thread\n")
    print_table(HEADER, rows)


if __name__ == "__main__":
    main()
