"""The command `fetch` of both programs: public data sets, resumed and checked."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambapipelines.cli.options import EXIT_CODES, command_group, input_error

if TYPE_CHECKING:
    from mambapipelines.datasets.fetch import DataSet

OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Folder for the data.", show_default="the set's name")
]
MirrorOption = Annotated[
    list[str] | None,
    typer.Option("--mirror", metavar="URL", help="A folder that holds the same files, asked first; may be repeated."),
]
ListOption = Annotated[bool, typer.Option("--list", help="Only say what would be fetched, and from where.")]
KeepArchivesOption = Annotated[
    bool, typer.Option("--keep-archives", help="Keep what was downloaded after it has been unpacked.")
]

dna_application = command_group("", "Public genomes.")
audio_application = command_group("", "Public recordings.")


@dna_application.command("fetch", epilog=EXIT_CODES)
def fetch_dna(
    name: Annotated[str, typer.Argument(metavar="SET", help="great-apes, hyena-species or hg38.")],
    output: OutputOption = None,
    species: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this part of the set (--list shows them all); may be repeated."),
    ] = None,
    mirror: MirrorOption = None,
    listed: ListOption = False,
    keep_archives: KeepArchivesOption = False,
) -> None:
    """Fetch public genomes: the assemblies of a published species task, or the human genome to pretrain on.

    A download that was cut goes on where it ended when the same command is run again. Files are checked against the
    checksums of the archives and appear under their names only when they are whole. What is there already is checked
    and not fetched again. A row for each file goes to standard output: path, bytes, checksum.

    **Examples**

    `genomamba fetch great-apes --list`

    `genomamba fetch great-apes --species human --species bonobo --output apes`

    `genomamba fetch hg38 --output hg38`
    """

    def sets() -> "dict[str, DataSet]":
        from mambapipelines.datasets.fetch import DNA_SETS  # noqa: PLC0415

        return DNA_SETS

    _fetch(sets, name, output, species or [], mirror or [], listed, keep_archives)


@audio_application.command("fetch", epilog=EXIT_CODES)
def fetch_audio(
    name: Annotated[str, typer.Argument(metavar="SET", help="sc09.")],
    output: OutputOption = None,
    mirror: MirrorOption = None,
    listed: ListOption = False,
    keep_archives: KeepArchivesOption = False,
) -> None:
    """Fetch public recordings: sc09, the spoken digits of Speech Commands with the lists of its official split.

    A download that was cut goes on where it ended when the same command is run again; the archive (2.4 GB) is checked
    against its checksum, and removed when the digits have been taken out.

    **Examples**

    `audiomamba fetch sc09 --output data`

    `audiomamba train data/sc09 --recipe mamba-sc09-6m --output model`
    """

    def sets() -> "dict[str, DataSet]":
        from mambapipelines.datasets.fetch import AUDIO_SETS  # noqa: PLC0415

        return AUDIO_SETS

    _fetch(sets, name, output, [], mirror or [], listed, keep_archives)


def _fetch(
    sets: "Callable[[], dict[str, DataSet]]",
    name: str,
    output: Path | None,
    parts: list[str],
    mirrors: list[str],
    listed: bool,
    keep_archives: bool,
) -> None:
    from mambapipelines.datasets.fetch import checksum_row, fetch, listing  # noqa: PLC0415

    known = sets()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}."
        raise input_error(f"there is no data set '{name}': {hint}")
    if listed:
        rows = list(listing(known[name], parts))
    else:
        results = fetch(known[name], output or Path(name), parts=parts, mirrors=mirrors, keep_archives=keep_archives)
        rows = [["path", "bytes", "checksum"], *map(checksum_row, results)]
    for row in rows:
        sys.stdout.write("\t".join(row) + "\n")
