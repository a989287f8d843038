"""Time one Mamba-2 block on the CPU beside the selective block and transformers' Mamba-2.

    python kernels/benchmarks/ssd.py
    python kernels/benchmarks/ssd.py --widths 128 --length 16384 --repeats 1

Blocks are whole residual blocks with two norms (ours) or the bare mixer (transformers), batch 1. The cases of a width
are timed in turn, round after round, and the shortest of each counts, so that ratios hold on a machine that others use.
Exponentials are counted, not measured: those of the scan and of all SiLU, softplus and sigmoid, each as one. Products
are counted as 2 x multiply-adds of everything that is a matrix product; of a mask only the half that is multiplied.

The last columns are the roofline: how long the products alone take at the speed of one product of 1,024 x 1,024
matrices of the same type, how long what every operator reads and writes takes at the speed of a copy, and the ratio to
selective float32 of a block that did nothing but the products.
"""

import argparse
import logging
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambacore.benchmarking import machine, print_table
from mambacore.layers import Mamba2Mixer, ResidualStack, SelectiveMixer
from mambacore.ssd.chunked import CHUNK_ROWS

SELECTIVE_STATES = 16
LANES = 16  # float32 numbers of a vector of AVX-512
ROOFLINE_SIZE = 1024
COPIED_BYTES = 1 << 26
PIECE_POSITIONS = 2048


def block(mixer: str, width: int, dtype: torch.dtype, states: int) -> nn.Module:
    return ResidualStack(width, [{"name": mixer, "state_size": states}]).to(dtype)


