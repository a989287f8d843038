"""Progress of a training run on standard error: a bar on a terminal, otherwise lines at intervals."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from mambapipelines.console import ProgressDisplay, format_duration

LOSS_SMOOTHING_STEPS = 20


class TrainingProgress(ProgressDisplay):
    """Displays step, loss, validation, speed and remaining time.

    Args:
        console: the console to write to; standard error by default.
        unit: unit of the speed.
    """

    def __init__(self, console: Console | None = None, unit: str = "bases") -> None:
        super().__init__("training", None, console or Console(stderr=True), first_figures="measuring the speed")
        self.unit = unit
        self._first_step = 0
        self._smooth_loss: float | None = None
        self._validation: str | None = None

    def start(self, first_step: int, total_steps: int | None) -> None:
        """Set the step that the run starts from and its length; `None` while that is being measured."""
        self._first_step = first_step
        self._total = total_steps
        self._start_seconds = time.monotonic()
        self._move_bar(first_step)

    def prepare(self, activity: str) -> None:
        """Report what is done before the first step."""
        self._show(0, activity, line=activity)

    def set_total(self, total_steps: int) -> None:
        """Set the length of the run once it is known."""
        self._total = total_steps
        self._move_bar(None)

    def validated(self, figures: str) -> None:
        """Set the latest validation metrics, as text."""
        self._validation = figures

    def step(self, step: int, loss: float, units_per_second: float) -> None:
        """Report that step `step` is done, with the loss of its batch and the speed."""
        if self._smooth_loss is None:
            self._smooth_loss = loss
        self._smooth_loss += (loss - self._smooth_loss) / LOSS_SMOOTHING_STEPS
        figures = self._figures(step, units_per_second)
        self._show(step, figures, line=figures, always=step == self._total)

    def _figures(self, step: int, units_per_second: float) -> str:
        parts = [f"step {step}" + (f"/{self._total}" if self._total else "")]
        parts.append(f"loss {self._smooth_loss:.4f}")
        if self._validation is not None:
            parts.append(self._validation)
        parts.append(f"{units_per_second:,.0f} {self.unit}/s")
        if self._total is not None and step > self._first_step:
            seconds_per_step = (time.monotonic() - self._start_seconds) / (step - self._first_step)
            parts.append(f"{format_duration(seconds_per_step * (self._total - step))} left")
        return ", ".join(parts)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Suppress Lightning's hints, device reports and warnings, and only these."""
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
