"""A training run, from its folder to its last step, for any task."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mambacore.errors import InputError
from mambacore.files import temporary_name
from mambacore.model_folder import CARD_NAME, CONFIG_NAME, TENSORS_NAME
from mambapipelines.device import Placement, choose
from mambapipelines.training.module import StepDataModule, TrainingModule
from mambapipelines.training.one_device import OneDevice
from mambapipelines.training.options import RUN_FOLDER_NAME, RunOptions, planned_minutes, strategy_of
from mambapipelines.training.plan import RunPlan
from mambapipelines.training.progress import TrainingProgress, quiet_lightning
from mambapipelines.training.provenance import provenance
from mambapipelines.training.ranks import (
    ONE_PROCESS,
    Ranks,
    join_ranks,
    leave_ranks,
    lost_processes_named,
    silent_processes_named,
    world_size,
)
from mambapipelines.training.recipe import TrainingRecipe
from mambapipelines.training.recorder import TrainingRecorder, metrics_columns, signal_handlers_restored
from mambapipelines.training.report import write_run_report
from mambapipelines.training.schedules import Schedule
from mambapipelines.training.shared_norm import share_batch_norms
from mambapipelines.training.sizes import memory_shortage_named
from mambapipelines.training.state import RunFolder, RunState
from mambapipelines.training.task import TrainingTask

# Share of the wall time used for planning; the rest is a reserve for slowdowns and for writing the model.
PLANNED_FRACTION = 0.95


def run_folder(options: RunOptions, task: type[TrainingTask], recipe: TrainingRecipe) -> RunFolder:
    """Return the folder of the run's state.

    Raises:
        InputError: the task needs whole sequences and is not to have them.
    """
    if strategy_of(options)[1] > 1 and not task.splits_over_context:
        raise InputError(
            "--context-ranks splits sequences, but this model needs whole ones: remove it, or train a causal "
            "language model."
        )
    return RunFolder(
        options.output / RUN_FOLDER_NAME,
        metrics_columns(task),
        keep_last=recipe.checkpoints.keep_last,
        keep_best=recipe.checkpoints.keep_best > 0,
    )


@dataclass(frozen=True)
class TrainingOutcome:
    """Result of training.

    Attributes:
        steps: total number of optimiser steps taken.
        validation: metrics of the last validation of this call; `None` if there was none.
    """

    steps: int
    validation: dict[str, float] | None


@dataclass
class TrainingRun:
    """One call of training, after everything has been checked."""

    options: RunOptions
    recipe: TrainingRecipe
    folder: RunFolder
    task: TrainingTask
    plan: RunPlan
    fingerprint: dict[str, Any]
    progress: TrainingProgress
    start_seconds: float
    placement: Placement | None = None
    _validation: dict[str, float] | None = field(default=None, init=False)
    _ranks: Ranks = field(default=ONE_PROCESS, init=False)
    _seconds_before: float | None = field(default=0.0, init=False)

    def train(self, state: RunState | None) -> TrainingOutcome:
        """Take all remaining steps; the task's model then has its final weights, averaged if configured.

        With `minutes`, the first steps are timed and the number of steps follows from them, leaving 5 % of the time in
        reserve; it is planned again whenever 5 % of the time has passed. Minutes are those of all calls that worked on
        the run. The learning rate is a function of the step and of the schedule in the state, whatever the plan. A
        state is written about every 30 seconds, at the end, and on Ctrl-C, SIGTERM or SIGHUP; until there is a plan
        there is none.

        Raises:
            InputError: a loss that stopped being finite, data that cannot be read, or a state that cannot be written.
            KeyboardInterrupt: if interrupted by Ctrl-C; the state is saved.
            SystemExit: stopped by SIGTERM (status 143) or SIGHUP (129), state saved.
        """
        placement = self.placement or choose("cpu", self.recipe.precision)
        ranks = join_ranks(*strategy_of(self.options), placement.device)
        try:
            with (
                lost_processes_named(ranks),
                silent_processes_named(ranks),
                memory_shortage_named(placement),
            ):
                module = self._train(state, ranks, placement)
        finally:
            leave_ranks(ranks)
        assert module.schedule is not None
        if module.steps_done < module.schedule.total_steps:
            raise InputError(f"the run ended after step {module.steps_done} of {module.schedule.total_steps}: --resume")
        if not ranks.is_first:
            # The rest, such as writing the model, is done by the first process alone.
            raise SystemExit(0)
        return TrainingOutcome(module.schedule.total_steps, self._validation)

    def _train(self, state: RunState | None, ranks: Ranks, placement: Placement) -> TrainingModule:
        self._seconds_before = state.seconds if state is not None else 0.0
        if state is not None:
            self.task.model.load_state_dict(state.weights)
        self.task.model.to(placement.device)
        if ranks.count > 1:
            share_batch_norms(self.task.model)
        if not ranks.is_first:
            self.progress.be_quiet()
        module = TrainingModule(self.task, self.recipe, placement, state, ranks)
        if module.schedule is None and self.options.steps is not None:
            module.schedule = self.plan.schedule(self.options.steps)
        if module.schedule is None or module.steps_done < module.schedule.total_steps:
            self._validation = self._take_steps(module)
        else:
            module.configure_model()
        module.finish()
        return module

    def _take_steps(self, module: TrainingModule) -> dict[str, float] | None:
        self._ranks = ranks = module.ranks
        try:
            with ranks.all_or_none():
                if ranks.is_first:
                    self.folder.describe(self.fingerprint, provenance())
        except OSError as error:
            raise InputError(
                f"the output folder {self.options.output} cannot be made ({error.strerror}): choose another --output."
            ) from error
        metrics = self.folder.open_metrics(module.steps_done) if ranks.is_first else None
        recorder = TrainingRecorder(
            folder=self.folder,
            metrics=metrics,
            progress=self.progress,
            fingerprint=self.fingerprint,
            plan_schedule=self._plan_schedule,
            plan_again=self._plan_again if self._minutes is not None and self._seconds_before is not None else None,
            validation_interval=self.plan.validation_interval,
            planned_seconds=60 * (self._minutes or self.recipe.minutes),
            placed=placed(module.placement),
            elapsed_seconds=self._elapsed_seconds,
        )
        try:
            with quiet_lightning(), signal_handlers_restored():
                trainer = pl.Trainer(
                    strategy=OneDevice(module.placement.device),
                    devices=1,
                    max_epochs=1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    callbacks=[recorder],
                )
                module.fit_sizes(self.progress.note)
                trainer.fit(module, StepDataModule(module.batches))
        finally:
            if metrics is not None:
                metrics.close()
        if recorder.stop_signal is not None and not recorder.finished:
            self._stop(recorder, module)
        return recorder.validation

    def _plan_schedule(self, steps_done: int, seconds_per_step: float) -> Schedule:
        """Return the schedule of a run with a time limit, from the time of a step."""
        schedule = self.plan.schedule_for_time(steps_done, seconds_per_step, self._seconds_left())
        # The clocks of several processes differ; that of the first one counts.
        return self.plan.schedule(int(self._ranks.of_first([schedule.total_steps])[0]), steps_done)

    @property
    def _minutes(self) -> float | None:
        return planned_minutes(self.options, self.recipe)

    def _elapsed_seconds(self) -> float | None:
        """Return the wall time of the whole run, over all its calls."""
        if self._seconds_before is None:
            return None
        return self._seconds_before + time.monotonic() - self.start_seconds

    def _seconds_left(self) -> float:
        return PLANNED_FRACTION * 60 * (self._minutes or self.recipe.minutes) - (self._elapsed_seconds() or 0.0)

    def _plan_again(self, module: TrainingModule, steps: int, validations: int, seconds: float) -> int:
        """The total number of steps that fits, if work goes on at the speed of the last `steps` steps."""
        plan, schedule, done = self.plan, module.schedule, module.steps_done
        assert schedule is not None
        work = plan.steps_cost(done) - plan.steps_cost(done - steps) + validations * plan.validation_steps
        validations_done = done // plan.validation_interval(schedule.total_steps)
        return plan.steps_within(done, self._seconds_left() * work / seconds, validations_done)

    def _stop(self, recorder: TrainingRecorder, module: TrainingModule) -> None:
        if self.folder.holds_a_run():
            self.progress.note(f"stopped after step {module.steps_done}: continue with the same command and --resume")
        else:
            self.progress.note("stopped before there was anything to save: start again")
        if recorder.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (recorder.stop_signal or signal.SIGTERM))


def placed(placement: Placement) -> dict[str, str]:
    """Return device, precision and number of processes of a run, as recorded in its states."""
    return {"device": placement.device.type, "precision": placement.precision, "processes": str(world_size())}


@contextmanager
def published_model(output: Path, folder: RunFolder) -> Iterator[Path]:
    """Where to write the model folder inside; afterwards it is moved to the output folder, beside the run and its page.

    The configuration comes last, because it makes a model folder; that of the shorter run that was extended goes first.
    """
    temporary = temporary_name(folder.path / "model")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        (output / CONFIG_NAME).unlink(missing_ok=True)
        for name in (TENSORS_NAME, CARD_NAME, CONFIG_NAME):
            (temporary / name).replace(output / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_run_report(output)