def peer(width: int, states: int) -> nn.Module:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.disable(logging.WARNING)
    from transformers import Mamba2Config  # noqa: PLC0415  an oracle of tests and benchmarks
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Peer  # noqa: PLC0415

    config = Mamba2Config(hidden_size=width, num_heads=2 * width // 64, head_dim=64, state_size=states, n_groups=1)
    return Peer(config, layer_idx=0)


def run(module: nn.Module, sequence: Tensor, backward: bool, clock: Callable[[], float]) -> float:
    """Seconds of one pass."""
    begin = clock()
    with torch.set_grad_enabled(backward):
        outputs = module(sequence)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        if backward:
            outputs.sum().backward()
    return clock() - begin


def exponentials(mixer: nn.Module, dtype: torch.dtype) -> float:
    """Of one position, forward."""
    if isinstance(mixer, SelectiveMixer):
        return mixer.inner_width * (mixer.state_size + 3)  # decays; softplus; SiLU of the convolution and of the gate
    assert isinstance(mixer, Mamba2Mixer)
    silu = 2 * mixer.inner_width + 2 * mixer.matrix_width
    # In bfloat16 only blocks of 16 on the diagonal take one for each pair (native/ssd_pairs.h).
    blocks = CHUNK_ROWS // LANES
    in_pairs = LANES + 1 + (blocks - 1) / 2
    mask = in_pairs if dtype == torch.bfloat16 else CHUNK_ROWS / 2
    return silu + mixer.heads * (1 + mask + 2)  # softplus; the mask; to and from the state


def products(mixer: nn.Module, backward: bool) -> float:
    """Floating-point operations in matrix products, of one position, forward or forward and backward."""
    linear = sum(part.weight.numel() for part in mixer.modules() if isinstance(part, nn.Linear))
    if isinstance(mixer, SelectiveMixer):
        return 2 * linear * (3 if backward else 1)
    assert isinstance(mixer, Mamba2Mixer)
    half, states = CHUNK_ROWS / 2, mixer.state_size
    scores = mixer.groups * half * states
    of_heads = mixer.inner_width * (half + 2 * states)
    if not backward:
        return 2 * (linear + scores + of_heads)
    # Backward computes the scores again and has two products more for each product of the scan (chunked.backward).
    scan = 2 * scores + of_heads + 2 * scores + mixer.inner_width * (2 * half + 4 * states)
    return 2 * (3 * linear + scan)


def moved_bytes(mixer: nn.Module, dtype: torch.dtype) -> float:
    """Of one position, forward: what norms, projections, convolution, scan, gate and residual read and write."""
    width, inner = mixer.model_width, mixer.inner_width  # type: ignore[union-attr]
    if isinstance(mixer, SelectiveMixer):
        mixed, projected = inner, 2 * inner
        selected = mixer.step_rank + 2 * mixer.matrix_width + inner  # the selection and the steps
    else:
        assert isinstance(mixer, Mamba2Mixer)
        mixed = inner + 2 * mixer.matrix_width
        projected, selected = inner + mixed + mixer.heads, 0
    # Norm, projection, convolution, scan, gate with norm, projection and sum: each reads one thing and writes another.
    numbers = 2 * width + (width + projected) + 2 * mixed + (mixed + inner) + 3 * inner + (inner + width) + 3 * width
    return (numbers + 2 * selected) * dtype.itemsize


def speeds(dtype: torch.dtype, clock: Callable[[], float]) -> tuple[float, float]:
    """Operations per second of a product of square matrices, and bytes per second read and written by a copy."""
    one, other = (torch.randn(ROOFLINE_SIZE, ROOFLINE_SIZE, dtype=dtype) for _ in range(2))
    source, target = (torch.zeros(COPIED_BYTES // 8, dtype=torch.float64) for _ in range(2))
    shortest = [float("inf")] * 2
    for _ in range(7):
        for number, work in enumerate((lambda: one @ other, lambda: target.copy_(source))):
            begin = clock()
            work()
            shortest[number] = min(shortest[number], clock() - begin)
    return 2 * ROOFLINE_SIZE**3 / shortest[0], 2 * COPIED_BYTES / shortest[1]


class InPieces(nn.Module):
    """A stack that takes a sequence piece by piece, so that what its operators hand on stays in the cache."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, sequence: Tensor) -> Tensor:
        outputs, state = torch.empty_like(sequence), None
        for begin in range(0, sequence.shape[1], PIECE_POSITIONS):
            piece = slice(begin, begin + PIECE_POSITIONS)
            outputs[:, piece], state = self.stack(sequence[:, piece], state)
        return outputs


class ByOperators(nn.Module):
    """A stack called operator by operator, as with gradients: without them a selective block is one native call."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, sequence: Tensor) -> Tensor:
        with torch.enable_grad():
            outputs, _ = self.stack(sequence)
        return outputs.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--states", type=int, default=64, help="of Mamba-2; the selective block has 16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="of all threads, where others use the machine")
    parser.add_argument("--peer-length", type=int, default=8192, help="for transformers, whose memory grows faster")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"One block, batch 1, length {options.length} (transformers: {options.peer_length})\n{machine()}\n")
    clock = time.process_time if options.processor_time else time.perf_counter
    roofs = {dtype: speeds(dtype, clock) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, (operations, copied) in roofs.items():
        print(f"{dtype}: products {operations / 1e9:.0f} GFLOP/s, a copy reads and writes {copied / 1e9:.1f} GB/s\n")
    rows = []
    for width in options.widths:
        torch.manual_seed(0)
        cases: dict[str, tuple[nn.Module, torch.dtype, int]] = {
            "selective float32": (block("selective", width, torch.float32, SELECTIVE_STATES), torch.float32, 0),
            "selective bfloat16": (block("selective", width, torch.bfloat16, SELECTIVE_STATES), torch.bfloat16, 0),
            "mamba2 float32": (block("mamba2", width, torch.float32, options.states), torch.float32, 0),
            "mamba2 bfloat16": (block("mamba2", width, torch.bfloat16, options.states), torch.bfloat16, 0),
            "transformers mamba2": (peer(width, options.states), torch.float32, options.peer_length),
        }
        cases["selective float32, by operators"] = (ByOperators(cases["selective float32"][0]), torch.float32, 0)
        cases["mamba2 bfloat16, in pieces"] = (InPieces(cases["mamba2 bfloat16"][0]), torch.bfloat16, 0)
        for backward in (False, True):
            shortest: dict[str, float] = {}
            for _ in range(options.repeats + 1):
                for name, (module, dtype, length) in cases.items():
                    if backward and isinstance(module, InPieces | ByOperators):
                        continue
                    sequence = torch.randn(1, length or options.length, width, dtype=dtype, requires_grad=backward)
                    seconds = run(module, sequence, backward, clock) / sequence.shape[1]
                    shortest[name] = min(seconds, shortest.get(name, float("inf")))
            rows += [
                row(width, backward, name, seconds, shortest, *cases[name][:2], roofs)
                for name, seconds in shortest.items()
            ]
    header = [
        "width", "pass", "block", "us/position", "times selective float32", "exponentials/position", "GFLOP/s",
        "kFLOP/position", "products alone, us", "bytes/position", "bytes alone, us", "most times selective",
    ]  # fmt: skip
    print_table(header, rows)
    for width in options.widths:
        for which in ("forward", "forward+backward"):
            found = {line[2]: float(line[3]) for line in rows if line[:2] == [str(width), which]}
            ours = found["mamba2 bfloat16"]
            said = f"Width {width}, {which}: {found['transformers mamba2'] / ours:.1f} times transformers' Mamba-2"
            if "selective float32, by operators" in found:
                said += f", {found['selective float32, by operators'] / ours:.2f} times selective float32 by operators"
            print(said)


def row(
    width: int,
    backward: bool,
    name: str,
    seconds: float,
    shortest: dict[str, float],
    module: nn.Module,
    dtype: torch.dtype,
    roofs: dict[torch.dtype, tuple[float, float]],
) -> list[str]:
    cells = [
        str(width),
        "forward+backward" if backward else "forward",
        name,
        f"{seconds * 1e6:.2f}",
        f"{shortest['selective float32'] / seconds:.2f}",
    ]
    mixer = module.blocks[0].mixer if isinstance(module, ResidualStack) else None
    if mixer is None:
        return [*cells, *[""] * 7]
    operations, alone = products(mixer, backward), products(mixer, backward) / roofs[dtype][0]
    cells += ["" if backward else f"{exponentials(mixer, dtype):.0f}", f"{operations / seconds / 1e9:.0f}"]
    cells += [f"{operations / 1e3:.0f}", f"{alone * 1e6:.2f}"]
    moved = moved_bytes(mixer, dtype)
    cells += ["", ""] if backward else [f"{moved:.0f}", f"{moved / roofs[dtype][1] * 1e6:.2f}"]
    return [*cells, f"{shortest['selective float32'] / alone:.2f}"]


if __name__ == "__main__":
    main()
