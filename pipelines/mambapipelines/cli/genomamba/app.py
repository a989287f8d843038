"""The command `genomamba app`: a local web page for classification."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    HostOption,
    InferencePrecisionOption,
    LargestUploadOption,
    PortOption,
    ThreadsOption,
    check_largest_upload,
)


def app(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder written by `genomamba train`, name of a shipped model, or hf://owner/name@revision.",
        ),
    ],
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    largest_upload: LargestUploadOption = 64.0,
    most_bases: Annotated[int, typer.Option(metavar="BP", min=1, help="Reject longer inputs.")] = 20_000_000,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Open a local web page to classify pasted or uploaded FASTA, with the classes along each record.

    The page is served until you press Ctrl-C. It needs the extra `app`: pip install 'genomamba[app]'.

    **Examples**

    `genomamba app yeasts`

    `genomamba app hf://me/yeasts@main --port 8000 --largest-upload 10`
    """
    from mambapipelines.apps.server import serve  # noqa: PLC0415
    from mambapipelines.apps.species import species_page  # noqa: PLC0415

    check_largest_upload(largest_upload)
    serve(species_page(model, most_bases, threads, device, precision), host, port, largest_upload)
