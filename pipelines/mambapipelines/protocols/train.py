"""Training and evaluation on published species tasks: pinned assemblies, published schedule, and baselines.

Layout of an output folder: the model (`config.json`, `model.safetensors`, `README.md`), `accuracy.tsv`, what was chosen
for the baselines (`baselines.json`), and `training/`, the state of the run.

Two things differ from the published programs: windows with more than 1 % of unknown bases are resampled, in training as
in evaluation (HyenaDNA fills windows at the ends with N, and gaps give assemblies away); and evaluation windows are
fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from genomamba.baselines import BASELINE_NAMES
from genomamba.data.assemblies import species_protocol
from genomamba.data.assembly_genomes import ProtocolGenomes, load_protocol_genomes
from genomamba.data.genomes import GenomeCollection
from genomamba.data.targets import TargetDescription
from genomamba.data.windows import WindowSampler, evaluation_windows
from genomamba.models.language_model import LanguageModel
from genomamba.models.sequence_model import save_sequence_model
from genomamba.models.transfer import weights_checksum
from genomamba.prediction.loss import SequenceLoss
from mambacore.errors import InputError
from mambapipelines.finetuning.recipe import build_sequence_model, load_start
from mambapipelines.finetuning.task import GenomeWindowTask, LabelledSequences, SequenceModelTask
from mambapipelines.protocols.evaluate import EVALUATION_SEED, evaluate_protocol
from mambapipelines.protocols.recipe import SpeciesProtocolRecipe, scaled_schedule
from mambapipelines.species.evaluate import TABLE_NAME
from mambapipelines.species.train import genome_files, sequences_by_class
from mambapipelines.training.plan import FORWARD_PASSES_PER_STEP, STRANDS, RunPlan
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.session import TrainingSession, parameter_count

TARGET_COLUMN: Final = "species"


@dataclass(frozen=True)
class SpeciesProtocolOptions:
    """Options of `genomamba species-task`.

    Attributes:
        task: name of a task of `genomamba.data.assemblies`.
        data: folder with `ASSEMBLY/FILE`, as `genomamba fetch` writes it.
        length: length of a training window, bp.
        output: the folder that becomes the model folder.
        start_from: a language model to fine-tune; `None` starts from random weights of the recipe's shape.
        scale: share of the published number of steps; the number of epochs is unchanged.
        lengths: lengths of the test windows; by default the published ones up to `length`, and `length`.
        per_class: maximum number of test windows per species and length.
        baselines: names of the baselines to fit.
        recipe: name or file; by default the task's.
        changes: values that replace the recipe's, each written `section.key=value`.
        seed, resume, threads, device, precision, strategy, deterministic: as in
            `mambapipelines.training.options.RunOptions`.
        steps, minutes: not options; they follow from the schedule.
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
    device: str = "auto"
    precision: str | None = None
    strategy: str = "single"
    deterministic: bool = False
    steps: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class ProtocolPlan(RunPlan):
    """The plan of a run; the cost of a validation is proportional to its bases."""

    recipe: SpeciesProtocolRecipe
    validation_windows: int
    windows_per_step: int

    @property
    def validation_steps(self) -> float:
        """Return the cost of one validation in optimiser steps."""
        return STRANDS * self.validation_windows / (FORWARD_PASSES_PER_STEP * self.windows_per_step)


def run_species_task(options: SpeciesProtocolOptions) -> str:
    """Train, evaluate along with the baselines, write all results, and return the table of accuracies.

    Raises:
        InputError: if an option, the recipe, a download or the model to start from is invalid.
        KeyboardInterrupt, SystemExit: as `TrainingRun.train`; the state is saved.
    """
    protocol = species_protocol(options.task)
    _check(options)
    recipe = load_task_recipe(SpeciesProtocolRecipe, options.recipe or protocol.name, options.changes)
    schedule = scaled_schedule(recipe, options.length, options.scale)
    with TrainingSession(replace(options, steps=schedule.steps), recipe, SequenceModelTask) as session:
        pretrained = load_start(options.start_from, options.changes)
        genomes = load_protocol_genomes(protocol, options.data)
        WindowSampler(genomes.train, options.length, options.seed)  # every species must have windows of this length
        depends_on = _depends_on(options, genomes, pretrained)
        if session.resume(depends_on, genome_files(genomes.train, depends_on["sequences"])):
            return (options.output / TABLE_NAME).read_text(encoding="utf-8")
        targets = TargetDescription("classes", (TARGET_COLUMN,), protocol.class_names)
        pooling = recipe.pooling(options.length)
        model = build_sequence_model(recipe, targets, pooling, True, options.seed, pretrained)
        origin = f"from {options.start_from}" if options.start_from else "from scratch"
        session.progress.note(
            f"{protocol.title}: {', '.join(protocol.class_names)}; {parameter_count(model):,} parameters, {origin}; "
            f"windows of {options.length:,} bp, {pooling} pooling; {schedule.describe()}"
        )
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
        session.train(task, ProtocolPlan(recipe, len(validation.tokens), schedule.windows_per_step))
        model.eval()
        text = evaluate_protocol(
            model,
            genomes,
            list(options.lengths)
            or sorted({*(size for size in protocol.lengths if size < options.length), options.length}),
            options.per_class,
            options.baselines,
            options.seed,
            options.output,
            session.progress,
        )
        details = {
            "task": protocol.name,
            "assemblies": {assembly.species: assembly.accession for assembly in protocol.assemblies},
            "training_length": options.length,
            "schedule": schedule.describe(),
            "scale": options.scale,
            "start_from": options.start_from,
        }
        session.publish(lambda folder, every: save_sequence_model(folder, model, every), details)
    return text


def _check(options: SpeciesProtocolOptions) -> None:
    if not (0 < options.scale <= 1 and math.isfinite(options.scale)):
        raise InputError(f"--scale is {options.scale}: use a share above 0 and at most 1 of the published steps.")
    if options.per_class < 1:
        raise InputError(f"--per-class is {options.per_class}: give 1 or more windows.")
    if options.lengths and min(options.lengths) < 1:
        raise InputError("--lengths needs lengths of 1 bp or more.")
    for name in options.baselines:
        if name not in BASELINE_NAMES:
            raise InputError(f"there is no baseline '{name}': give {', '.join(BASELINE_NAMES)} or none.")


def _validation(genomes: GenomeCollection, length: int, per_class: int) -> LabelledSequences:
    """Return windows of the validation chromosomes; none if a species has no window of this length."""
    chosen = evaluation_windows(genomes, length, per_class, EVALUATION_SEED)
    windows = () if chosen.missing_classes else chosen.windows
    labels = np.array([[window.label] for window in windows], dtype=np.float64).reshape(-1, 1)
    return LabelledSequences([window.tokens() for window in windows], labels)


def _depends_on(
    options: SpeciesProtocolOptions, genomes: ProtocolGenomes, pretrained: LanguageModel | None
) -> dict[str, Any]:
    """Return everything the result of a run depends on, keyed by names known to the user."""
    return {
        "task": options.task,
        "--length": options.length,
        "--scale": options.scale,
        "--from": None if pretrained is None else weights_checksum(pretrained.model),
        "sequences": sequences_by_class(genomes.train),
    }
