"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

TEMPORARY_SUFFIX: Final = ".part"
FOLDER_PREFIX: Final = "genomamba-"
_LOCK_NAME: Final = "lock"


def temporary_name(path: Path, process: int | None = None) -> Path:
    """Return the temporary name under which the process writes `path`; `remove_leftovers` recognises it."""
    return path.with_name(f".{path.name}.{process or os.getpid()}{TEMPORARY_SUFFIX}")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of killed processes; no other process may be writing in the folder."""
    for entry in folder.glob(f".*{TEMPORARY_SUFFIX}") if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextmanager
def replaced_when_whole(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a file that is renamed to its final name when the block ends without an error.

    Special files (`/dev/stdout`, named pipes) are written directly. Links are followed, not replaced. What killed
    processes left of the same file is removed.

    Args:
        path: the file.
        durable: whether to sync it to disk, safe from power loss, before it is renamed.

    Raises:
        OSError: if it cannot be written.
    """
    direct = path.exists() and not path.is_file()
    path = path if direct else path.resolve()
    target = path if direct else temporary_name(path)
    if not direct:
        _remove_abandoned(path)
    try:
        with target.open("wb") if direct else _open_locked(target) as stream:
            yield stream
            if durable and not direct:
                stream.flush()
                os.fsync(stream.fileno())
        if not direct:
            os.replace(target, path)
    finally:
        if not direct:
            target.unlink(missing_ok=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder for temporary files, removed when the block ends; those of killed processes are removed too.

    Raises:
        OSError: there is no place for temporary files.
    """
    _remove_abandoned_folders(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # The lock has its name only when it is held: nobody takes a folder that is being made for an abandoned one.
        with (folder / f"{_LOCK_NAME}{TEMPORARY_SUFFIX}").open("wb") as lock:
            if _try_lock(lock.fileno()):
                os.rename(lock.name, folder / _LOCK_NAME)
            yield folder


def _try_lock(descriptor: int) -> bool:
    """Lock a file for as long as it is open in this process; false where another has it, or there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_abandoned(path: Path) -> bool:
    """Whether a file that its writer locked is locked no longer."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> BinaryIO:
    """A new file that is locked while it is open, so that nobody takes it for an abandoned one."""
    while True:
        stream = path.open("wb")
        _try_lock(stream.fileno())
        # Before it was locked, another process may have removed it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
        stream.close()


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of a file, by the names that `temporary_name` gives."""
    for name in _leftovers(path.parent):
        if name.startswith(f".{path.name}.") and name.removeprefix(f".{path.name}.").split(".")[0].isdigit():
            left = path.with_name(name)
            if left.is_file() and _is_abandoned(left):
                left.unlink(missing_ok=True)


@functools.cache
def _leftovers(folder: Path) -> tuple[str, ...]:
    """Names of unfinished files in a folder; looked up once, because thousands of files may be written to it."""
    try:
        return tuple(entry for entry in os.listdir(folder) if entry[:1] == "." and entry.endswith(TEMPORARY_SUFFIX))
    except OSError:
        return ()


def _remove_abandoned_folders(place: Path) -> None:
    """Remove folders of `temporary_folder` whose process is gone."""
    for lock in place.glob(f"{FOLDER_PREFIX}*/{_LOCK_NAME}"):
        if _is_abandoned(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)
