"""The published species tasks as runs: the pinned assemblies, the published schedule, and the controls beside it.

Layout of an output folder: the model (`config.json`, `model.safetensors`, `README.md`), `accuracy.tsv`, what was chosen
for the controls (`baselines.json`), and `training/`, the state of the run.

Two things differ from the published programs: windows with more than 1 % of unknown bases are drawn again, in training
as in evaluation (HyenaDNA's fills windows at the ends with N, and gaps tell assemblies apart); and evaluation windows
are fixed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from genomamba.baselines import BASELINE_NAMES
from genomamba.classification.held_out import FloatArray
from genomamba.data.assemblies import SpeciesProtocol, species_protocol
from genomamba.data.assembly_genomes import ProtocolGenomes, load_protocol_genomes
from genomamba.data.genomes import GenomeCollection, SequenceStore
from genomamba.data.targets import TargetDescription
from genomamba.data.windows import WindowSampler, evaluation_windows
from genomamba.models.language_model import LanguageModel
from genomamba.models.sequence_model import SequenceModel, save_sequence_model
from genomamba.models.transfer import weights_checksum
from genomamba.prediction.loss import SequenceLoss
from genomamba.prediction.predict import model_outputs, predictions_from
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambacore.model_folder import CONFIG_NAME
from mambapipelines.console import format_duration
from mambapipelines.files import write_whole
from mambapipelines.finetuning.recipe import MODEL_DEFAULTS, build_sequence_model, load_start
from mambapipelines.finetuning.task import GenomeWindowTask, Material, SequenceModelTask
from mambapipelines.species.evaluate import (
    CHOICES_NAME,
    MODEL_NAME,
    TABLE_NAME,
    Labels,
    Scores,
    accuracy_by_length,
    fit_named_baselines,
    table_text,
)
from mambapipelines.training.options import check_options, sequence_identity
from mambapipelines.training.plan import FORWARD_PASSES_PER_STEP, STRANDS, RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.provenance import provenance
from mambapipelines.training.recipe import TrainingRecipe, load_task_recipe
from mambapipelines.training.run import (
    TrainingRun,
    introduce_state,
    published_model,
    recorded_state,
    run_folder,
    thread_count,
)
from mambapipelines.training.schedules import LengthWarmup

TARGET_COLUMN: Final = "species"
EVALUATION_SEED: Final = 0
"""Of the windows for validation and testing, whatever the seed of the training."""
CONTROL_BASES_PER_CLASS: Final = 1 << 28
"""The controls are fitted to so many bases of each species at most, an equal share from the middle of each chromosome:
their counts no longer change beyond, and whole genomes of five mammals would take 15 GB of memory."""


@dataclass(frozen=True)
class ProtocolRecipe:
    """The schedule of a task, in its own units.

    `epochs` of `steps_per_epoch` steps of `windows_per_step` windows at every length. Windows longer than
    `warmup_length` begin with that length, which doubles every `epochs_per_length` epochs. Up to `mean_pooling_up_to`
    bases the head reads the mean of all positions, beyond it the last one.
    """

    epochs: int = 10
    steps_per_epoch: int = 1024
    windows_per_step: int = 64
    warmup_length: int = 16_384
    epochs_per_length: int = 1
    mean_pooling_up_to: int = 0


@dataclass(frozen=True)
class SpeciesProtocolRecipe(TrainingRecipe):
    """The recipe of a published species task; of `batch` only the size of micro-batches is used."""

    folder: ClassVar[str] = "species"
    model_defaults: ClassVar[dict[str, Any]] = MODEL_DEFAULTS

    protocol: ProtocolRecipe = field(default_factory=ProtocolRecipe)

    def positive_values(self) -> dict[str, float]:
        """Values of the task's own sections that must be greater than 0, by key."""
        values = asdict(self.protocol)
        return {f"protocol.{key}": value for key, value in values.items() if key != "mean_pooling_up_to"}

    def pooling(self, length: int) -> str:
        """What the head reads of windows of `length` bp."""
        return "mean" if length <= self.protocol.mean_pooling_up_to else "last"


