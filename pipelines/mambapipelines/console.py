"""Messages and progress on standard error, durations, and the number of CPU threads."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from mambacore.errors import InputError
from mambacore.safe_text import safe_for_terminal

SECONDS_BETWEEN_LINES = 10.0


def note(text: str) -> None:
    """Print a line on standard error."""
    print(safe_for_terminal(text), file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 record`, `2,000 records`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_duration(seconds: float) -> str:
    """`seconds` as H:MM:SS or M:SS."""
    minutes, whole_seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole_seconds:02d}" if hours else f"{minutes}:{whole_seconds:02d}"


def use_threads(count: int | None) -> None:
    """Set the number of CPU threads of PyTorch; `None` keeps its default.

    Raises:
        InputError: `count` is below 1.
    """
    if count is None:
        return
    if count < 1:
        raise InputError(f"--threads is {count}: give 1 or more.")
    import torch  # noqa: PLC0415 - a second to import, which `--help` does not need

    torch.set_num_threads(count)


class WorkProgress:
    """Work done, speed and time left on standard error; a context manager.

    On a terminal this is a bar. Elsewhere it is a line every ten seconds, or nothing when `lines_elsewhere` is false.
    """

    def __init__(
        self, activity: str, total: int | None, lines_elsewhere: bool, bar: bool = True, unit: str = "bases"
    ) -> None:
        """Get ready.

        Args:
            activity: what is being done, one word.
            total: units of work in all; `None` when that is not known.
            lines_elsewhere: print lines when standard error is no terminal.
            bar: draw a bar when it is one.
            unit: what the work is counted in.
        """
        self._activity = activity
        self._unit = unit
        self._total = total
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
        self._done = 0
        self._start_seconds = self._line_seconds = time.monotonic()

    def __enter__(self) -> WorkProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._activity, total=self._total, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, units: int, figures: str = "") -> None:
        """Count `units` more; `figures` are shown in front of speed and time left."""
        self._done += units
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, figures=self._describe(figures))
        elif self._lines and time.monotonic() - self._line_seconds >= SECONDS_BETWEEN_LINES:
            self._line_seconds = time.monotonic()
            note(f"{self._activity}: {self._describe(figures)}")

    def _describe(self, figures: str) -> str:
        seconds = max(time.monotonic() - self._start_seconds, 1e-9)
        parts = [figures] if figures else []
        parts.append(f"{self._done / seconds:,.0f} {self._unit}/s")
        if self._total and self._done:
            seconds_left = seconds * max(0, self._total - self._done) / self._done
            parts.append(f"{format_duration(seconds_left)} left")
        return ", ".join(parts)
