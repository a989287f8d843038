"""The command `genomamba share`: upload of a model to the Hugging Face Hub."""

from typing import Annotated

import typer

from mambapipelines.cli.options import ModelArgument


def share(
    model: ModelArgument,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hugging Face Hub.")],
    push: Annotated[bool, typer.Option("--push", help="Upload; without it, only list what would be uploaded.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Upload a model to the Hugging Face Hub, where any MODEL argument accepts it as hf://OWNER/NAME.

    **Examples**

    `genomamba share model me/yeasts`

    `genomamba share model me/yeasts --push`

    `genomamba classify hf://me/yeasts@main contigs.fa`
    """
    from genomamba.models.species_classifier import load_classifier  # noqa: PLC0415
    from genomamba.weights import find_model  # noqa: PLC0415
    from mambacore.hub import MODEL_FILES, push_model_folder  # noqa: PLC0415
    from mambacore.safe_text import table_line  # noqa: PLC0415
    from mambapipelines.console import note, show  # noqa: PLC0415

    folder = find_model(model)
    load_classifier(folder)
    if push:
        show(push_model_folder(folder, repository, private=not public))
        return
    for name in MODEL_FILES:
        show(table_line([str(folder / name), f"{(folder / name).stat().st_size} bytes", f"hf://{repository}/{name}"]))
    note("nothing was uploaded: add --push")
