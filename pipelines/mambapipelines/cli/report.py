"""The command `report` of both programs: the HTML report of a training run."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a training command.")],
    material: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...", help="Additional folders or files with tables, plots and sounds to include."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.html", help="File for the page.", show_default="report.html in DIR"
        ),
    ] = None,
) -> None:
    """Write the HTML report of a training run: curves, recipe, hardware, evaluations and players, readable offline.

    Training writes this page itself; this command updates it with later evaluations and generated clips. It shows
    tables (.tsv), plots (.png) and sounds in DIR and in each additional PATH. The run may still be in progress.

    **Examples**

    `genomamba report yeasts yeasts-evaluation`

    `audiomamba report digits clips --output digits.html`
    """
    from mambapipelines.console import show  # noqa: PLC0415
    from mambapipelines.training.report import write_run_report  # noqa: PLC0415

    show(str(write_run_report(run, material or (), output)))
