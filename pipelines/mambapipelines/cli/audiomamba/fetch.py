"""The command `audiomamba fetch`: resumable, verified downloads of public recordings."""

from typing import Annotated

import typer

from mambapipelines.cli.options import FetchOutputOption, KeepArchivesOption, ListOption, MirrorOption


def fetch(
    name: Annotated[str, typer.Argument(metavar="SET", help="sc09.")],
    output: FetchOutputOption = None,
    mirror: MirrorOption = None,
    listed: ListOption = False,
    keep_archives: KeepArchivesOption = False,
) -> None:
    """Download public recordings: sc09, the spoken digits of Speech Commands with its official split.

    Run the same command again to resume an interrupted download. The archive (2.4 GB) is verified against its checksum,
    and removed once the digits have been extracted.

    **Examples**

    `audiomamba fetch sc09 --output data`

    `audiomamba train data/sc09 --recipe sc09 --output model`
    """

    from mambapipelines.cli.fetching import run_fetch  # noqa: PLC0415
    from mambapipelines.datasets.recordings import AUDIO_SETS  # noqa: PLC0415

    run_fetch(AUDIO_SETS, name, output, [], mirror or [], listed, keep_archives)
