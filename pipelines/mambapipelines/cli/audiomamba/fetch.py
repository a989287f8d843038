"""The command `audiomamba fetch`: public recordings, resumed and checked."""

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
    """Fetch public recordings: sc09, the spoken digits of Speech Commands with the lists of its official split.

    An interrupted download continues where it ended when the same command is run again; the archive (2.4 GB) is checked
    against its checksum, and removed when the digits have been taken out.

    **Examples**

    `audiomamba fetch sc09 --output data`

    `audiomamba train data/sc09 --recipe sc09 --output model`
    """

    from mambapipelines.cli.fetching import run_fetch  # noqa: PLC0415
    from mambapipelines.datasets.recordings import AUDIO_SETS  # noqa: PLC0415

    run_fetch(AUDIO_SETS, name, output, [], mirror or [], listed, keep_archives)
