"""Control of every training run: its length, validations, metrics, checkpoints and end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from mambacore.errors import InputError
from mambapipelines.training.metrics import MetricsLog
from mambapipelines.training.module import TrainingModule
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.schedules import Schedule
from mambapipelines.training.state import RunFolder, RunState
from mambapipelines.training.task import TrainingTask

SECONDS_BETWEEN_SAVES = 30.0
# The first steps are slower (threads start, caches fill), so they are not timed.
UNTIMED_STEPS = 2
TIMED_STEPS = 10
# Timing never takes more than this share of the run, which matters if a step takes minutes.
MEASURING_FRACTION = 0.05
# A run in minutes is planned again each time that this part of it has passed,
REPLANNING_FRACTION = 0.05
# and left as it was planned where the number of steps would change by less than this part.
REPLANNING_TOLERANCE = 0.02
# SIGHUP, which a closed terminal sends, stops a run as SIGTERM does, unless it is ignored (nohup).
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A scheduler may signal both torchrun and its processes, and torchrun then signals these again.
SECONDS_OF_ONE_SIGTERM = 5.0


def metrics_columns(task: type[TrainingTask]) -> tuple[str, ...]:
    """Return the columns of the metrics of a task."""
    return (
        "step",
        "loss",
        *task.training_figures,
        "learning_rate",
        *task.validation_figures,
        f"{task.unit}_per_second",
        "seconds",
    )


class TrainingRecorder(pl.Callback):
    """Callback after every step: plan the length of the run, validate, log, save, and stop in time.

    Args:
        folder: folder for states and metrics.
        metrics: log of this run, already truncated to the first step; `None` in processes that do not write.
        progress: the progress display.
        fingerprint: everything the run depends on, stored with every state.
        plan_schedule: called once, with the number of steps done and the mean seconds of a step, when enough steps have
            been timed; gives the schedule. Not called when the module already has one.
        plan_again: called now and then with the steps taken since the last plan, the validations among them and the
            seconds all this took; gives the total number of steps. `None` for a run of a fixed number of steps.
        validation_interval: steps between validations, of the total number of steps.
        planned_seconds: length of the whole run, of which only a small part may be spent on timing steps.
        placed: description of device, precision and processes.
        elapsed_seconds: wall time of the whole run so far; `None` where earlier processes did not record it.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        metrics: MetricsLog | None,
        progress: TrainingProgress,
        fingerprint: dict[str, Any],
        plan_schedule: Callable[[int, float], Schedule],
        plan_again: Callable[[TrainingModule, int, int, float], int] | None,
        validation_interval: Callable[[int], int],
        planned_seconds: float,
        placed: dict[str, str],
        elapsed_seconds: Callable[[], float | None],
    ) -> None:
        self.folder = folder
        self.metrics = metrics
        self.progress = progress
        self.fingerprint = fingerprint
        self.plan_schedule = plan_schedule
        self.plan_again = plan_again
        self.placed = placed
        self.elapsed_seconds = elapsed_seconds
        self.validation_interval = validation_interval
        self.planned_seconds = planned_seconds
        self.validation: dict[str, float] | None = None
        self.stop_signal: int | None = None
        self._signalled_seconds = 0.0
        self.finished = False
        self._saved_step: int | None = None
        self._saved_seconds = 0.0
        self._start_seconds = time.monotonic()
        self._step_end_seconds = self._start_seconds
        self._step_durations: list[float] = []
        self._planned_time = self._start_seconds
        self._planned_step = 0
        self._validations_since = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start timing, and replace Lightning's signal handlers, which exit without saving."""
        module = _training_module(pl_module)
        total_steps = module.schedule.total_steps if module.schedule is not None else None
        self.progress.start(module.steps_done, total_steps)
        self._step_end_seconds = self._saved_seconds = time.monotonic()
        self._remember_plan(module)
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING_SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do everything required between two steps."""
        module = _training_module(pl_module)
        task = module.task
        seconds = time.monotonic() - self._step_end_seconds
        self._step_durations.append(seconds)
        units_per_second = batch[0].shape[0] * batch[0].shape[1] / seconds
        learning_rate = module.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        ranks = module.ranks
        if module.schedule is None and ranks.of_first([float(self._measured_enough())])[0]:
            timed = self._step_durations[UNTIMED_STEPS:]
            module.schedule = self.plan_schedule(module.steps_done, sum(timed) / len(timed))
            self.progress.set_total(module.schedule.total_steps)
            self._remember_plan(module)
        elif module.schedule is not None:
            self._plan_again(module)
        step, schedule = module.steps_done, module.schedule
        self.finished = schedule is not None and step >= schedule.total_steps
        row: dict[str, object] = {
            "step": step,
            "loss": f"{module.loss_of_step:.6f}",
            **_formatted(module.figures_of_step, task.training_figures),
            "learning_rate": f"{learning_rate:.6g}",
            f"{task.unit}_per_second": f"{units_per_second:.0f}",
            "seconds": f"{seconds:.3f}",
        }
        due = schedule is not None and (self.finished or step % self.validation_interval(schedule.total_steps) == 0)
        is_best = False
        if due and task.can_validate():
            is_best = self._validate(module)
            assert self.validation is not None
            row |= _formatted(self.validation, task.validation_figures)
        if ranks.is_first:
            self._append_metrics(row)
        self.progress.step(step, module.loss_of_step, units_per_second)
        late = self._saved_step is None or time.monotonic() - self._saved_seconds >= SECONDS_BETWEEN_SAVES
        # A signal may have reached only one of the processes, and clocks differ.
        signal_number, late_anywhere = ranks.largest([float(self.stop_signal or 0), float(late)])
        self.stop_signal, late = int(signal_number) or None, late_anywhere > 0
        stopping = self.finished or self.stop_signal is not None
        if stopping or late or (is_best and self.folder.keep_best):
            self.save(module)
        if stopping:
            trainer.should_stop = True
        self._step_end_seconds = time.monotonic()

    def _validate(self, module: TrainingModule) -> bool:
        """Validate and record the result; return whether it is the best so far."""
        task = module.task
        self.validation = module.validate()
        self._validations_since += 1
        self.progress.validated(task.describe_validation(self.validation))
        module.history = module.history.after(
            self.validation[task.deciding_figure],
            module.steps_done,
            task.higher_is_better,
            module.recipe.optimizer.plateau_patience,
        )
        return module.history.best_step == module.steps_done

    def _append_metrics(self, row: dict[str, object]) -> None:
        assert self.metrics is not None
        try:
            self.metrics.append(row)
        except OSError as error:
            raise InputError(
                f"the metrics cannot be written to {self.folder.metrics_path} ({error.strerror or error}): "
                "free some space and add --resume."
            ) from error

    def save(self, module: TrainingModule) -> None:
        """Save the state of the run, unless the length of the run is not known yet.

        Raises:
            InputError: if the disk is full or the folder is not writable; the previous state is kept.
        """
        if module.schedule is None:
            return
        state = RunState(
            step=module.steps_done,
            schedule=module.schedule,
            fingerprint=self.fingerprint,
            threads=torch.get_num_threads(),
            weights={name: tensor.detach() for name, tensor in module.model.state_dict().items()},
            optimizer=module.optimizer_state(),
            average=module.average.tensors if module.average is not None else {},
            history=module.history,
            seconds=self.elapsed_seconds(),
            placed=self.placed,
            positions=module.sizes.positions,
        )
        try:
            self.folder.save(state, module.ranks)
        except OSError as error:
            raise InputError(
                f"the state of the run cannot be written to {self.folder.path} ({error.strerror or error}): "
                "free some space and add --resume."
            ) from error
        self._saved_step, self._saved_seconds = module.steps_done, time.monotonic()

    def _remember_plan(self, module: TrainingModule) -> None:
        self._planned_time, self._planned_step, self._validations_since = time.monotonic(), module.steps_done, 0

    def _plan_again(self, module: TrainingModule) -> None:
        """Adjust the number of remaining steps if the speed of the machine has changed."""
        schedule = module.schedule
        assert schedule is not None
        if self.plan_again is None or module.steps_done >= schedule.total_steps:
            return
        seconds = time.monotonic() - self._planned_time
        total = 0
        if module.ranks.is_first and seconds >= REPLANNING_FRACTION * self.planned_seconds:
            total = self.plan_again(module, module.steps_done - self._planned_step, self._validations_since, seconds)
        # The clocks of several processes differ; that of the first is used.
        total = int(module.ranks.of_first([float(total)])[0])
        if total == 0:
            return
        if abs(total - schedule.total_steps) > REPLANNING_TOLERANCE * schedule.total_steps:
            module.schedule = schedule.replanned(module.steps_done, total)
            self.progress.set_total(module.schedule.total_steps)
        self._remember_plan(module)

    def _measured_enough(self) -> bool:
        timed = len(self._step_durations) - UNTIMED_STEPS
        late = time.monotonic() - self._start_seconds > MEASURING_FRACTION * self.planned_seconds
        return timed >= TIMED_STEPS or (timed >= 1 and late)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stop_signal is not None:
            if number != signal.SIGINT and now - self._signalled_seconds < SECONDS_OF_ONE_SIGTERM:
                return
            raise SystemExit(128 + number)
        self.stop_signal, self._signalled_seconds = number, now
        self.progress.note("stopping after this step; once more to stop at once, back at the last saved state")


def _formatted(figures: dict[str, float], formats: dict[str, str]) -> dict[str, object]:
    return {name: f"{figures[name]:{form}}" for name, form in formats.items() if name in figures}


def _training_module(module: pl.LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module


@contextmanager
def signal_handlers_restored() -> Iterator[None]:
    """Restore the signal handlers after the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in STOPPING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
