"""Train a species classifier: from FASTA files to a calibrated model folder, resumable to the same numbers.

Layout of an output folder: the model (`config.json`, `model.safetensors`, `README.md`) and `training/`, the state and
the metrics of the run (`mambapipelines.run_state`).
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from genomamba.genomes import GenomeCollection, load_genomes, require_training_classes
from genomamba.models import SpeciesClassifier, SpeciesClassifierConfig, load_classifier, save_classifier
from genomamba.windows import WindowSampler, evaluation_windows
from mambacore.errors import InputError
from mambacore.folder import CARD_NAME, CONFIG_NAME, TENSORS_NAME
from mambapipelines.calibration import (
    CalibrationReport,
    calibrate,
    calibration_lengths,
    collect_evidence,
    strand_averaged_evidence,
)
from mambapipelines.head_fit import fit_heads
from mambapipelines.progress import TrainingProgress, format_duration, quiet_lightning
from mambapipelines.provenance import provenance
from mambapipelines.recipes import Recipe, load_recipe
from mambapipelines.run_state import RunFolder, RunState, Schedule
from mambapipelines.species_module import (
    SpeciesTrainingModule,
    TrainingRecorder,
    WindowDataModule,
    signal_handlers_restored,
)
from mambapipelines.training_options import (
    RUN_FOLDER_NAME,
    TrainingOptions,
    check_options,
    check_output,
    refuse_other_run,
    run_fingerprint,
)
from mambapipelines.training_plan import TrainingPlan

# Part of the wall time that is planned with; the rest is for a machine that slows down and for writing the model.
PLANNED_FRACTION = 0.95


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run left behind.

    Attributes:
        folder: the model folder.
        steps: optimiser steps taken in all.
        held_out_accuracy: accuracy on held-out windows of the training length, both strands averaged; `None` when there
            are none.
        calibration: figures of the calibration as stored in the model folder; `None` when it was not calibrated.
        metrics_path: CSV with one row per step.
        seconds: wall time of this call.
        already_finished: true when `resume` found nothing left to do.
    """

    folder: Path
    steps: int
    held_out_accuracy: float | None
    calibration: dict[str, Any] | None
    metrics_path: Path
    seconds: float
    already_finished: bool = False


def train_species_classifier(options: TrainingOptions) -> TrainingResult:
    """Train, calibrate and save a species classifier; everything it has to say goes to standard error.

    With `minutes`, the first steps are timed and the number of steps is fixed from them, leaving 5 % of the time in
    reserve; the learning rate is a function of the step from then on. A machine that slows down later therefore makes
    the run longer instead of making it another run. A state is written about every 30 seconds, at the end, and on
    Ctrl-C or SIGTERM; until the number of steps is fixed there is none.

    Raises:
        InputError: a mistake in the options, the recipe or the files, or a loss that stopped being finite.
        KeyboardInterrupt: stopped by Ctrl-C, state saved.
        SystemExit: stopped by SIGTERM, state saved, status 143.
    """
    start_seconds = time.monotonic()
    check_options(options)
    recipe = load_recipe(options.recipe, options.changes)
    run = RunFolder(options.output / RUN_FOLDER_NAME)
    check_output(options, run)
    genomes = load_genomes(options.genomes)
    require_training_classes(genomes)
    training, held_out = genomes.split(list(dict.fromkeys(options.holdout)))
    sampler = WindowSampler(training, options.length, options.seed)
    fingerprint = run_fingerprint(options, recipe, genomes)
    state = run.load() if run.holds_a_run() else None
    if state is not None:
        refuse_other_run(state.fingerprint, fingerprint, options.output)
        if state.step >= state.schedule.total_steps and (options.output / CONFIG_NAME).is_file():
            return _finished_result(options, run, state, start_seconds)
    model = _build_model(genomes.class_names, recipe, options.seed)
    if state is not None:
        model.load_state_dict(state.weights)
    with _thread_count(options.threads), TrainingProgress() as progress:
        session = _Run(
            options=options,
            recipe=recipe,
            folder=run,
            model=model,
            sampler=sampler,
            training=training,
            held_out=held_out,
            fingerprint=fingerprint,
            progress=progress,
            start_seconds=start_seconds,
        )
        _introduce(progress, session, state)
        session.train(state)
        return session.finish(genomes)


