"""The command `genomamba app`: a local page to classify with."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.command_line import EXIT_CODES, ThreadsOption, command_group, input_error

application = command_group("", "A local page.")

HostOption = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 127.0.0.1 is this machine only.")
]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any that is free.")]
LargestUploadOption = Annotated[
    float, typer.Option("--largest-upload", metavar="MB", help="Larger files are refused, in megabytes.")
]


def check_largest_upload(megabytes: float) -> None:
    """Refuse a size that is none."""
    if not megabytes > 0:
        raise input_error(f"--largest-upload is {megabytes}: give megabytes greater than 0.")


@application.command(epilog=EXIT_CODES)
def app(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder written by `genomamba train`, or hf://owner/name@revision.")
    ],
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    largest_upload: LargestUploadOption = 64.0,
    most_bases: Annotated[int, typer.Option(metavar="BP", min=1, help="Longer inputs are refused.")] = 20_000_000,
    threads: ThreadsOption = None,
) -> None:
    """Open a page on this machine: paste or upload FASTA, see the calls and which class speaks where along a record.

    The page is served until Ctrl-C. It needs the extra `app`: pip install 'genomamba[app]'.

    **Examples**

    `genomamba app yeasts`

    `genomamba app hf://me/yeasts@main --port 8000 --largest-upload 10`
    """
    from mambapipelines.app_server import serve  # noqa: PLC0415
    from mambapipelines.species_app import species_page  # noqa: PLC0415

    check_largest_upload(largest_upload)
    serve(species_page(model, most_bases, threads), host, port, largest_upload)
