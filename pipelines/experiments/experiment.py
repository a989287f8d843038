"""What every experiment shares: finished parts, so that a stopped run continues, and a table, a plot, a summary."""

import io
import json
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mambacore.benchmarking import machine
from mambapipelines.files import write_whole

DOTS_PER_INCH = 120
Rows = Sequence[Sequence[object]]


class Experiment:
    """The output folder of an experiment: one JSON file per finished part, a table, a plot and a summary.

    Args:
        name: of the experiment, and of its files.
        folder: where everything goes; it is made.
        settings: what the parts depend on. Parts of an earlier run with other settings are refused.

    Raises:
        SystemExit: the folder holds parts of a run with other settings.
    """

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.folder = folder
        self.settings = dict(settings)
        self.seconds: dict[str, float] = {}
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        described = folder / "settings.json"
        text = json.dumps(self.settings, indent=1, sort_keys=True) + "\n"
        if described.exists() and described.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{folder} holds a run with other settings: see {described}, or choose another --output.")
        write_whole(described, text)

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of one part: read where it is finished, else computed and kept with the seconds it took.

        `seconds` are those on the clock, `processor_seconds` those of the processor: on a shared machine only these say
        what the work costs.
        """
        path = self.folder / "parts" / f"{name}.json"
        if path.exists():
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        else:
            begin, processor = time.perf_counter(), processor_seconds()
            result = work()
            result["seconds"] = time.perf_counter() - begin
            result["processor_seconds"] = processor_seconds() - processor
            result["date"] = date.today().isoformat()
            write_whole(path, json.dumps(result, indent=1) + "\n")
        self.seconds[name] = result["processor_seconds"]
        return result

    def finished(self, pattern: str) -> list[dict[str, Any]]:
        """Results of the finished parts whose names match a shell pattern, in the order of their names."""
        results = []
        for path in sorted((self.folder / "parts").glob(f"{pattern}.json")):
            results.append(json.loads(path.read_text(encoding="utf-8")))
            self.seconds[path.stem] = results[-1]["processor_seconds"]
        return results

    def write(self, header: Sequence[str], rows: Rows, picture: Figure | None, notes: Sequence[str] = ()) -> None:
        """Write the table as TSV and Markdown under what a reader must know of it, and the plot; print the table.

        Args:
            header: names of the columns.
            rows: of the table.
            picture: the plot, if there is one.
            notes: sentences for the summary.
        """
        facts = [
            f"Command: `{command_line()}`",
            f"Settings: {', '.join(f'{key} {value}' for key, value in self.settings.items())}.",
            f"{date.today().isoformat()}; {machine()}. Processor time {sum(self.seconds.values()):,.0f} s: "
            + ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in self.seconds.items())
            + ".",
        ]
        table = [list(map(str, row)) for row in rows]
        lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
        lines += ["| " + " | ".join(row) + " |" for row in table]
        tsv = [*(f"# {fact}" for fact in facts), "\t".join(header), *("\t".join(row) for row in table)]
        write_whole(self.folder / f"{self.name}.tsv", "\n".join(tsv) + "\n")
        summary = "\n".join([*lines, "", *notes, *facts]) + "\n"
        write_whole(self.folder / f"{self.name}.md", summary)
        if picture is not None:
            content = io.BytesIO()
            picture.savefig(content, format="png", dpi=DOTS_PER_INCH)
            write_whole(self.folder / f"{self.name}.png", content.getvalue())
        print(summary, end="")


def command_line() -> str:
    """The command that is running, as it is typed in the root of the checkout."""
    return shlex.join(["python", f"pipelines/experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(one).ru_utime + resource.getrusage(one).ru_stime for one in users)


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / trials + spread / (4 * trials)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def line_plot(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    across: str,
    upward: str,
    logarithmic: bool = False,
) -> Figure:
    """Curves over a logarithmic axis of lengths.

    Args:
        curves: name to positions and values.
        across, upward: what the axes show.
        logarithmic: whether the values have a logarithmic axis, too.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (positions, values) in curves.items():
        axes.plot(positions, values, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(upward)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
