"""Fetching of a public data set: its files are downloaded, verified and prepared for use."""

from __future__ import annotations

import dataclasses
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mambacore.errors import InputError
from mambapipelines.console import SECONDS_BETWEEN_LINES, counted, note
from mambapipelines.datasets.downloads import RemoteFile, Report, download, file_checksum


@dataclasses.dataclass(frozen=True)
class SetFile:
    """A file of a data set.

    Attributes:
        remote: its addresses, size and checksum.
        folder: subfolder of the data folder; "" is the data folder itself.
        ready: file or folder that is prepared from it, relative to the data folder; `None` if it is used as it is.
        prepare: called with the paths of the archive and of `ready`.
    """

    remote: RemoteFile
    folder: str = ""
    ready: str | None = None
    prepare: Callable[[Path, Path], None] | None = None


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A named data set; `parts` maps names (of species, for example) to files."""

    name: str
    title: str
    parts: dict[str, tuple[SetFile, ...]]

    def chosen(self, names: Sequence[str]) -> list[SetFile]:
        """Files of the named parts, or of all.

        Raises:
            InputError: there is no such part.
        """
        for name in names:
            if name not in self.parts:
                raise InputError(f"{self.name} has no part '{name}': it has {', '.join(self.parts)}.")
        return [file for name, files in self.parts.items() if not names or name in names for file in files]


def fetch(
    data: DataSet, output: Path, *, parts: Sequence[str] = (), mirrors: Sequence[str] = (), keep_archives: bool = False
) -> list[Path]:
    """Fetch a data set into a folder, file by file; files already there are not fetched again.

    Args:
        data: the data set.
        output: folder of the data, created if missing.
        parts: names of the wanted parts; none for all.
        mirrors: addresses of folders with the same files, tried first.
        keep_archives: keep archives after unpacking them.

    Returns:
        Files and folders ready for use, in the order of the set.

    Raises:
        InputError: see `mambapipelines.datasets.downloads.download`; or an archive is incomplete.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file: give a folder as --output.")
    files = data.chosen(parts)
    results = []
    for number, file in enumerate(files, 1):
        archive = output / file.folder / file.remote.name
        ready = output / file.ready if file.ready is not None else archive
        if file.ready is not None and ready.exists():
            note(f"{ready} is there already")
        else:
            with _progress(f"{number} of {len(files)}, {file.remote.name}") as report:
                download(mirrored(file.remote, file.folder, mirrors), archive.parent, report)
            if file.prepare is not None:
                note(f"unpacking {archive}")
                file.prepare(archive, ready)
                if not keep_archives:
                    archive.unlink()
        results.append(ready)
    return results


def mirrored(file: RemoteFile, folder: str, mirrors: Sequence[str]) -> RemoteFile:
    """The file with further addresses, tried first.

    Raises:
        InputError: a mirror is not a web address.
    """
    for mirror in mirrors:
        if urllib.parse.urlsplit(mirror).scheme not in {"http", "https", "ftp"}:
            raise InputError(f"--mirror {mirror} is not a web address: begin it with https://, http:// or ftp://.")
    path = f"{folder}/{file.name}" if folder else file.name
    urls = tuple(f"{mirror.rstrip('/')}/{path}" for mirror in mirrors)
    return dataclasses.replace(file, urls=urls + file.urls)


def listing(data: DataSet, parts: Sequence[str] = ()) -> Iterator[list[str]]:
    """Header and rows of the files to fetch: file, bytes, checksum, address."""
    yield ["file", "bytes", "checksum", "address"]
    for file in data.chosen(parts):
        remote = file.remote
        checksum = remote.checksum or (f"in {remote.checksum_list}" if remote.checksum_list else "stated by the server")
        size = "stated by the server" if remote.size is None else str(remote.size)
        yield [f"{file.folder}/{remote.name}".lstrip("/"), size, checksum, remote.urls[0]]


def checksum_row(path: Path) -> list[str]:
    """Path, bytes and checksum of a fetched file; of a folder, its number of files."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        return [str(path), str(sum(file.stat().st_size for file in files)), counted(len(files), "file")]
    return [str(path), str(path.stat().st_size), file_checksum(path, "md5")]


@contextmanager
def _progress(title: str) -> Iterator[Report]:
    """Show bytes, speed and time left on standard error: a bar on a terminal, lines at intervals elsewhere."""
    if sys.stderr.isatty():
        columns = (TextColumn(title), BarColumn(None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), expand=True, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    start = last = time.monotonic()
    first: int | None = None

    def line(done: int, total: int | None) -> None:
        nonlocal last, first
        first = done if first is None else first
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            speed = (done - first) / (now - start)
            left = f", {(total - done) / speed:,.0f} s left" if total is not None and speed > 0 else ""
            note(f"{title}: {done / 1e6:,.0f} MB, {speed / 1e6:,.1f} MB/s{left}")

    yield line
