"""The command `audiomamba app`: a local web page for generating clips."""

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
    input_error,
)


def app(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder written by `audiomamba train`, name of a shipped model, or hf://owner/name@revision.",
        ),
    ],
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    largest_upload: LargestUploadOption = 64.0,
    longest_seconds: Annotated[float, typer.Option(help="Reject longer clips.")] = 30.0,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Open a local web page to generate clips, hear them at once, continue an uploaded one, and view them.

    The page is served until you press Ctrl-C. It needs the extra `app`: pip install 'genomamba[app]'.

    **Examples**

    `audiomamba app digits`

    `audiomamba app digits --port 8000 --longest-seconds 5`
    """
    from mambapipelines.apps import clips as page  # noqa: PLC0415
    from mambapipelines.apps.server import serve  # noqa: PLC0415

    check_largest_upload(largest_upload)
    if not longest_seconds > 0:
        raise input_error(f"--longest-seconds is {longest_seconds}: give a duration above 0.")
    blocks, routes = page.clip_app(model, longest_seconds, threads, device, precision)
    serve(blocks, host, port, largest_upload, routes=routes)
