"""The implementation shared by `genomamba models` and `audiomamba models`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mambapipelines.cli.options import input_error

if TYPE_CHECKING:
    from mambacore.shipped import ShippedModels

NameArgument = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print the card of this model instead.")]


def print_models(models: "ShippedModels", name: str | None) -> None:
    """Print the table of shipped models as TSV, or one card."""
    table = models.table
    if name is not None:
        if name not in table:
            raise input_error(f"there is no shipped model {name!r}: the names are {', '.join(table) or 'none'}.")
        print(table[name].card, end="")
        return
    print("name\ttask\tparameters\tsize_mb\tlicence\tfigures")
    for model in table.values():
        size = f"{model.size_bytes / 1e6:.1f}"
        print(model.name, model.task, model.parameters, size, model.licence, model.figures, sep="\t")
    if not table:
        print("this package has no shipped models", file=sys.stderr)
