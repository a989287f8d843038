"""The implementation shared by `genomamba fetch` and `audiomamba fetch`."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mambapipelines.cli.options import input_error

if TYPE_CHECKING:
    from mambapipelines.datasets.fetch import DataSet


def run_fetch(
    known: "Mapping[str, DataSet]",
    name: str,
    output: Path | None,
    parts: Sequence[str],
    mirrors: Sequence[str],
    listed: bool,
    keep_archives: bool,
) -> None:
    """Download a data set, or list its files; rows are written to standard output.

    Args:
        known: the program's data sets by name.
        name: name of the data set.
        output: folder for the data; by default one with the set's name.
        parts: parts of the set; empty for the whole set.
        mirrors: URLs of folders with the same files, tried first.
        listed: only list the files and their addresses.
        keep_archives: keep downloaded archives after unpacking them.

    Raises:
        InputError: if the set or part does not exist, or a file cannot be downloaded.
    """
    from mambacore.safe_text import table_line  # noqa: PLC0415
    from mambapipelines.console import show  # noqa: PLC0415
    from mambapipelines.datasets.fetch import checksum_row, fetch, listing  # noqa: PLC0415

    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else f"the data sets are {', '.join(known)}."
        raise input_error(f"there is no data set '{name}': {hint}")
    if listed:
        rows = list(listing(known[name], parts))
    else:
        results = fetch(known[name], output or Path(name), parts=parts, mirrors=mirrors, keep_archives=keep_archives)
        rows = [["path", "bytes", "checksum"], *map(checksum_row, results)]
    for row in rows:
        show(table_line(row))
