"""The command `genomamba demo`: all steps on simulated genomes."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import DeviceOption, PrecisionOption, SeedOption, SetOption, ThreadsOption


def demo(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for all results; an earlier demo there is replaced."
        ),
    ] = Path("genomamba-demo"),
    minutes: Annotated[float, typer.Option(help="Time limit for training.")] = 3.0,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Recipe: tiny, demo, small, or a YAML file.")
    ] = "demo",
    changes: SetOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
) -> None:
    """Run every step on simulated genomes of five species; no data needed.

    Simulates genomes with genes and repeats, trains a model, compares accuracy by length with the baselines,
    classifies contigs and writes report.html.

    **Example**

    `genomamba demo --output my-demo`
    """
    from mambapipelines.species.demo import DemoOptions, run_demo  # noqa: PLC0415

    run_demo(
        DemoOptions(
            output=output,
            minutes=minutes,
            recipe=recipe,
            changes=changes or (),
            seed=seed,
            threads=threads,
            device=device,
            precision=precision,
        )
    )
