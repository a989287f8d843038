"""What a training run tells its user on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from mambapipelines.console import SECONDS_BETWEEN_LINES, format_duration

LOSS_SMOOTHING_STEPS = 20


class TrainingProgress:
    """Step, loss, validation, speed and time left; a context manager.

    Args:
        console: where to; standard error by default.
        unit: what the speed counts.
    """

    def __init__(self, console: Console | None = None, unit: str = "bases") -> None:
        self.unit = unit
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self.console,
                expand=True,
                transient=True,
            )
        self._first_step = 0
        self._total_steps: int | None = None
        self._start_seconds = time.monotonic()
        self._last_line_seconds = self._start_seconds
        self._smooth_loss: float | None = None
        self._validation: str | None = None

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._total_steps, figures="measuring the speed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def be_quiet(self) -> None:
        """Say nothing from now on: another process speaks for this one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        self.console.quiet = True

    def note(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, first_step: int, total_steps: int | None) -> None:
        """Where the run stands and how long it is; `total_steps` is `None` while that is being measured."""
        self._first_step = first_step
        self._total_steps = total_steps
        self._start_seconds = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=first_step, total=total_steps)

    def set_total(self, total_steps: int) -> None:
        """Say how long the run is once that is known."""
        self._total_steps = total_steps
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total_steps)

    def validated(self, figures: str) -> None:
        """The newest figures of validation, in words."""
        self._validation = figures

    def step(self, step: int, loss: float, units_per_second: float) -> None:
        """Step `step` is done: `loss` of its batch, speed of the last step."""
        if self._smooth_loss is None:
            self._smooth_loss = loss
        self._smooth_loss += (loss - self._smooth_loss) / LOSS_SMOOTHING_STEPS
        figures = self._figures(step, units_per_second)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif time.monotonic() - self._last_line_seconds >= SECONDS_BETWEEN_LINES or step == self._total_steps:
            self._last_line_seconds = time.monotonic()
            self.note(figures)

    def _figures(self, step: int, units_per_second: float) -> str:
        parts = [f"step {step}" + (f"/{self._total_steps}" if self._total_steps else "")]
        parts.append(f"loss {self._smooth_loss:.4f}")
        if self._validation is not None:
            parts.append(self._validation)
        parts.append(f"{units_per_second:,.0f} {self.unit}/s")
        if self._total_steps is not None and step > self._first_step:
            seconds_per_step = (time.monotonic() - self._start_seconds) / (step - self._first_step)
            parts.append(f"{format_duration(seconds_per_step * (self._total_steps - step))} left")
        return ", ".join(parts)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints, device reports and warnings off the terminal, and nobody else's."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
