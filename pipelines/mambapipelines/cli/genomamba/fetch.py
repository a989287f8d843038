"""The command `genomamba fetch`: resumable, verified downloads of public genomes."""

from typing import Annotated

import typer

from mambapipelines.cli.options import FetchOutputOption, KeepArchivesOption, ListOption, MirrorOption


def fetch(
    name: Annotated[str, typer.Argument(metavar="SET", help="great-apes, hyena-species or hg38.")],
    output: FetchOutputOption = None,
    species: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this part of the set (--list shows all). Repeatable."),
    ] = None,
    mirror: MirrorOption = None,
    listed: ListOption = False,
    keep_archives: KeepArchivesOption = False,
) -> None:
    """Download public genomes: the assemblies of a published species task, or the human genome for pretraining.

    Run the same command again to resume an interrupted download. Files are verified against the archives' checksums and
    renamed when complete; existing files are verified instead of downloaded again. A row per file is written to
    standard output: path, bytes, checksum.

    **Examples**

    `genomamba fetch great-apes --list`

    `genomamba fetch great-apes --species human --species bonobo --output apes`

    `genomamba fetch hg38 --output hg38`
    """

    from mambapipelines.cli.fetching import run_fetch  # noqa: PLC0415
    from mambapipelines.datasets.genomes import DNA_SETS  # noqa: PLC0415

    run_fetch(DNA_SETS, name, output, species or [], mirror or [], listed, keep_archives)