@dataclass(frozen=True)
class SpeciesProtocolOptions:
    """What `genomamba species-task` is asked to do.

    Attributes:
        task: name of a task of `genomamba.data.assemblies`.
        data: folder with `ASSEMBLY/FILE`, as `genomamba fetch` writes it.
        length: of a training window, bp.
        output: the folder that becomes the model folder.
        start_from: a language model to fine-tune; `None` starts from random weights of the recipe's shape.
        scale: share of the published steps that are taken; epochs stay, each is shorter.
        lengths: of the test windows; empty takes the published ones up to `length`, and `length`.
        per_class: test windows of each species at each length, as far as the material goes.
        baselines: which controls to fit.
        recipe: name or file; `None` takes the task's.
        changes, seed, resume, threads: as of `TrainingOptions`.
        steps, minutes: not asked for: the schedule says.
    """

    task: str
    data: Path
    length: int
    output: Path
    start_from: str | None = None
    scale: float = 1.0
    lengths: Sequence[int] = ()
    per_class: int = 200
    baselines: Sequence[str] = BASELINE_NAMES
    recipe: str | None = None
    changes: Sequence[str] = ()
    seed: int = 0
    resume: bool = False
    threads: int | None = None
    steps: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class ProtocolSchedule:
    """How many steps are taken in the end, and of how many windows.

    Attributes:
        steps, published_steps: optimiser steps, with and without the scale.
        windows_per_step: in each of them.
        lengths: of the windows, by step.
    """

    steps: int
    published_steps: int
    windows_per_step: int
    lengths: LengthWarmup

    def describe(self) -> str:
        """In words, beside what was published."""
        share = self.steps / self.published_steps
        return (
            f"{self.steps:,} steps of {self.windows_per_step} windows, {share:.2%} of the recipe's "
            f"{self.published_steps:,} steps"
        )


@dataclass(frozen=True)
class ProtocolPlan(RunPlan):
    """The work of a run: a validation costs what its bases do beside those of a step of the full length."""

    recipe: SpeciesProtocolRecipe
    validation_windows: int
    windows_per_step: int

    @property
    def validation_steps(self) -> float:
        """What one validation costs, in optimiser steps."""
        return STRANDS * self.validation_windows / (FORWARD_PASSES_PER_STEP * self.windows_per_step)


def scaled_schedule(recipe: SpeciesProtocolRecipe, length: int, scale: float) -> ProtocolSchedule:
    """The published schedule with `scale` times as many steps in every epoch, at least one."""
    protocol = recipe.protocol
    per_epoch = max(1, round(scale * protocol.steps_per_epoch))
    return ProtocolSchedule(
        steps=protocol.epochs * per_epoch,
        published_steps=protocol.epochs * protocol.steps_per_epoch,
        windows_per_step=protocol.windows_per_step,
        lengths=LengthWarmup(protocol.warmup_length, protocol.epochs_per_length * per_epoch, length),
    )


def run_species_task(options: SpeciesProtocolOptions) -> str:
    """Train, evaluate beside the controls, write everything; returns the table of accuracies.

    Raises:
        InputError: a mistake in the options, the recipe, the downloads or the model to start from.
        KeyboardInterrupt, SystemExit: stopped, state saved; as of `TrainingRun.train`.
    """
    start_seconds = time.monotonic()
    protocol = species_protocol(options.task)
    _check(options)
    recipe = load_task_recipe(SpeciesProtocolRecipe, options.recipe or protocol.name, options.changes)
    schedule = scaled_schedule(recipe, options.length, options.scale)
    options = replace(options, steps=schedule.steps)
    folder = run_folder(options, SequenceModelTask, recipe)
    pretrained = load_start(options.start_from, options.changes)
    genomes = load_protocol_genomes(protocol, options.data)
    WindowSampler(genomes.train, options.length, options.seed)  # every species must have windows of this length
    fingerprint = _fingerprint(options, recipe, genomes, pretrained)
    state = recorded_state(options, folder, fingerprint)
    with thread_count(options.threads), TrainingProgress() as progress:
        if state is not None and state.step >= state.schedule.total_steps and (options.output / CONFIG_NAME).is_file():
            progress.note(f"the run in {options.output} is finished: {state.step} steps, nothing left to do")
            return (options.output / TABLE_NAME).read_text(encoding="utf-8")
        targets = TargetDescription("classes", (TARGET_COLUMN,), protocol.class_names)
        pooling = recipe.pooling(options.length)
        model = build_sequence_model(recipe, targets, pooling, True, options.seed, pretrained)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        origin = f"from {options.start_from}" if options.start_from else "from scratch"
        progress.note(
            f"{protocol.title}: {', '.join(protocol.class_names)}; {parameters:,} parameters, {origin}; windows of "
            f"{options.length:,} bp, {pooling} pooling; {schedule.describe()}"
        )
        introduce_state(progress, options, state)
        validation = _validation(genomes.valid, options.length, recipe.validation.windows_per_class)
        task = GenomeWindowTask(
            model,
            SequenceLoss(targets),
            recipe.batch,
            validation,
            genomes.train,
            schedule.lengths,
            schedule.windows_per_step,
            options.seed,
        )
        run = TrainingRun(
            options=options,
            recipe=recipe,
            folder=folder,
            task=task,
            plan=ProtocolPlan(recipe, len(validation[0]), schedule.windows_per_step),
            fingerprint=fingerprint,
            progress=progress,
            start_seconds=start_seconds,
        )
        run.train(state)
        model.eval()
        text = _evaluate(options, protocol, genomes, model, progress)
        details = {
            "task": protocol.name,
            "assemblies": {assembly.species: assembly.accession for assembly in protocol.assemblies},
            "training_length": options.length,
            "schedule": schedule.describe(),
            "scale": options.scale,
            "recipe": recipe.to_dict(),
            "start_from": options.start_from,
            "seed": options.seed,
            "steps": schedule.steps,
            "provenance": provenance(),
        }
        with published_model(options.output, folder) as temporary:
            save_sequence_model(temporary, model, details)
        progress.note(f"wrote {options.output} after {format_duration(time.monotonic() - start_seconds)}")
    return text


