"""Time the selective scan: nanoseconds per state element (batch x length x channels x state), float32.

python kernels/benchmarks/scan.py
python kernels/benchmarks/scan.py --lengths 131072 --channels 512 --threads 1
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mambacore import selective_scan
from mambacore.benchmarking import best_seconds, machine, print_table, print_target
from mambacore.layers.state_matrices import initial_state_matrix


def arguments_of(length: int, channels: int, state_size: int, complex_state: bool) -> list[Tensor]:
    """What a Mamba block gives its scan: all optional parts present."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    start = "s4d-lin" if complex_state else "s4d-real"
    state_matrix = initial_state_matrix(start, channels, state_size, complex_state).contiguous()
    sequences = normal(1, length, channels), normal(1, length, channels) - 4
    dtype = state_matrix.dtype
    matrices = (torch.randn(1, length, state_size, generator=generator, dtype=dtype) for _ in range(2))
    return [
        *sequences,
        state_matrix,
        *matrices,
        torch.ones(channels),
        normal(1, length, channels),
        torch.zeros(channels),
    ]


def time_case(
    length: int,
    channels: int,
    state_size: int,
    complex_state: bool,
    repeats: int,
    seconds_of: Callable[[Callable[[], object], int], float] = best_seconds,
) -> tuple[float, float]:
    """Seconds of the forward pass alone, and of forward and backward with all gradients."""
    arguments = arguments_of(length, channels, state_size, complex_state)
    with torch.no_grad():
        forward = seconds_of(lambda: selective_scan(*arguments, step_softplus=True), repeats)
    leaves = [tensor.requires_grad_() for tensor in arguments]
    grad_outputs = torch.ones_like(leaves[0])

    def forward_and_backward() -> None:
        torch.autograd.grad(selective_scan(*leaves, step_softplus=True), leaves, grad_outputs)

    return forward, seconds_of(forward_and_backward, repeats)


# Channels at 16 states, and states at 256 channels, that are set side by side.
WIDTHS, STATE_SIZES = (64, 512, 1024), (16, 64)
ELEMENTS_OF_SHAPE = 1 << 22  # length x channels


def processor_seconds(function: Callable[[], object], repeats: int) -> float:
    """The least processor time of several runs: what others do on the machine disturbs it less than the time of day."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return min(times)


def shape_rows(repeats: int) -> list[list[str]]:
    """Nanoseconds of one thread per element by width and by state size, and their ratios to the first of their kind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for sizes in ([(width, 16) for width in WIDTHS], [(256, size) for size in STATE_SIZES]):
        first: tuple[float, float] | None = None
        for channels, state_size in sizes:
            length = ELEMENTS_OF_SHAPE // channels
            scale = 1e9 / (length * channels * state_size)
            forward, both = time_case(length, channels, state_size, False, repeats, processor_seconds)
            found = forward * scale, (both - forward) * scale
            first = first or found
            cells = [f"{value:.3f}" for value in found]
            ratios = [f"{value / reference:.2f}" for value, reference in zip(found, first, strict=True)]
            rows.append([str(channels), str(state_size), cells[0], ratios[0], cells[1], ratios[1]])
    torch.set_num_threads(threads)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**17, 2**20])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--state-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"Selective scan, float32, batch 1, {options.channels} channels, {options.state_size} states\n{machine()}\n")
    rows = []
    for length in options.lengths:
        elements = length * options.channels * options.state_size
        sizes = (length, options.channels, options.state_size)
        real = time_case(*sizes, False, options.repeats)
        rows.append([str(length), "real", *(f"{seconds / elements * 1e9:.3f}" for seconds in real), "", ""])
        turning = time_case(*sizes, True, options.repeats)
        ratios = (f"{slower / faster:.2f}" for slower, faster in zip(turning, real, strict=True))
        rows.append([str(length), "complex", *(f"{seconds / elements * 1e9:.3f}" for seconds in turning), *ratios])
    header = ["length", "state", "forward ns/element", "forward+backward ns/element", "forward / real", "both / real"]
    print_table(header, rows)
    print("\nOne thread, processor time, by width and by state size; the ratios are to the first row of each kind\n")
    header = ["channels", "states", "forward ns/element", "by the first", "backward ns/element", "by the first"]
    rows = shape_rows(options.repeats)
    print_table(header, rows)
    found = {(int(row[0]), int(row[1])): row for row in rows}
    forward, backward = float(found[1024, 16][2]), float(found[256, 64][4])
    print_target("scan forward at 1,024 channels, ns per element", forward, 0.3, at_least=False, shown=".3f")
    print_target("scan backward at 64 states, ns per element", backward, 1.0, at_least=False, shown=".3f")


if __name__ == "__main__":
    main()
