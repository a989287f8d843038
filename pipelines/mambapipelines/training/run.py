"""One training run, from its folder to its last step, whatever it learns."""

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
from mambacore.model_folder import CARD_NAME, CONFIG_NAME, TENSORS_NAME
from mambapipelines.training.module import StepDataModule, TrainingModule
from mambapipelines.training.options import RUN_FOLDER_NAME, RunOptions, check_output, strategy_of
from mambapipelines.training.plan import RunPlan
from mambapipelines.training.progress import TrainingProgress, quiet_lightning
from mambapipelines.training.provenance import provenance
from mambapipelines.training.ranks import ONE_PROCESS, Ranks, join_ranks, leave_ranks, placement
from mambapipelines.training.recipe import TrainingRecipe
from mambapipelines.training.recorder import TrainingRecorder, metrics_columns, signal_handlers_restored
from mambapipelines.training.report import write_run_report
from mambapipelines.training.schedules import Schedule
from mambapipelines.training.state import RunFolder, RunState
from mambapipelines.training.task import TrainingTask

# Part of the wall time that is planned with; the rest is for a machine that slows down and for writing the model.
PLANNED_FRACTION = 0.95


def run_folder(options: RunOptions, task: type[TrainingTask], recipe: TrainingRecipe) -> RunFolder:
    """Where the state of the run lies.

    Raises:
        InputError: the output folder holds something else, or the task needs whole sequences and is not to have them.
    """
    if strategy_of(options)[1] > 1 and not task.splits_over_context:
        raise InputError(
            "--context-ranks divides sequences, and this model reads them whole: leave it out, or train a causal "
            "language model."
        )
    folder = RunFolder(
        options.output / RUN_FOLDER_NAME,
        metrics_columns(task),
        keep_last=recipe.checkpoints.keep_last,
        keep_best=recipe.checkpoints.keep_best > 0,
    )
    check_output(options, folder)
    return folder


@dataclass(frozen=True)
class TrainingOutcome:
    """What training came to.

    Attributes:
        steps: optimiser steps taken in all.
        validation: the figures of the last validation of this call; `None` when there was none.
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
    _validation: dict[str, float] | None = field(default=None, init=False)
    _ranks: Ranks = field(default=ONE_PROCESS, init=False)

    def train(self, state: RunState | None) -> TrainingOutcome:
        """Take all steps that are left; the task's model then has its final weights, averaged if the recipe says so.

        With `minutes`, the first steps are timed and the number of steps is fixed from them, leaving 5 % of the time in
        reserve; everything is a function of the step from then on. A state is written about every 30 seconds, at the
        end, and on Ctrl-C or SIGTERM; until the number of steps is fixed there is none.

        Raises:
            InputError: a loss that stopped being finite, data that cannot be read, or a state that cannot be written.
            KeyboardInterrupt: stopped by Ctrl-C, state saved.
            SystemExit: stopped by SIGTERM, state saved, status 143.
        """
        ranks = join_ranks(*strategy_of(self.options))
        try:
            module = self._train(state, ranks)
        finally:
            leave_ranks(ranks)
        if not ranks.is_first:
            # What is left, such as writing the model, is for the first process alone.
            raise SystemExit(0)
        assert module.schedule is not None
        return TrainingOutcome(module.schedule.total_steps, self._validation)

    def _train(self, state: RunState | None, ranks: Ranks) -> TrainingModule:
        if state is not None:
            self.task.model.load_state_dict(state.weights)
        if not ranks.is_first:
            self.progress.be_quiet()
        module = TrainingModule(self.task, self.recipe, state, ranks)
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
            validation_interval=self.plan.validation_interval,
            planned_seconds=60 * (self.options.minutes or self.recipe.minutes),
        )
        try:
            with quiet_lightning(), signal_handlers_restored():
                trainer = pl.Trainer(
                    accelerator="cpu",
                    **placement(ranks),
                    max_epochs=1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    callbacks=[recorder],
                )
                trainer.fit(module, StepDataModule(self.task, module.steps_done))
        finally:
            if metrics is not None:
                metrics.close()
        if recorder.stop_signal is not None and not recorder.finished:
            self._stop(recorder, module)
        return recorder.validation

    def _plan_schedule(self, steps_done: int, seconds_per_step: float) -> Schedule:
        """The schedule of a run in minutes, from the time that a step takes."""
        minutes = self.options.minutes if self.options.minutes is not None else self.recipe.minutes
        seconds_left = PLANNED_FRACTION * 60 * minutes - (time.monotonic() - self.start_seconds)
        schedule = self.plan.schedule_for_time(steps_done, seconds_per_step, seconds_left)
        # The clocks of several processes differ; that of the first one counts.
        return self.plan.schedule(int(self._ranks.of_first([schedule.total_steps])[0]), steps_done)

    def _stop(self, recorder: TrainingRecorder, module: TrainingModule) -> None:
        if self.folder.holds_a_run():
            self.progress.note(f"stopped after step {module.steps_done}: go on with the same command and --resume")
        else:
            self.progress.note("stopped before there was anything to save: start again")
        if recorder.stop_signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


@contextmanager
def published_model(output: Path, folder: RunFolder) -> Iterator[Path]:
    """Where to write the model folder inside; afterwards it is moved to the output folder, beside the run and its page.

    The configuration comes last, because it makes a model folder.
    """
    temporary = folder.path / "model"
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    for name in (TENSORS_NAME, CARD_NAME, CONFIG_NAME):
        (temporary / name).replace(output / name)
    shutil.rmtree(temporary, ignore_errors=True)
    write_run_report(output)