def model_scores(model: SequenceModel) -> Scores:
    """The model as `accuracy_by_length` takes it."""

    def scores(windows: Sequence[Tokens], length: int) -> tuple[Labels, FloatArray | None]:
        probabilities = predictions_from(model.config.targets, model_outputs(model, windows))
        return probabilities.argmax(axis=1).astype(np.int64), probabilities

    return scores


def _check(options: SpeciesProtocolOptions) -> None:
    check_options(options)
    if not (0 < options.scale <= 1 and math.isfinite(options.scale)):
        raise InputError(f"--scale is {options.scale}: use a share above 0 and at most 1 of the published steps.")
    if options.per_class < 1:
        raise InputError(f"--per-class is {options.per_class}: give 1 or more windows.")
    if options.lengths and min(options.lengths) < 1:
        raise InputError("--lengths needs lengths of 1 bp or more.")
    for name in options.baselines:
        if name not in BASELINE_NAMES:
            raise InputError(f"there is no control '{name}': give {', '.join(BASELINE_NAMES)} or none.")


def _validation(genomes: GenomeCollection, length: int, per_class: int) -> Material:
    """Windows of the validation chromosomes; none where a species has no window of this length."""
    chosen = evaluation_windows(genomes, length, per_class, EVALUATION_SEED)
    windows = () if chosen.missing_classes else chosen.windows
    labels = np.array([[window.label] for window in windows], dtype=np.float64).reshape(-1, 1)
    return [window.tokens() for window in windows], labels


def _evaluate(
    options: SpeciesProtocolOptions,
    protocol: SpeciesProtocol,
    genomes: ProtocolGenomes,
    model: SequenceModel,
    progress: TrainingProgress,
) -> str:
    """Accuracy by length on the test chromosomes, of the model and of the controls; written to the output folder."""
    lengths = list(options.lengths) or sorted(
        {*(size for size in protocol.lengths if size < options.length), options.length}
    )
    classifiers: dict[str, Scores] = {MODEL_NAME: model_scores(model)}
    if options.baselines:
        material = excerpts(genomes.train, CONTROL_BASES_PER_CLASS)
        progress.note(f"fitting the controls {', '.join(options.baselines)}")
        fitted = fit_named_baselines(material, lengths, options.seed, options.baselines)
        for name in fitted.names:
            classifiers[name] = lambda windows, length, name=name: (fitted.predict(name, windows, length), None)  # type: ignore[misc]
        write_whole(options.output / CHOICES_NAME, json.dumps(fitted.describe(), indent=2) + "\n")
    rows = accuracy_by_length(classifiers, genomes.test, lengths, per_class=options.per_class, seed=EVALUATION_SEED)
    text = table_text(rows)
    write_whole(options.output / TABLE_NAME, text)
    return text


@dataclass(frozen=True)
class _Excerpt:
    """A store of which only what begins at `offset` is seen."""

    store: SequenceStore
    offset: int

    def fetch(self, name: str, start: int, end: int) -> Tokens:
        return self.store.fetch(name, self.offset + start, self.offset + end)


def excerpts(genomes: GenomeCollection, bases_per_class: int) -> GenomeCollection:
    """The middle of every chromosome, of each class no more than `bases_per_class` in all."""
    chosen = []
    for class_name in genomes.class_names:
        sequences = genomes.sequences_of(class_name)
        share = bases_per_class // len(sequences)
        for sequence in sequences:
            length = min(sequence.length, share)
            offset = (sequence.length - length) // 2
            chosen.append(replace(sequence, length=length, store=_Excerpt(sequence.store, offset)))
    return GenomeCollection(genomes.class_names, tuple(chosen))


def _fingerprint(
    options: SpeciesProtocolOptions,
    recipe: SpeciesProtocolRecipe,
    genomes: ProtocolGenomes,
    pretrained: LanguageModel | None,
) -> dict[str, Any]:
    """What the numbers of a run depend on; the keys are what the user would call them."""
    sequences: dict[str, list[list[Any]]] = {name: [] for name in genomes.train.class_names}
    for sequence in genomes.train.sequences:
        sequences[sequence.class_name].append(sequence_identity(sequence))
    content = {
        "task": options.task,
        "--length": options.length,
        "--scale": options.scale,
        "--from": None if pretrained is None else weights_checksum(pretrained.model),
        "--seed": options.seed,
        "sequences": sequences,
        "recipe": recipe.to_dict(),
    }
    return json.loads(json.dumps(content))
