"""A simulated table of training on 1 to 1,024 GPUs: tokens/s and memory from a measured step and counted bytes.

python kernels/benchmarks/scale.py
python kernels/benchmarks/scale.py --tokens-per-second 250000 --bandwidth 50 --latency 20

Nothing here has been run on so many GPUs. Assumptions:

- The time of a token is that of one device, measured here with `--measured-length` tokens unless
  `--tokens-per-second` gives another device's; work grows in proportion to the length, as a recurrence's does.
- Up to `--context-ranks` GPUs share a sequence, the others hold other sequences, one per step; below that number one
  GPU does several stretches' work.
- Context ranks run the scan twice (`mambacore.parallel`), counted as `--second-scan` more time (an estimate), and pass
  one state per layer and direction; they start at the same time, exchange once per layer, and wait `--latency` for it.
- Gradients (fp32) go around a ring of all GPUs, 2 (n - 1) / n of their bytes at `--bandwidth`, after all compute.
- Memory with ddp: weights, gradients and AdamW's two moments in fp32, and activations in proportion to a GPU's stretch,
  of which only that of one layer and one input of each other layer is kept (checkpointing). With fsdp the first four
  are divided by the number of GPUs, and one layer is whole.
"""

import argparse
import time

import torch

from mambacore.benchmarking import machine, print_table
from mambacore.layers import ResidualStack

BYTES = 4
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SEQUENCE_LENGTHS = (2**20, 2**24)
# An estimate, not measured.
# Copies of the sequence, in units of length x inner width, that one selective layer keeps for its backward pass:
# input, gate, convolved input, step size, output, and the gradients of two of them.
KEPT_PER_LAYER = 7
EXPANSION = 2


def measured_tokens_per_second(stack: ResidualStack, width: int, length: int) -> float:
    """Forward and backward of one sequence, the best of two after one to warm up."""
    sequence = torch.randn(1, length, width)
    shortest = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        stack(sequence)[0].square().mean().backward()
        shortest = min(shortest, time.perf_counter() - begin)
        for parameter in stack.parameters():
            parameter.grad = None
    return length / shortest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--measured-length", type=int, default=2048)
    parser.add_argument("--tokens-per-second", type=float, help="of one device; measured here if not given")
    parser.add_argument("--context-ranks", type=int, default=8)
    parser.add_argument(
        "--second-scan", type=float, default=0.3, help="part of a step that the second scan adds; an estimate"
    )
    parser.add_argument("--bandwidth", type=float, default=25.0, help="gigabytes per second and GPU")
    parser.add_argument("--latency", type=float, default=30.0, help="microseconds of an exchange")
    arguments = parser.parse_args()
    stack = ResidualStack(arguments.width, ["selective"] * arguments.layers)
    parameters = sum(parameter.numel() for parameter in stack.parameters())
    speed = arguments.tokens_per_second
    source = "given"
    if speed is None:
        speed = measured_tokens_per_second(stack, arguments.width, arguments.measured_length)
        source = f"measured on {machine()}"
    print(f"{arguments.layers} layers of {arguments.width}, {parameters:,} parameters; ", end="")
    print(f"one device: {speed:,.0f} tokens/s, {source}; simulated, see --help for the assumptions\n")
    rows = [row for length in SEQUENCE_LENGTHS for row in table(arguments, parameters, speed, length)]
    print_table(["tokens", "GPUs", "data x context", "tokens/s", "efficiency", "ddp GiB/GPU", "fsdp GiB/GPU"], rows)


def table(arguments: argparse.Namespace, parameters: int, speed: float, length: int) -> list[list[str]]:
    """Rows for sequences of one length."""
    rows = []
    for gpus in GPUS:
        context = min(gpus, arguments.context_ranks)
        stretch = length / context
        seconds = stretch / speed * (1.0 + (arguments.second_scan if context > 1 else 0.0))
        if context > 1:
            # Convolution and scan exchange, forward and backward.
            seconds += 4 * arguments.layers * arguments.latency * 1e-6
        seconds += 2 * (gpus - 1) / gpus * BYTES * parameters / (arguments.bandwidth * 1e9)
        throughput = gpus // context * length / seconds
        model_bytes = 4 * BYTES * parameters
        layer = KEPT_PER_LAYER * stretch * EXPANSION * arguments.width * BYTES
        activations = layer + arguments.layers * stretch * arguments.width * BYTES
        whole_layer = 2 * BYTES * parameters / arguments.layers
        ddp = (model_bytes + activations) / 2**30
        fsdp = (model_bytes / gpus + whole_layer + activations) / 2**30
        cells = [f"{length:,}", f"{gpus:,}", f"{gpus // context} x {context}", f"{throughput:,.0f}"]
        rows.append([*cells, f"{throughput / (gpus * speed):.0%}", f"{ddp:.2f}", f"{fsdp:.2f}"])
    return rows


if __name__ == "__main__":
    main()
