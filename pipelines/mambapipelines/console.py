"""Messages and progress on standard error, durations, and the number of CPU threads."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from mambacore.errors import InputError
from mambacore.safe_text import safe_for_terminal, with_short_words
from mambapipelines import MOST_THREADS, VERBOSITY_VARIABLE

SECONDS_BETWEEN_LINES = 10.0


def is_quiet() -> bool:
    """Return whether only warnings and errors are printed (`--quiet`)."""
    return os.environ.get(VERBOSITY_VARIABLE) == "quiet"


def note(text: str) -> None:
    """Print a line on standard error, unless the command is quiet."""
    if not is_quiet():
        print(safe_for_terminal(with_short_words(text)), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print on standard output."""
    print(safe_for_terminal(text), flush=True)


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: `1 record`, `2,000 records`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_duration(seconds: float) -> str:
    """Format seconds as H:MM:SS or M:SS."""
    minutes, whole_seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole_seconds:02d}" if hours else f"{minutes}:{whole_seconds:02d}"


def use_threads(count: int | None) -> None:
    """Set the number of CPU threads of PyTorch; `None` keeps its default.

    Raises:
        InputError: if `count` is below 1 or above `MOST_THREADS`.
    """
    if count is None:
        return
    if not 1 <= count <= MOST_THREADS:
        raise InputError(f"--threads is {count}: give 1 or more, up to {MOST_THREADS}.")
    import torch  # noqa: PLC0415 - a second to import, which `--help` does not need

    torch.set_num_threads(count)


class ProgressDisplay:
    """Progress on standard error: a bar on a terminal, otherwise a line every ten seconds; a context manager.

    Args:
        activity: the activity, in one or two words.
        total: total units of work; `None` while unknown.
        console: the console to write to.
        bar: draw a bar if the console is a terminal.
        lines: print lines if it is not.
        first_figures: text beside the bar before the first update.
        redirect_output: print other output above the bar; off if rows are written to standard output meanwhile.
    """

    def __init__(
        self,
        activity: str,
        total: int | None,
        console: Console,
        *,
        bar: bool = True,
        lines: bool = True,
        first_figures: str = "",
        redirect_output: bool = True,
    ) -> None:
        self.console = console
        self._activity = activity
        self._total = total
        self._lines = lines and not console.is_terminal
        self._first_figures = first_figures
        self._bar: Progress | None = None
        console.quiet = console.quiet or is_quiet()
        if bar and console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn(activity),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}", markup=False),
                console=console,
                expand=True,
                transient=True,
                redirect_stdout=redirect_output,
                redirect_stderr=redirect_output,
            )
        self._task: TaskID | None = None
        self._start_seconds = self._line_seconds = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._activity, total=self._total, figures=self._first_figures)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(safe_for_terminal(text), markup=False, highlight=False, soft_wrap=True)

    def be_quiet(self) -> None:
        """Print nothing from now on, because another process reports for this one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        self.console.quiet = True

    def _move_bar(self, completed: int | None, figures: str | None = None) -> None:
        if self._bar is None or self._task is None:
            return
        self._bar.update(self._task, completed=completed, total=self._total)
        if figures is not None:
            self._bar.update(self._task, figures=figures)

    def _show(self, completed: int, figures: str, line: str, always: bool = False) -> None:
        """Update the bar, or print `line` if the last one is ten seconds old or `always`."""
        if self._bar is not None:
            self._move_bar(completed, figures)
        elif self._lines and (always or time.monotonic() - self._line_seconds >= SECONDS_BETWEEN_LINES):
            self._line_seconds = time.monotonic()
            self.note(line)


class WorkProgress(ProgressDisplay):
    """Progress, speed and remaining time on standard error."""

    def __init__(
        self, activity: str, total: int | None, lines_elsewhere: bool, bar: bool = True, unit: str = "bases"
    ) -> None:
        """Set up the display.

        Args:
            activity: the activity, in one word.
            total: total units of work; `None` if unknown.
            lines_elsewhere: print lines if standard error is not a terminal.
            bar: draw a bar if it is.
            unit: unit of work.
        """
        super().__init__(activity, total, Console(stderr=True), bar=bar, lines=lines_elsewhere, redirect_output=False)
        self._unit = unit
        self._done = 0

    def advance(self, units: int, figures: str = "") -> None:
        """Add `units`; `figures` are shown before speed and remaining time."""
        self._done += units
        described = self._describe(figures)
        self._show(self._done, described, f"{self._activity}: {described}")

    def _describe(self, figures: str) -> str:
        seconds = max(time.monotonic() - self._start_seconds, 1e-9)
        parts = [figures] if figures else []
        parts.append(f"{self._done / seconds:,.0f} {self._unit}/s")
        if self._total and self._done:
            seconds_left = seconds * max(0, self._total - self._done) / self._done
            parts.append(f"{format_duration(seconds_left)} left")
        return ", ".join(parts)
