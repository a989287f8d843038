"""Atomic writing of files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".part"


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

    Special files (`/dev/stdout`, named pipes) are written directly. Links are followed, not replaced.

    Args:
        path: the file.
        durable: whether to sync it to disk, safe from power loss, before it is renamed.

    Raises:
        OSError: if it cannot be written.
    """
    direct = path.exists() and not path.is_file()
    path = path if direct else path.resolve()
    target = path if direct else temporary_name(path)
    try:
        with target.open("wb") as stream:
            yield stream
            if durable and not direct:
                stream.flush()
                os.fsync(stream.fileno())
        if not direct:
            os.replace(target, path)
    finally:
        if not direct:
            target.unlink(missing_ok=True)
