"""Training of a species classifier: from FASTA files to a calibrated model folder, with exact resuming.

Layout of an output folder: the model (`config.json`, `model.safetensors`, `README.md`) and `training/`, the state and
the metrics of the run (`mambapipelines.training.state`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
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
from genomamba.classification.holdouts import DEFAULT_FRACTION, HoldoutPlan, is_large_enough, plan_holdouts
from genomamba.classification.part_fit import PartFit, fit_parts
from genomamba.data.genomes import (
    GenomeCollection,
    GenomeSequence,
    GenomeSpecification,
    load_genomes,
    require_training_classes,
)
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
from mambapipelines.species.plan import CLASSES_IN_FULL, MOST_PASSES, SpeciesPlan, steps_of_passes
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.species.task import SpeciesTask
from mambapipelines.training.fingerprint import sequence_identity
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.session import TrainingSession, parameter_count

# The user is notified if a class has this many times the bases of another.
IMBALANCE = 3


@dataclass(frozen=True)
class SpeciesTrainingOptions:
    """Options of `genomamba train`.

    Attributes:
        genomes: one specification (class name and FASTA paths) per class, at least two.
        length: length of a training window in bases.
        output: the folder that becomes the model folder; its subfolder `training` holds the state of the run.
        holdout: names of sequences to hold out of training, for validation and calibration.
        holdout_fraction: share of each class to hold out instead; `None` is `holdouts.DEFAULT_FRACTION` without
            `holdout` where every class is large enough, and 0 holds nothing out.
        groups: TSV of sequence name and homology group; by default the names identify homologues.
        minutes: wall time of the whole run in minutes; by default the recipe's, unless `steps` is given.
        steps: number of optimiser steps instead of a wall time.
        recipe: name of a recipe of the package, or path of a YAML file.
        changes: values that replace the recipe's, each written `section.key=value`.
        seed: all randomness is a function of this seed and an index.
        resume: continue the run recorded in `output`, or start one if there is none.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        device, precision: see `mambapipelines.device.choose`; by default, the precision is the recipe's.
        start_from: a pretrained causal language model (folder or `hf://...`) whose shape and weights the classifier
            takes; `None` starts from random weights of the recipe's shape.
        strategy: distribution over several processes, one of `mambapipelines.training.ranks.STRATEGIES`.
        deterministic: whether to use deterministic operators on a GPU.
    """

    genomes: Sequence[GenomeSpecification]
    length: int
    output: Path
    holdout: Sequence[str] = ()
    holdout_fraction: float | None = None
    groups: Path | None = None
    minutes: float | None = None
    steps: int | None = None
    recipe: str = "small"
    changes: Sequence[str] = ()
    seed: int = 0
    resume: bool = False
    threads: int | None = None
    device: str = "auto"
    precision: str | None = None
    start_from: str | None = None
    strategy: str = "single"
    deterministic: bool = False


@dataclass(frozen=True)
class SpeciesTrainingResult:
    """Result of a finished run.

    Attributes:
        folder: the model folder.
        steps: total number of optimiser steps taken.
        held_out_accuracy: accuracy on held-out windows of the training length, both strands averaged; `None` when there
            are none.
        calibration: figures of the calibration as stored in the model folder; `None` when it was not calibrated.
        metrics_path: CSV with one row per step.
        seconds: wall time of this call.
        already_finished: whether `resume` found the run complete.
    """

    folder: Path
    steps: int
    held_out_accuracy: float | None
    calibration: dict[str, Any] | None
    metrics_path: Path
    seconds: float
    already_finished: bool = False


def train_species_classifier(options: SpeciesTrainingOptions) -> SpeciesTrainingResult:
    """Train, calibrate and save a species classifier; messages go to standard error.

    Saving and resuming are those of `mambapipelines.training.run.TrainingRun`.

    Raises:
        InputError: if an option, the recipe or a file is invalid, or the loss is no longer finite.
        KeyboardInterrupt: if interrupted by Ctrl-C; the state is saved.
        SystemExit: if terminated by SIGTERM, with status 143; the state is saved.
    """
    recipe = load_task_recipe(SpeciesRecipe, options.recipe, options.changes)
    with TrainingSession(options, recipe, SpeciesTask) as session:
        pretrained = _load_pretrained(options)
        genomes = load_genomes(options.genomes)
        require_training_classes(genomes)
        groups = read_groups(options.groups) if options.groups is not None else None
        holdouts = hold_out(options, genomes, groups)
        sampler = WindowSampler(holdouts.training, options.length, options.seed, by_length=True)
        depends_on = _depends_on(options, genomes, pretrained)
        if session.resume(depends_on, genome_files(genomes, depends_on["sequences"])):
            return _finished_result(session)
        model = _build_model(genomes.class_names, recipe, options.seed, pretrained)
        run = _Run(session, options, recipe, model, sampler, holdouts)
        run.introduce()
        # Before the first step, so that their time is included in the plan.
        for remark in (*genomes.notes, holdouts.summary):
            session.progress.note(remark)
        parts = fit_parts(holdouts.training, recipe.parts.settings(), options.seed, groups, session.progress.prepare)
        if parts is not None:
            session.progress.note(parts.summary())
            if recipe.parts.markov and recipe.parts.gate and parts.parts.gate is None:
                session.progress.note("no evidence gate: the genomes are too small to fit one")
        return run.train(genomes, parts)


class _Run:
    """One call of `train_species_classifier`, after everything has been checked."""

    def __init__(
        self,
        session: TrainingSession,
        options: SpeciesTrainingOptions,
        recipe: SpeciesRecipe,
        model: SpeciesClassifier,
        sampler: WindowSampler,
        holdouts: HoldoutPlan,
    ) -> None:
        self.session, self.options, self.recipe = session, options, recipe
        self.model, self.sampler, self.holdouts = model, sampler, holdouts
        self.training, held_out = holdouts.training, holdouts.held_out
        self.held_out = held_out
        # A held-out window costs as much as a calibration window of that length, so the same budget bounds both.
        budget = recipe.calibration.bases_per_class
        per_class = min(recipe.validation.windows_per_class, budget // options.length)
        per_class = max(1, per_class * CLASSES_IN_FULL // max(CLASSES_IN_FULL, len(held_out.class_names)))
        self.validation = evaluation_windows(held_out, options.length, per_class, options.seed)
        self.task = SpeciesTask(model, recipe, sampler, self.training, self.validation)
        time_is_given = options.minutes is not None or options.steps is not None
        self.plan = SpeciesPlan(
            recipe=recipe,
            length=options.length,
            classes=len(held_out.class_names),
            validation_windows=len(self.validation.windows) if self.task.can_validate() else 0,
            calibration_lengths=len(calibration_lengths(held_out, options.length, budget)),
            most_steps=None if time_is_given else steps_of_passes(recipe, options.length, self.training),
        )

    def introduce(self) -> None:
        """Report what is to be trained, and unused input."""
        note, length, short = self.session.progress.note, self.options.length, self.sampler.short_sequences
        note(
            f"{len(self.sampler.class_names)} classes, {parameter_count(self.model):,} parameters, "
            f"{self.plan.windows_per_step} windows of {length:,} bp per step"
        )
        if self.plan.most_steps is not None:
            note(
                f"planned: {self.recipe.minutes:g} minutes, but at most {self.plan.most_steps:,} steps, {MOST_PASSES} "
                "passes over the training sequence (--minutes or --steps overrides both)"
            )
        if short:
            note(f"{len(short)} training sequences are shorter than {length:,} bp: they are concatenated to windows")
        bases = [sum(s.length for s in self.training.sequences_of(name)) for name in self.training.class_names]
        if max(bases) > IMBALANCE * min(bases):
            note(
                f"the classes have {min(bases):,} to {max(bases):,} bp: all are equally frequent in training, and "
                "count the same when the parts are weighed"
            )
        if self.held_out.sequences and not self.task.can_validate():
            missing = ", ".join(self.validation.missing_classes)
            note(f"no held-out accuracy: {missing} has no held-out sequence of {length:,} bp")

    def train(self, genomes: GenomeCollection, parts: PartFit | None) -> SpeciesTrainingResult:
        """Take all remaining steps, calibrate, and write the model folder."""
        session, model = self.session, self.model
        outcome = session.train(self.task, self.plan)
        accuracy = None if outcome.validation is None else outcome.validation["held_out_accuracy"]
        model.eval()
        bases_seen = self.task.bases_seen(outcome.steps)
        head_fit = fit_heads(model, self.training, bases_seen, self.options.seed)
        if head_fit is not None:
            session.progress.note(head_fit.summary())
        if self.task.can_validate() and (accuracy is None or head_fit is not None):
            accuracy = self.task.validate()["held_out_accuracy"]
            model.eval()
        if parts is not None:
            model.parts, model.combination = parts.parts, parts.combination
        report = self._calibrate(outcome.steps)
        calibration = report.to_dict() if report is not None else None
        details = {
            "training_length": self.options.length,
            "holdout": list(dict.fromkeys(self.options.holdout)),
            "stretches": self.holdouts.stretches,
            "parts": None if parts is None else parts.to_dict(),
            "manifest": genomes.manifest(),
            "start_from": self.options.start_from,
            "bases_seen": bases_seen,
            "head_fit": asdict(head_fit) if head_fit is not None else None,
            "held_out_accuracy": accuracy,
            "calibrated": report is not None,
            "calibration": calibration,
        }
        session.publish(lambda folder, every: save_classifier(folder, model, details=every), details)
        return SpeciesTrainingResult(
            folder=self.options.output,
            steps=outcome.steps,
            held_out_accuracy=accuracy,
            calibration=calibration,
            metrics_path=session.folder.metrics_path,
            seconds=session.seconds,
        )

    def _calibrate(self, total_steps: int) -> CalibrationReport | None:
        note = self.session.progress.note
        if not self.held_out.sequences:
            note("nothing is held out, so probabilities are not calibrated: they are as confident as trained")
            return None
        bases_per_class = self.plan.calibration_bases_per_class(total_steps)
        lengths = calibration_lengths(self.held_out, self.options.length, bases_per_class)
        evidence, short = (
            collect_evidence(
                self.model,
                self.held_out,
                wanted,
                bases_per_class=bases_per_class,
                maximum_windows_per_class=self.recipe.calibration.maximum_windows_per_class,
                seed=self.options.seed,
            )
            for wanted in (lengths, [length for length in SHORT_LENGTHS_BP if length not in lengths])
        )
        if evidence is None:
            note("the held-out sequences are too short, so probabilities are not calibrated")
            return None
        report = calibrate(self.model, evidence, short, use_stack=self.recipe.parts.stack)
        note(report.summary())
        windows, shortest = sum(report.windows_by_length.values()), min(report.windows_by_length)
        independent = sum(sequence.length // shortest for sequence in self.held_out.sequences)
        if independent < windows:
            note(f"the windows of the calibration overlap: at most {independent} of {windows} are independent")
        return report


def hold_out(
    options: SpeciesTrainingOptions, genomes: GenomeCollection, groups: Mapping[str, str] | None = None
) -> HoldoutPlan:
    """Split the genomes into training and held-out sequences.

    Raises:
        InputError: if names and a fraction are both given, or as `plan_holdouts` and `GenomeCollection.split`.
    """
    names, fraction = list(dict.fromkeys(options.holdout)), options.holdout_fraction
    if names and fraction is not None:
        raise InputError("--holdout and --holdout-fraction are both given: give only one of them.")
    if names:
        training, held_out = genomes.split(names)
        bases = sum(sequence.length for sequence in held_out.sequences)
        return HoldoutPlan(training, held_out, f"held out {bases:,} bp: the sequences of --holdout")
    if fraction is None and not is_large_enough(genomes, DEFAULT_FRACTION):
        nothing = GenomeCollection(genomes.class_names, ())
        return HoldoutPlan(genomes, nothing, "the genomes are too small to hold out a share of them")
    return plan_holdouts(genomes, DEFAULT_FRACTION if fraction is None else fraction, options.seed, groups)


def read_groups(path: Path) -> dict[str, str]:
    """Homology group by sequence name, from lines of two columns with a tab between them.

    Raises:
        InputError: if the file cannot be read, or a line has other columns.
    """
    groups: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--groups {path} cannot be read ({error}): give a TSV file of name and group.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, tab, group = line.partition("\t")
        if not tab or not name or not group.strip() or "\t" in group:
            raise InputError(f"line {number} of --groups {path} is not a name, a tab and a group: correct it.")
        groups[name] = group.strip()
    return groups


def _identity(sequence: GenomeSequence) -> list[Any]:
    return sequence_identity(sequence.name, sequence.length, lambda start, end: sequence.tokens(start, end).tobytes())


def sequences_by_class(genomes: GenomeCollection) -> dict[str, list[list[Any]]]:
    """The identities of all sequences of each class."""
    return {name: [_identity(sequence) for sequence in genomes.sequences_of(name)] for name in genomes.class_names}


def genome_files(genomes: GenomeCollection, identities: dict[str, list[list[Any]]]) -> dict[str, str]:
    """The files of all classes, each with a checksum of its sequences, whose identities are known."""
    checksums: dict[str, int] = {}
    for name in genomes.class_names:
        for sequence, identity in zip(genomes.sequences_of(name), identities[name], strict=True):
            text = json.dumps(identity).encode()
            checksums[sequence.path] = zlib.crc32(text, checksums.get(sequence.path, 0))
    return {path: f"{checksum:08x}" for path, checksum in checksums.items()}


def _depends_on(
    options: SpeciesTrainingOptions, genomes: GenomeCollection, pretrained: LanguageModel | None
) -> dict[str, Any]:
    """Return everything the result of a run depends on, keyed by names known to the user."""
    content: dict[str, Any] = {
        "--length": options.length,
        "--holdout": sorted(set(options.holdout)),
        "--holdout-fraction": options.holdout_fraction,
        "--groups": None if options.groups is None else sorted(read_groups(options.groups).items()),
        "classes": list(genomes.class_names),
        "sequences": sequences_by_class(genomes),
    }
    if pretrained is not None:
        content["--from"] = weights_checksum(pretrained.model)
    return content


def _load_pretrained(options: SpeciesTrainingOptions) -> LanguageModel | None:
    """Load the language model to start from, if any; settings that it determines must not be changed."""
    if options.start_from is None:
        return None
    for change in options.changes:
        section, _, name = change.partition("=")[0].strip().partition(".")
        if section == "model" and name in TAKEN_SETTINGS:
            raise InputError(f"--set {change} is determined by the model given with --from: remove it.")
    return load_language_model(options.start_from)


def _build_model(
    class_names: Sequence[str], recipe: SpeciesRecipe, seed: int, pretrained: LanguageModel | None = None
) -> SpeciesClassifier:
    """Build a classifier with weights from a language model, if given, and random ones that depend only on the seed."""
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


def _finished_result(session: TrainingSession) -> SpeciesTrainingResult:
    """Return the result of a run that is already finished, from its model folder."""
    folder = session.options.output
    details = load_classifier(folder)[1]
    return SpeciesTrainingResult(
        folder=folder,
        steps=details["steps"],
        held_out_accuracy=details.get("held_out_accuracy"),
        calibration=details.get("calibration"),
        metrics_path=session.folder.metrics_path,
        seconds=session.seconds,
        already_finished=True,
    )
