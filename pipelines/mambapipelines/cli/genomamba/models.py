"""The command `genomamba models`: trained models that ship with the package."""

from mambapipelines.cli.models import NameArgument, print_models


def models(name: NameArgument = None) -> None:
    """List the trained models that ship with the package, or print the card of one.

    Every MODEL argument accepts their names. A model folder with that name in the working directory takes precedence,
    with a warning; shipped://NAME is always the shipped model.

    **Examples**

    `genomamba models`

    `genomamba models yeasts`

    `genomamba classify yeasts contigs.fa`
    """
    from genomamba.weights import MODELS  # noqa: PLC0415

    print_models(MODELS, name)
