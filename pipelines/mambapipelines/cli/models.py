"""The implementation shared by `genomamba models` and `audiomamba models`."""

from typing import TYPE_CHECKING, Annotated

import typer

from mambapipelines.cli.options import input_error

if TYPE_CHECKING:
    from mambacore.shipped import ShippedModels

NameArgument = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print the card of this model instead.")]


def print_models(models: "ShippedModels", name: str | None) -> None:
    """Print the table of shipped models as TSV, or one card."""
    from mambacore.safe_text import table_line  # noqa: PLC0415
    from mambapipelines.console import note, show  # noqa: PLC0415

    table = models.table
    if name is not None:
        if name not in table:
            raise input_error(f"there is no shipped model {name!r}: the names are {', '.join(table) or 'none'}.")
        show(table[name].card.rstrip("\n"))
        return
    show(table_line(["name", "task", "parameters", "size_mb", "licence", "figures"]))
    for model in table.values():
        size = f"{model.size_bytes / 1e6:.1f}"
        show(table_line([model.name, model.task, str(model.parameters), size, model.licence, model.figures]))
    if not table:
        note("this package has no shipped models")
