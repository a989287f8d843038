"""The learning rate and the length of the windows, as pure functions of the step and of what a run's state holds.

A resumed run therefore repeats them exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

SCHEDULES = ("cosine", "plateau")
MEASURING_WARMUP_STEPS = 100


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step.

    Attributes:
        peak_learning_rate: highest learning rate.
        warmup_steps: steps of the linear warm-up.
        total_steps: steps of the whole run; with `cosine` the rate has come down to `final_fraction` of the peak at the
            last one.
        final_fraction: see `total_steps`; with `plateau` the rate never falls below this part of the peak.
        measured_steps: first steps, taken while `total_steps` was still being measured; they rise as if the warm-up
            lasted `MEASURING_WARMUP_STEPS`, because their rate must not depend on what was not known yet.
        kind: what comes after the warm-up: `cosine` (Loshchilov & Hutter, arXiv 1608.03983, equation 5, one cycle), or
            `plateau`, the peak times `plateau_factor` for each time that validation stopped getting better.
        plateau_factor: see `kind`.
        replanned_step: steps taken when `total_steps` was last changed; the rates of steps before it are those of the
            schedule as it was.
        replanned_progress: how much of the decay lay behind then, from 0 to 1. The rest is spread over the steps that
            are left, so the rate does not jump.
    """

    peak_learning_rate: float
    warmup_steps: int
    total_steps: int
    final_fraction: float
    measured_steps: int = 0
    kind: str = "cosine"
    plateau_factor: float = 0.5
    replanned_step: int = 0
    replanned_progress: float = 0.0

    def learning_rate(self, step: int, reductions: int = 0) -> float:
        """Learning rate of the update that makes step `step` (0-based) into `step + 1`.

        `reductions` is how often validation has stopped getting better (`ValidationHistory`).
        """
        if step < self.measured_steps:
            return measuring_learning_rate(self.peak_learning_rate, step)
        if step < self.warmup_steps:
            start = 0.0
            if self.measured_steps > 0:
                start = measuring_learning_rate(self.peak_learning_rate, self.measured_steps - 1)
            progress = (step + 1 - self.measured_steps) / (self.warmup_steps - self.measured_steps)
            return start + (self.peak_learning_rate - start) * progress
        if self.kind == "plateau":
            return self.peak_learning_rate * max(self.final_fraction, self.plateau_factor**reductions)
        cosine = 0.5 * (1.0 + math.cos(math.pi * self.progress(step)))
        return self.peak_learning_rate * (self.final_fraction + (1.0 - self.final_fraction) * cosine)

    def progress(self, step: int) -> float:
        """How much of the decay after the warm-up lies before step `step`, from 0 to 1."""
        start = max(self.warmup_steps, self.replanned_step)
        part = min(1.0, max(0, step - start) / max(1, self.total_steps - start))
        return self.replanned_progress + (1.0 - self.replanned_progress) * part

    def replanned(self, steps_done: int, total_steps: int) -> Schedule:
        """The schedule with another number of steps in all, from step `steps_done` on; the warm-up stays as it is."""
        if steps_done <= self.warmup_steps:
            return replace(self, total_steps=max(total_steps, self.warmup_steps + 1))
        return replace(
            self,
            total_steps=total_steps,
            replanned_step=steps_done,
            replanned_progress=self.progress(steps_done),
        )


def measuring_learning_rate(peak_learning_rate: float, step: int) -> float:
    """Learning rate of step `step` while the length of the run is still being measured."""
    return peak_learning_rate * min(1.0, (step + 1) / MEASURING_WARMUP_STEPS)


@dataclass(frozen=True)
class ValidationHistory:
    """What a run has to remember of its validations.

    Attributes:
        best: the best figure so far, `None` before the first validation.
        best_step: steps taken when it was reached.
        waiting: validations since then, or since the last reduction.
        reductions: how often `patience` validations in a row were no better than the best.
    """

    best: float | None = None
    best_step: int | None = None
    waiting: int = 0
    reductions: int = 0

    def after(self, figure: float, step: int, higher_is_better: bool, patience: int) -> ValidationHistory:
        """The history with one more validation; `self` stays as it is. A figure that is not a number is never best."""
        better = self.best is None or (figure > self.best if higher_is_better else figure < self.best)
        if better and not math.isnan(figure):
            return ValidationHistory(figure, step, 0, self.reductions)
        if self.waiting + 1 >= patience:
            return ValidationHistory(self.best, self.best_step, 0, self.reductions + 1)
        return ValidationHistory(self.best, self.best_step, self.waiting + 1, self.reductions)


@dataclass(frozen=True)
class LengthWarmup:
    """Short windows first: the length doubles from stage to stage (HyenaDNA, Nguyen et al., arXiv 2306.15794, 3.2).

    Attributes:
        first_length: length of the first stage; longer than `length` means no warm-up.
        steps_per_stage: steps of each stage before the last; 0 means no warm-up.
        length: length of the last stage.
    """

    first_length: int
    steps_per_stage: int
    length: int

    @property
    def longest_step(self) -> int:
        """The first step whose windows have the full length."""
        stages = 0
        while self.steps_per_stage and self.first_length << stages < self.length:
            stages += 1
        return stages * self.steps_per_stage

    def length_at(self, step: int) -> int:
        """Length of the windows of step `step` (0-based)."""
        if self.steps_per_stage == 0:
            return self.length
        # Nothing is longer than 2^63, whatever the step.
        doublings = min(step // self.steps_per_stage, 63)
        return min(self.length, self.first_length << doublings)
