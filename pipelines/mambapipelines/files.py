"""Atomic writing of output files, with errors for the user (see `mambacore.files`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mambacore.errors import InputError
from mambacore.files import replaced_when_whole


def check_writable_place(path: Path, option: str) -> None:
    """Check that an output file can be written, before the work begins.

    Raises:
        InputError: if the folder is missing or not writable, or `path` is a folder.
    """
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder: give the name of a file.")
    direct = path.exists() and not path.is_file()
    folder = path.parent if direct else path.resolve().parent
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} for {option} {path.name}: create it first.")
    if not os.access(path if direct else folder, os.W_OK):
        raise InputError(f"{option} {path} cannot be written, permission denied: choose another location.")


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """As `replaced_when_whole`, for output files of a user.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        with replaced_when_whole(path) as stream:
            yield stream
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): choose another location.") from error


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file atomically.

    Raises:
        InputError: if it cannot be written.
    """
    with written_whole(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