@dataclass
class _Run:
    """One call of `train_species_classifier`, after everything has been checked."""

    options: TrainingOptions
    recipe: Recipe
    folder: RunFolder
    model: SpeciesClassifier
    sampler: WindowSampler
    training: GenomeCollection
    held_out: GenomeCollection
    fingerprint: dict[str, Any]
    progress: TrainingProgress
    start_seconds: float
    held_out_accuracy: float | None = None
    total_steps: int = 0

    def __post_init__(self) -> None:
        # A held-out window costs as much as a calibration window of that length, so the same budget bounds both.
        budget = self.recipe.calibration.bases_per_class
        per_class = max(1, min(self.recipe.validation.windows_per_class, budget // self.options.length))
        self.validation = evaluation_windows(self.held_out, self.options.length, per_class, self.options.seed)
        self.validation_labels = np.array([window.label for window in self.validation.windows])
        self.plan = TrainingPlan(
            recipe=self.recipe,
            length=self.options.length,
            classes=len(self.held_out.class_names),
            validation_windows=len(self.validation_labels) if self.can_validate else 0,
            calibration_lengths=len(calibration_lengths(self.held_out, self.options.length, budget)),
        )

    @property
    def can_validate(self) -> bool:
        """Whether every class has a held-out window of the training length."""
        return not self.validation.missing_classes

    def validate(self) -> float:
        """Accuracy on the held-out windows of the training length."""
        self.model.eval()
        tokens = np.stack([window.tokens() for window in self.validation.windows])
        evidence = strand_averaged_evidence(self.model, tokens)
        self.model.train()
        return float((evidence.argmax(axis=1) == self.validation_labels).mean())

    def plan_schedule(self, steps_done: int, seconds_per_step: float) -> Schedule:
        """The schedule of a run in minutes, from the time that a step takes."""
        minutes = self.options.minutes if self.options.minutes is not None else self.recipe.minutes
        seconds_left = PLANNED_FRACTION * 60 * minutes - (time.monotonic() - self.start_seconds)
        return self.plan.schedule_for_time(steps_done, seconds_per_step, seconds_left)

    def train(self, state: RunState | None) -> None:
        """Take all steps that are left.

        Raises:
            KeyboardInterrupt, SystemExit: stopped by a signal, after saving.
        """
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the output folder {self.options.output} cannot be made ({error.strerror}): choose another --output."
            ) from error
        module = SpeciesTrainingModule(
            self.model, self.recipe, self.recipe.batch.windows_per_micro_batch(self.options.length), state
        )
        if module.schedule is None and self.options.steps is not None:
            module.schedule = self.plan.schedule(self.options.steps)
        if module.schedule is not None and module.steps_done >= module.schedule.total_steps:
            self.total_steps = module.schedule.total_steps
            return
        metrics = self.folder.open_metrics(module.steps_done)
        recorder = TrainingRecorder(
            folder=self.folder,
            metrics=metrics,
            progress=self.progress,
            fingerprint=self.fingerprint,
            plan_schedule=self.plan_schedule,
            validation_interval=self.plan.validation_interval,
            validate=self.validate if self.can_validate else None,
            planned_seconds=60 * (self.options.minutes or self.recipe.minutes),
        )
        try:
            with quiet_lightning(), signal_handlers_restored():
                trainer = pl.Trainer(
                    accelerator="cpu",
                    devices=1,
                    max_epochs=1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    callbacks=[recorder],
                )
                trainer.fit(module, WindowDataModule(self.sampler, self.plan.windows_per_step, module.steps_done))
        finally:
            metrics.close()
        if recorder.stop_signal is not None and not recorder.finished:
            self._stop(recorder, module)
        assert module.schedule is not None
        self.total_steps = module.schedule.total_steps
        self.held_out_accuracy = recorder.held_out_accuracy

    def _stop(self, recorder: TrainingRecorder, module: SpeciesTrainingModule) -> None:
        if self.folder.holds_a_run():
            self.progress.note(f"stopped after step {module.steps_done}: go on with the same command and --resume")
        else:
            self.progress.note("stopped before there was anything to save: start again")
        if recorder.stop_signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def finish(self, genomes: GenomeCollection) -> TrainingResult:
        """Calibrate and write the model folder."""
        self.model.eval()
        bases_seen = self.total_steps * self.plan.windows_per_step * self.options.length
        head_fit = fit_heads(self.model, self.training, bases_seen, self.options.seed)
        if head_fit is not None:
            self.progress.note(head_fit.summary())
        if self.can_validate and (self.held_out_accuracy is None or head_fit is not None):
            self.held_out_accuracy = self.validate()
            self.model.eval()
        report = self._calibrate()
        calibration = report.to_dict() if report is not None else None
        minutes = (time.monotonic() - self.start_seconds) / 60
        details = {
            "training_length": self.options.length,
            "holdout": list(dict.fromkeys(self.options.holdout)),
            "manifest": genomes.manifest(),
            "recipe": self.recipe.to_dict(),
            "recipe_name": self.options.recipe,
            "provenance": provenance(),
            "seed": self.options.seed,
            "steps": self.total_steps,
            "bases_seen": bases_seen,
            "head_fit": asdict(head_fit) if head_fit is not None else None,
            "held_out_accuracy": self.held_out_accuracy,
            "calibrated": report is not None,
            "calibration": calibration,
        }
        _publish(self.model, self.options.output, self.folder.path / "model", details)
        self.progress.note(f"wrote {self.options.output} after {format_duration(60 * minutes)}")
        return TrainingResult(
            folder=self.options.output,
            steps=self.total_steps,
            held_out_accuracy=self.held_out_accuracy,
            calibration=calibration,
            metrics_path=self.folder.metrics_path,
            seconds=60 * minutes,
        )

    def _calibrate(self) -> CalibrationReport | None:
        if not self.held_out.sequences:
            self.progress.note("no --holdout, so probabilities are not calibrated: they are as confident as trained")
            return None
        bases_per_class = self.plan.calibration_bases_per_class(self.total_steps)
        evidence = collect_evidence(
            self.model,
            self.held_out,
            calibration_lengths(self.held_out, self.options.length, bases_per_class),
            bases_per_class=bases_per_class,
            maximum_windows_per_class=self.recipe.calibration.maximum_windows_per_class,
            seed=self.options.seed,
        )
        if evidence is None:
            self.progress.note("the held-out sequences are too short, so probabilities are not calibrated")
            return None
        report = calibrate(self.model, evidence)
        self.progress.note(report.summary())
        return report


def _publish(model: SpeciesClassifier, output: Path, temporary: Path, details: dict[str, Any]) -> None:
    """Write the model beside the run and move it into place, the configuration last because it makes a model folder."""
    shutil.rmtree(temporary, ignore_errors=True)
    save_classifier(temporary, model, details=details)
    for name in (TENSORS_NAME, CARD_NAME, CONFIG_NAME):
        (temporary / name).replace(output / name)
    shutil.rmtree(temporary, ignore_errors=True)


def _build_model(class_names: Sequence[str], recipe: Recipe, seed: int) -> SpeciesClassifier:
    """A new classifier whose first weights depend on the seed only."""
    config = SpeciesClassifierConfig.from_dict({"class_names": list(class_names), **recipe.model})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SpeciesClassifier(config)


def _finished_result(options: TrainingOptions, run: RunFolder, state: RunState, start_seconds: float) -> TrainingResult:
    """The result of a run that needs nothing more, read back from its model folder."""
    details = load_classifier(options.output)[1]
    TrainingProgress().note(f"the run in {options.output} is finished: {state.step} steps, nothing left to do")
    return TrainingResult(
        folder=options.output,
        steps=state.step,
        held_out_accuracy=details.get("held_out_accuracy"),
        calibration=details.get("calibration"),
        metrics_path=run.metrics_path,
        seconds=time.monotonic() - start_seconds,
        already_finished=True,
    )


@contextmanager
def _thread_count(threads: int | None) -> Iterator[None]:
    """Let PyTorch use `threads` CPU threads inside."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _introduce(progress: TrainingProgress, session: _Run, state: RunState | None) -> None:
    """Say what is about to be trained, and what of the input will not be used."""
    options, short = session.options, session.sampler.short_sequences
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    progress.note(
        f"{len(session.sampler.class_names)} classes, {parameters:,} parameters, "
        f"{session.plan.windows_per_step} windows of {options.length:,} bp per step"
    )
    if short:
        progress.note(f"{len(short)} training sequences are shorter than {options.length:,} bp and are not used")
    if session.held_out.sequences and not session.can_validate:
        missing = ", ".join(session.validation.missing_classes)
        progress.note(f"no held-out accuracy: {missing} has no held-out sequence of {options.length:,} bp")
    if state is not None:
        progress.note(f"resuming after step {state.step} of {state.schedule.total_steps}")
        if state.threads != torch.get_num_threads():
            progress.note(
                f"the run used {state.threads} threads and now uses {torch.get_num_threads()}: "
                "the last digits may differ from an uninterrupted run"
            )
    elif options.resume:
        progress.note(f"{options.output} holds no training run to resume: starting one")
