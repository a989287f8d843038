"""The command `app` of both programs: a local page to classify with, and one to draw clips with."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import EXIT_CODES, ThreadsOption, command_group, input_error

dna_application = command_group("", "A local page to classify with.")
audio_application = command_group("", "A local page to draw clips with.")

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


@dna_application.command("app", epilog=EXIT_CODES)
def species_app(
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
    from mambapipelines.apps.server import serve  # noqa: PLC0415
    from mambapipelines.apps.species import species_page  # noqa: PLC0415

    check_largest_upload(largest_upload)
    serve(species_page(model, most_bases, threads), host, port, largest_upload)


@audio_application.command("app", epilog=EXIT_CODES)
def clip_app(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder written by `audiomamba train`, or hf://owner/name@revision.")
    ],
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    largest_upload: LargestUploadOption = 64.0,
    longest_seconds: Annotated[float, typer.Option(help="Longer clips are refused.")] = 30.0,
    threads: ThreadsOption = None,
) -> None:
    """Open a page on this machine: draw clips, go on with an uploaded one, see and hear them.

    The page is served until Ctrl-C. It needs the extra `app`: pip install 'genomamba[app]'.

    **Examples**

    `audiomamba app digits`

    `audiomamba app digits --port 8000 --longest-seconds 5`
    """
    from mambapipelines.apps import clips as page  # noqa: PLC0415
    from mambapipelines.apps.server import serve  # noqa: PLC0415

    check_largest_upload(largest_upload)
    if not longest_seconds > 0:
        raise input_error(f"--longest-seconds is {longest_seconds}: give seconds greater than 0.")
    serve(page.clip_app(model, longest_seconds, threads), host, port, largest_upload)
