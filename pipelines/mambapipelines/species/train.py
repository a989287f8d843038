"""Train a species classifier: from FASTA files to a calibrated model folder, resumable to the same numbers.

Layout of an output folder: the model (`config.json`, `model.safetensors`, `README.md`) and `training/`, the state and
the metrics of the run (`mambapipelines.training.state`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from genomamba.classification.calibration import (
    SHORT_LENGTHS_BP,
    CalibrationReport,
    calibrate,
    calibration_lengths,
    collect_evidence,
)
from genomamba.classification.head_fit import fit_heads
from genomamba.data.genomes import GenomeCollection, load_genomes, require_training_classes
from genomamba.data.windows import WindowSampler, evaluation_windows
from genomamba.models.language_model import LanguageModel, load_language_model
from genomamba.models.species_classifier import (
    SpeciesClassifier,
    SpeciesClassifierConfig,
    load_classifier,
    save_classifier,
)
from genomamba.models.transfer import (
    TAKEN_SETTINGS,
    classifier_settings,
    start_from_language_model,
    weights_checksum,
)
from mambacore.errors import InputError
from mambacore.model_folder import CONFIG_NAME
from mambapipelines.console import format_duration
from mambapipelines.species.task import SpeciesTask
from mambapipelines.training.options import TrainingOptions, check_options, run_fingerprint
from mambapipelines.training.plan import TrainingPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.provenance import provenance
from mambapipelines.training.recipe import Recipe, load_recipe
from mambapipelines.training.run import (
    TrainingRun,
    introduce_state,
    published_model,
    recorded_state,
    run_folder,
    thread_count,
)
from mambapipelines.training.state import RunFolder, RunState


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

    What survives what, and when a state is written, is that of `mambapipelines.training.run.TrainingRun`.

    Raises:
        InputError: a mistake in the options, the recipe or the files, or a loss that stopped being finite.
        KeyboardInterrupt: stopped by Ctrl-C, state saved.
        SystemExit: stopped by SIGTERM, state saved, status 143.
    """
    start_seconds = time.monotonic()
    check_options(options)
    recipe = load_recipe(options.recipe, options.changes)
    run = run_folder(options, SpeciesTask, recipe)
    pretrained = _load_pretrained(options)
    genomes = load_genomes(options.genomes)
    require_training_classes(genomes)
    training, held_out = genomes.split(list(dict.fromkeys(options.holdout)))
    sampler = WindowSampler(training, options.length, options.seed)
    fingerprint = run_fingerprint(options, recipe, genomes)
    if pretrained is not None:
        fingerprint["--from"] = weights_checksum(pretrained.model)
    state = recorded_state(options, run, fingerprint)
    if state is not None and state.step >= state.schedule.total_steps and (options.output / CONFIG_NAME).is_file():
        return _finished_result(options, run, state, start_seconds)
    model = _build_model(genomes.class_names, recipe, options.seed, pretrained)
    with thread_count(options.threads), TrainingProgress() as progress:
        session = _Run(
            options=options,
            recipe=recipe,
            folder=run,
            model=model,
            sampler=sampler,
            training=training,
            held_out=held_out,
            progress=progress,
            start_seconds=start_seconds,
        )
        _introduce(progress, session)
        introduce_state(progress, options, state)
        session.train(state, fingerprint)
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
    progress: TrainingProgress
    start_seconds: float
    held_out_accuracy: float | None = None
    total_steps: int = 0

    def __post_init__(self) -> None:
        # A held-out window costs as much as a calibration window of that length, so the same budget bounds both.
        budget = self.recipe.calibration.bases_per_class
        per_class = max(1, min(self.recipe.validation.windows_per_class, budget // self.options.length))
        self.validation = evaluation_windows(self.held_out, self.options.length, per_class, self.options.seed)
        self.task = SpeciesTask(self.model, self.recipe, self.sampler, self.training, self.validation)
        self.plan = TrainingPlan(
            recipe=self.recipe,
            length=self.options.length,
            classes=len(self.held_out.class_names),
            validation_windows=len(self.validation.windows) if self.task.can_validate() else 0,
            calibration_lengths=len(calibration_lengths(self.held_out, self.options.length, budget)),
        )

    def train(self, state: RunState | None, fingerprint: dict[str, Any]) -> None:
        """Take all steps that are left; see `TrainingRun.train`."""
        run = TrainingRun(
            options=self.options,
            recipe=self.recipe,
            folder=self.folder,
            task=self.task,
            plan=self.plan,
            fingerprint=fingerprint,
            progress=self.progress,
            start_seconds=self.start_seconds,
        )
        outcome = run.train(state)
        self.total_steps = outcome.steps
        if outcome.validation is not None:
            self.held_out_accuracy = outcome.validation["held_out_accuracy"]

    def finish(self, genomes: GenomeCollection) -> TrainingResult:
        """Calibrate and write the model folder."""
        self.model.eval()
        bases_seen = self.task.bases_seen(self.total_steps)
        head_fit = fit_heads(self.model, self.training, bases_seen, self.options.seed)
        if head_fit is not None:
            self.progress.note(head_fit.summary())
        if self.task.can_validate() and (self.held_out_accuracy is None or head_fit is not None):
            self.held_out_accuracy = self.task.validate()["held_out_accuracy"]
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
            "start_from": self.options.start_from,
            "steps": self.total_steps,
            "bases_seen": bases_seen,
            "head_fit": asdict(head_fit) if head_fit is not None else None,
            "held_out_accuracy": self.held_out_accuracy,
            "calibrated": report is not None,
            "calibration": calibration,
        }
        with published_model(self.options.output, self.folder) as temporary:
            save_classifier(temporary, self.model, details=details)
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
        short = collect_evidence(
            self.model,
            self.held_out,
            SHORT_LENGTHS_BP,
            bases_per_class=bases_per_class,
            maximum_windows_per_class=self.recipe.calibration.maximum_windows_per_class,
            seed=self.options.seed,
        )
        report = calibrate(self.model, evidence, short)
        self.progress.note(report.summary())
        return report


def _load_pretrained(options: TrainingOptions) -> LanguageModel | None:
    """The language model to start from, if there is one; refuses changes of what it decides."""
    if options.start_from is None:
        return None
    for change in options.changes:
        section, _, name = change.partition("=")[0].strip().partition(".")
        if section == "model" and name in TAKEN_SETTINGS:
            raise InputError(f"--set {change} is decided by the model given with --from: leave it out.")
    return load_language_model(options.start_from)


def _build_model(
    class_names: Sequence[str], recipe: Recipe, seed: int, pretrained: LanguageModel | None = None
) -> SpeciesClassifier:
    """A new classifier whose first weights depend on the seed only, or are a language model's where it has them."""
    settings = dict(recipe.model)
    if pretrained is not None:
        settings = {name: value for name, value in settings.items() if name not in TAKEN_SETTINGS}
        settings |= classifier_settings(pretrained)
    config = SpeciesClassifierConfig.from_dict({"class_names": list(class_names), **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SpeciesClassifier(config)
    if pretrained is not None:
        start_from_language_model(classifier, pretrained)
    return classifier


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


def _introduce(progress: TrainingProgress, session: _Run) -> None:
    """Say what is about to be trained, and what of the input will not be used."""
    options, short = session.options, session.sampler.short_sequences
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    progress.note(
        f"{len(session.sampler.class_names)} classes, {parameters:,} parameters, "
        f"{session.plan.windows_per_step} windows of {options.length:,} bp per step"
    )
    if short:
        progress.note(f"{len(short)} training sequences are shorter than {options.length:,} bp and are not used")
    if session.held_out.sequences and not session.task.can_validate():
        missing = ", ".join(session.validation.missing_classes)
        progress.note(f"no held-out accuracy: {missing} has no held-out sequence of {options.length:,} bp")
