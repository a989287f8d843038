"""What the commands share: lines and progress on standard error, and files that are written whole or not at all."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from mambacore.errors import InputError
from mambapipelines.progress import format_duration

SECONDS_BETWEEN_LINES = 10.0


def note(text: str) -> None:
    """Print one line on standard error."""
    print(text, file=sys.stderr, flush=True)


def use_threads(count: int | None) -> None:
    """Let PyTorch use `count` CPU threads; `None` keeps its own choice.

    Raises:
        InputError: `count` is below 1.
    """
    if count is None:
        return
    if count < 1:
        raise InputError(f"--threads is {count}: give 1 or more.")
    import torch  # noqa: PLC0415 - a second to import, which `--help` does not need

    torch.set_num_threads(count)


class BaseProgress:
    """Bases worked through, speed and time left on standard error; a context manager.

    On a terminal this is a bar. Elsewhere it is a line every ten seconds, or nothing when `lines_elsewhere` is false.
    """

    def __init__(
        self, activity: str, total_bases: int | None, lines_elsewhere: bool, bar: bool = True, unit: str = "bases"
    ) -> None:
        """Get ready.

        Args:
            activity: what is being done, one word.
            total_bases: how many bases there are, `None` when that is not known.
            lines_elsewhere: print lines when standard error is no terminal.
            bar: draw a bar when it is one.
            unit: what is worked through, if it is not bases.
        """
        self._activity = activity
        self._unit = unit
        self._total_bases = total_bases
        self._lines = lines_elsewhere and not sys.stderr.isatty()
        self._bar: Progress | None = None
        if bar and sys.stderr.isatty():
            # Standard output stays untouched: rows go there while the bar is drawn.
            self._bar = Progress(
                TextColumn(activity),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}", markup=False),
                console=Console(stderr=True),
                expand=True,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        self._task: TaskID | None = None
        self._bases = 0
        self._start_seconds = self._line_seconds = time.monotonic()

    def __enter__(self) -> BaseProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._activity, total=self._total_bases, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, bases: int, figures: str = "") -> None:
        """Count `bases` more; `figures` are shown in front of speed and time left."""
        self._bases += bases
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._bases, figures=self._describe(figures))
        elif self._lines and time.monotonic() - self._line_seconds >= SECONDS_BETWEEN_LINES:
            self._line_seconds = time.monotonic()
            note(f"{self._activity}: {self._describe(figures)}")

    def _describe(self, figures: str) -> str:
        seconds = max(time.monotonic() - self._start_seconds, 1e-9)
        parts = [figures] if figures else []
        parts.append(f"{self._bases / seconds:,.0f} {self._unit}/s")
        if self._total_bases and self._bases:
            seconds_left = seconds * max(0, self._total_bases - self._bases) / self._bases
            parts.append(f"{format_duration(seconds_left)} left")
        return ", ".join(parts)


def check_writable_place(path: Path, option: str) -> None:
    """Refuse a place for a file before hours of work go into it.

    Raises:
        InputError: the folder is missing or not writable, or `path` is itself a folder.
    """
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder: give the name of a file.")
    direct = path.exists() and not path.is_file()
    folder = path.parent if direct else path.resolve().parent
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} for {option} {path.name}: make it first.")
    if not os.access(path if direct else folder, os.W_OK):
        raise InputError(f"{option} {path} cannot be written, permission denied: choose another place.")


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when the block ends without an error.

    What is no regular file (`/dev/stdout`, a named pipe) is written to directly. A link is followed, not replaced.

    Raises:
        InputError: it cannot be written.
    """
    direct = path.exists() and not path.is_file()
    path = path if direct else path.resolve()
    target = path if direct else path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with target.open("wb") as stream:
            yield stream
        if not direct:
            os.replace(target, path)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): choose another place.") from error
    finally:
        if not direct:
            target.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file at once, or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with written_whole(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
