"""Helpers shared by the benchmarks: timing, description of the machine, and tables."""

import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def best_seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the shortest of several runs after one warm-up run, the least disturbed by other load."""
    function()
    shortest = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        shortest = min(shortest, time.perf_counter() - begin)
    return shortest


def memory_bytes(name: str) -> int:
    """Return the current (`VmRSS`) or peak (`VmHWM`) resident set size.

    Unlike the peak in `getrusage`, it does not include that of the parent process on Linux.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> str:
    """Return processor, threads, instruction set and versions, which qualify any figure."""
    import mambacore  # noqa: PLC0415  importing it asks for huge pages, which a peer is not given

    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in information.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return (
        f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"native backend {mambacore.backends()['native']}"
    )


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    print(line(header))
    print("| " + " | ".join("-" * width for width in widths) + " |")
    for row in rows:
        print(line(row), flush=True)


def print_target(what: str, found: float, limit: float, *, at_least: bool, shown: str = ".2f") -> None:
    """Print a line that begins with `target:`: what was measured, what is wanted of it, and whether that was reached.

    Args:
        what: what the figure is, with its unit.
        found: the figure.
        limit: the least it should be, or the most.
        at_least: which of the two.
        shown: format of both.
    """
    reached = found >= limit if at_least else found <= limit
    wanted = f"at {'least' if at_least else 'most'} {limit:{shown}}"
    print(f"target: {what}: {found:{shown}}, wanted {wanted}: {'reached' if reached else 'missed'}", flush=True)
