"""Atomic writing of output files, with errors for the user (see `mambacore.files`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from mambacore.errors import InputError
from mambacore.files import replaced_when_whole

STANDARD_OUTPUT: Final = "-"
_OF_A_MODEL: Final = ("config.json", "README.md", "*.safetensors", "*.npz")
"""Files beside a model's configuration that belong to it."""


def check_writable_place(path: Path, option: str, inputs: Iterable[str | Path | None] = ()) -> None:
    """Check that an output file can be written and replaces nothing that is needed, before the work begins.

    Args:
        path: of the output.
        option: that names it.
        inputs: files that the command reads; what is not a file (a name, standard input) is left out.

    Raises:
        InputError: if the folder is missing or not writable, or `path` is a folder, an input or a file of a model.
    """
    if str(path) == STANDARD_OUTPUT:
        raise InputError(f"{option} - is not the name of a file: leave it out for standard output.")
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder: give the name of a file.")
    direct = path.exists() and not path.is_file()
    folder = path.parent if direct else path.resolve().parent
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} for {option} {path.name}: create it first.")
    if not os.access(path if direct else folder, os.W_OK):
        raise InputError(f"{option} {path} cannot be written, permission denied: choose another location.")
    if not path.is_file():
        return
    if any(one is not None and os.path.isfile(one) and os.path.samefile(path, one) for one in inputs):
        raise InputError(f"{option} {path} is also an input: choose another name.")
    place = path.resolve()
    if (place.parent / _OF_A_MODEL[0]).is_file() and any(place.match(pattern) for pattern in _OF_A_MODEL):
        raise InputError(f"{option} {path} is a file of the model in {place.parent}: choose another name.")


def check_output_outside(output: Path, data: str | Path, kind: str) -> None:
    """Check that a run's folder is not inside its data, where its files would be read as data from then on.

    Raises:
        InputError: if it is.
    """
    if Path(data).is_dir() and output.resolve().is_relative_to(Path(data).resolve()):
        raise InputError(
            f"--output {output} is inside {data}, where what the run writes would be taken for {kind}: choose a folder "
            "outside it."
        )


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
