"""A stack without gradients: walked in pieces, as it decides by itself, beside one sweep over the whole sequence.

    python kernels/benchmarks/pieces.py --threads 2
    python kernels/benchmarks/pieces.py --threads 1 --shapes 1x16384 2048x32 --repeats 2

Prints processor seconds of both for every shape, batch x length, medians in turns, and their ratio, which should not be
below 1: pieces bound the memory and stay in the cache, and what makes few or short pieces goes in one sweep. Such
shapes compare a sweep with itself and show what the machine adds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mambacore.benchmarking import print_target
from mambacore.layers import ResidualStack

SHAPES = ("1x262144", "8x32768", "64x4096", "256x128", "256x1024", "8192x32")
# Two sweeps in turns differ by as much.
NOISE = 0.03


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """Processor seconds of a call."""
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BATCHxLENGTH")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    stack = ResidualStack(arguments.width, ["selective"] * arguments.layers).eval()
    print(f"{arguments.layers} selective layers of width {arguments.width}, float32, {arguments.threads} CPU threads")
    print("batch x length\tin pieces, s\tone sweep, s\tsweep by pieces")
    lowest = float("inf")
    for shape in arguments.shapes:
        batch, length = map(int, shape.split("x"))
        sequence = torch.randn(batch, length, arguments.width)
        pieces, sweeps = [], []
        with torch.inference_mode():
            stack(sequence[:, :64])  # the first call loads libraries
            for _ in range(arguments.repeats):
                sweeps.append(seconds(stack._walk, sequence, None, None))
                pieces.append(seconds(stack, sequence))
        ratio = statistics.median(sweep / piece for sweep, piece in zip(sweeps, pieces, strict=True))
        lowest = min(lowest, ratio)
        print(f"{shape}\t{statistics.median(pieces):.2f}\t{statistics.median(sweeps):.2f}\t{ratio:.2f}", flush=True)
    print_target("one sweep by pieces, lowest of all shapes (equal ones differ, too)", lowest, 1 - NOISE, at_least=True)


if __name__ == "__main__":
    main()
