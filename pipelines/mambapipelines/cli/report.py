"""The command `report`, of both programs: the page of a training run."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The --output folder of a training command.")],
    material: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PATH]...", help="Folders or files with tables, plots and sounds to show too."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Where the page goes.", show_default="report.html in DIR")
    ] = None,
) -> None:
    """Write one page about a training run that opens offline: curves, recipe, hardware, evaluations, players.

    Training writes such a page by itself; this command writes it again, with what has been evaluated or generated
    since. Tables (.tsv), plots (.png) and sounds in DIR and in each further PATH are shown; a run that is still going
    on may be looked at.

    **Examples**

    `genomamba report yeasts yeasts-evaluation`

    `audiomamba report digits clips --output digits.html`
    """
    from mambapipelines.training.report import write_run_report  # noqa: PLC0415

    print(write_run_report(run, material or (), output))
