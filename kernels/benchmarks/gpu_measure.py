"""What the GPU benchmarks share: the device, timing with events, ceilings, and rows that are written as they come."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def options_of(description: str | None, budget_seconds: float) -> argparse.Namespace:
    """The command line; ends with status 2 and one sentence where there is no device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench-gpu"), help="folder of the tables and plots")
    parser.add_argument(
        "--budget-seconds", type=float, default=budget_seconds, help="no case is begun after so many seconds"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device here: run this where torch.cuda.is_available() is true", file=sys.stderr)
        raise SystemExit(2)
    options.output.mkdir(parents=True, exist_ok=True)
    options.until = time.monotonic() + options.budget_seconds
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    return options


class Table:
    """A TSV file that grows row by row, shown as it does."""

    def __init__(self, path: Path, header: list[str]) -> None:
        self.path, self.rows = path, [header]
        path.write_text("\t".join(header) + "\n", encoding="utf-8")
        print("\t".join(header), flush=True)

    def add(self, *cells: object) -> None:
        row = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\t".join(row) + "\n")
        print("\t".join(row), flush=True)


def milliseconds(function: Callable[[], object], repeats: int = 5) -> float:
    """The median of several runs between two events, after two runs to warm up (and compile)."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def peak_bytes(function: Callable[[], object]) -> int:
    """The most device memory above that before the call."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bytes_per_second() -> float:
    """What the memory gives: a copy of 1 GiB, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def exponentials_per_second() -> float:
    """What the special-function units give: chains of exponentials in registers."""
    import triton  # noqa: PLC0415  only where there is a device
    from gpu_ceiling import EXPONENTIALS, LANES, exponentials  # noqa: PLC0415

    programs = 132 * 64
    values = torch.zeros(programs * LANES, device="cuda")
    assert triton.__version__
    time_ms = milliseconds(lambda: exponentials[(programs,)](values, num_warps=4))
    return programs * LANES * EXPONENTIALS / (time_ms * 1e-3)


def plot(path: Path, title: str, label_x: str, label_y: str, lines: dict[str, dict[float, float]]) -> None:
    """One line per name, both axes logarithmic."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel(label_x)
    axes.set_ylabel(label_y)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
