"""Run the demo and write its page, `demo/index.html`, which opens offline.

python demo/run.py [--threads N] [--minutes M]

Classify real contigs, speak digits, take one exact step of pretraining at a million bases, and train a small classifier
on simulated genomes. A job whose model does not ship with this version is left out, and the page says so.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from classify_contigs import classify_contigs
from pretrain_at_a_million import LENGTH_BP, pretrain_at_a_million
from speak_digits import speak_digits

import audiomamba.weights
import genomamba.weights
from mambacore.benchmarking import machine
from mambacore.errors import InputError
from mambapipelines.console import format_duration, note, use_threads
from mambapipelines.files import write_whole
from mambapipelines.pages.html import Section, page
from mambapipelines.species.demo import DemoOptions, run_demo

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "index.html", metavar="FILE")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training on simulated genomes")
    parser.add_argument("--length", type=int, default=LENGTH_BP, help="bases of the step of pretraining")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--only", choices=("yeasts", "digits", "yeast-lm", "simulation"), help="one job instead of all")
    options = parser.parse_args()
    use_threads(options.threads)
    begin = time.monotonic()
    shipped = {**genomamba.weights.MODELS.table, **audiomamba.weights.MODELS.table}
    jobs: dict[str, Callable[[], list[Section]]] = {
        "yeasts": lambda: [classify_contigs()],
        "digits": lambda: [speak_digits()],
        "yeast-lm": lambda: [pretrain_at_a_million(options.threads, options.length)],
        "simulation": lambda: _simulation(options),
    }
    sections: list[Section] = []
    for name, job in jobs.items():
        if options.only not in (None, name):
            continue
        if name != "simulation" and name not in shipped:
            sections.append(
                Section(name, [f"The model {name} does not ship with this version, so its job is left out."])
            )
            continue
        started, used = time.monotonic(), processor_seconds()
        sections += job()
        work = processor_seconds() - used
        note(f"{name}: {format_duration(time.monotonic() - started)}, {work:.0f} s of processor time")
    sections.append(
        Section(
            "This machine",
            [
                f"{machine()}. Everything took {format_duration(time.monotonic() - begin)}, and "
                f"{format_duration(processor_seconds())} of processor time."
            ],
        )
    )
    write_whole(options.output, page("genomamba and audiomamba: four jobs on this machine", sections))
    print(options.output)


def processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


def _simulation(options: argparse.Namespace) -> list[Section]:
    folder = options.output.parent / "simulated"
    found = run_demo(DemoOptions(folder, minutes=options.minutes, threads=options.threads))
    first, *others = found.sections
    return [Section("Train: a classifier of simulated species", first.content), *others]


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"demo: {error}") from error
