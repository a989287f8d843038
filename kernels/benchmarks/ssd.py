"""Time one Mamba-2 block on the CPU beside the selective block and transformers' Mamba-2.

    python kernels/benchmarks/ssd.py
    python kernels/benchmarks/ssd.py --widths 128 --length 16384 --repeats 1

Blocks are whole residual blocks with two norms (ours) or the bare mixer (transformers), batch 1. The cases of a width
are timed in turn, round after round, and the shortest of each counts, so that ratios hold on a machine that others use.
Exponentials are counted, not measured: those of the scan and of all SiLU, softplus and sigmoid, each as one. Products
are counted as 2 x multiply-adds of everything that is a matrix product, masked halves included.
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


def exponentials(mixer: nn.Module) -> float:
    """Of one position, forward."""
    if isinstance(mixer, SelectiveMixer):
        return mixer.inner_width * (mixer.state_size + 3)  # decays; softplus; SiLU of the convolution and of the gate
    assert isinstance(mixer, Mamba2Mixer)
    silu = 2 * mixer.inner_width + 2 * mixer.matrix_width
    return silu + mixer.heads * (1 + CHUNK_ROWS / 2 + 2)  # softplus; half a mask; to and from the state


def products(mixer: nn.Module) -> float:
    """Floating-point operations in matrix products, of one position, forward."""
    linear = sum(part.weight.numel() for part in mixer.modules() if isinstance(part, nn.Linear))
    if isinstance(mixer, SelectiveMixer):
        return 2 * linear
    assert isinstance(mixer, Mamba2Mixer)
    scores = mixer.groups * CHUNK_ROWS * mixer.state_size
    of_heads = mixer.inner_width * (CHUNK_ROWS + 2 * mixer.state_size)
    return 2 * (linear + scores + of_heads)


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
        for backward in (False, True):
            shortest: dict[str, float] = {}
            for _ in range(options.repeats + 1):
                for name, (module, dtype, length) in cases.items():
                    sequence = torch.randn(1, length or options.length, width, dtype=dtype, requires_grad=backward)
                    seconds = run(module, sequence, backward, clock) / sequence.shape[1]
                    shortest[name] = min(seconds, shortest.get(name, float("inf")))
            rows += [
                row(width, backward, name, seconds, shortest, cases[name][0]) for name, seconds in shortest.items()
            ]
    header = ["width", "pass", "block", "us/position", "times selective float32", "exponentials/position", "GFLOP/s"]
    print_table(header, rows)


def row(
    width: int, backward: bool, name: str, seconds: float, shortest: dict[str, float], module: nn.Module
) -> list[str]:
    mixer = module.blocks[0].mixer if isinstance(module, ResidualStack) else None
    counted = mixer is not None and not backward
    return [
        str(width),
        "forward+backward" if backward else "forward",
        name,
        f"{seconds * 1e6:.2f}",
        f"{shortest['selective float32'] / seconds:.2f}",
        f"{exponentials(mixer):.0f}" if counted and mixer is not None else "",
        f"{products(mixer) / seconds / 1e9:.0f}" if counted and mixer is not None else "",
    ]


if __name__ == "__main__":
    main()
