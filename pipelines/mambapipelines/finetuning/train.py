"""Fine-tune a model on a table of sequences: from the table to a model folder and its figures beside the control's.

Layout of an output folder: the model (`config.json`, `model.safetensors`, `README.md`), `metrics.tsv` and
`test_predictions.tsv` of the test rows, and `training/`, the state of the run.
"""

from __future__ import annotations

import math
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genomamba.baselines.kmer_regression import CONTROL_NAME, fit_kmer_control
from genomamba.data.targets import (
    TargetDescription,
    Targets,
    checked_kind,
    describe_targets,
    encode_targets,
    guess_kind,
)
from genomamba.io.tables import (
    SequenceTable,
    assign_splits,
    read_class_folders,
    read_sequence_table,
    repeated_in_training,
)
from genomamba.models.language_model import LanguageModel
from genomamba.models.sequence_model import SequenceModel, save_sequence_model
from genomamba.models.transfer import weights_checksum
from genomamba.prediction.loss import SequenceLoss
from genomamba.prediction.metrics import MetricsRow, measure, metrics_table
from genomamba.prediction.predict import model_outputs, predictions_from
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambacore.model_folder import CONFIG_NAME
from mambapipelines.console import format_duration
from mambapipelines.files import write_whole
from mambapipelines.finetuning.predict import predictions_table
from mambapipelines.finetuning.recipe import SequenceRecipe, build_sequence_model, load_start
from mambapipelines.finetuning.task import SequenceModelTask, TableTask
from mambapipelines.training.options import check_options, planned_minutes
from mambapipelines.training.plan import FORWARD_PASSES_PER_STEP, STRANDS, RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.provenance import provenance
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.run import (
    TrainingRun,
    introduce_state,
    published_model,
    recorded_state,
    run_folder,
    thread_count,
)
from mambapipelines.training.state import RunFolder

MODEL_NAME = "genomamba"
METRICS_TABLE_NAME = "metrics.tsv"
PREDICTIONS_NAME = "test_predictions.tsv"
AUTOMATIC_KIND = "auto"


@dataclass(frozen=True)
class FinetuningOptions:
    """What `genomamba finetune` is asked to do.

    Attributes:
        table: a table (`genomamba.io.tables`), or a folder of classes.
        output: the folder that becomes the model folder.
        labels: columns of labels; empty takes all that have no other meaning.
        kind: `classes`, `labels`, `numbers`, or `auto`.
        fasta, reference: where the table's records, or its intervals, are.
        start_from: a language model (folder or `hf://...`); `None` starts from random weights of the recipe's shape.
        pooling: `mean` or `last`.
        both_strands: whether a sequence and its reverse complement are to get the same answer.
        balanced: whether rare classes count as much as frequent ones.
        epochs: times that every training row is seen, instead of `minutes` or `steps`.
        minutes, steps, recipe, changes, seed, resume, threads, strategy: as of `TrainingOptions`.
        length: not asked for; sequences have the lengths they have.
    """

    table: str
    output: Path
    labels: Sequence[str] = ()
    kind: str = AUTOMATIC_KIND
    fasta: str | None = None
    reference: str | None = None
    start_from: str | None = None
    pooling: str = "mean"
    both_strands: bool = True
    balanced: bool = False
    epochs: float | None = None
    minutes: float | None = None
    steps: int | None = None
    recipe: str = "small"
    changes: Sequence[str] = ()
    seed: int = 0
    resume: bool = False
    threads: int | None = None
    strategy: str = "single"
    length: int = 1


@dataclass(frozen=True)
class FinetuningResult:
    """What a finished run left behind: its folder, the steps taken, and the figures of the test rows."""

    folder: Path
    steps: int
    metrics: list[MetricsRow]
    already_finished: bool = False


@dataclass(frozen=True)
class Material:
    """A table that has been read, split and encoded."""

    table: SequenceTable
    splits: list[str]
    description: TargetDescription
    targets: Targets

    def part(self, split: str) -> tuple[list[Tokens], Targets]:
        """Sequences and targets of a split whose labels are not all missing."""
        rows = self.rows(split)
        return [self.table.tokens[row] for row in rows], self.targets[rows]

    def rows(self, split: str) -> list[int]:
        """Places of a split's rows that have a label."""
        labelled = np.any(~np.isnan(self.targets), axis=1)
        return [row for row, name in enumerate(self.splits) if name == split and labelled[row]]


@dataclass(frozen=True)
class FinetuningPlan(RunPlan):
    """The work of fine-tuning: a validation costs what its bases do beside those of a step."""

    recipe: SequenceRecipe
    bases_per_step: float
    validation_bases: int

    @property
    def validation_steps(self) -> float:
        """What one validation costs, in optimiser steps."""
        return STRANDS * self.validation_bases / (FORWARD_PASSES_PER_STEP * self.bases_per_step)


def finetune(options: FinetuningOptions) -> FinetuningResult:
    """Fine-tune, keep the state of the best validation, measure on the test rows and write the model folder.

    Raises:
        InputError: a mistake in the options, the recipe, the table or the model to start from.
        KeyboardInterrupt, SystemExit: stopped, state saved; as of `TrainingRun.train`.
    """
    start_seconds = time.monotonic()
    if options.epochs is not None and (options.minutes is not None or options.steps is not None):
        raise InputError("--epochs is given beside --minutes or --steps: leave one of them out.")
    if options.epochs is not None and not options.epochs > 0:
        raise InputError(f"--epochs is {options.epochs}: use a number greater than 0.")
    check_options(options)
    recipe = load_task_recipe(SequenceRecipe, options.recipe, options.changes)
    if recipe.length.warmup_steps_per_stage:
        raise InputError(
            "length.warmup_steps_per_stage in the recipe is for windows, and the rows of a table have the lengths they "
            "have: set it to 0."
        )
    folder = run_folder(options, SequenceModelTask, recipe)
    pretrained = load_start(options.start_from, options.changes)
    material = read_material(options)
    training = material.part("train")
    rows_per_step = recipe.batch.windows_per_step(round(statistics.median(map(len, training[0]))))
    if options.epochs is not None:
        steps = max(1, math.ceil(options.epochs * len(training[0]) / rows_per_step))
        options = _with_steps(options, steps)
    fingerprint = _fingerprint(options, recipe, material, pretrained)
    state = recorded_state(options, folder, fingerprint)
    with thread_count(options.threads), TrainingProgress() as progress:
        if state is not None and state.step >= state.schedule.total_steps and (options.output / CONFIG_NAME).is_file():
            progress.note(f"the run in {options.output} is finished: {state.step} steps, nothing left to do")
            return FinetuningResult(options.output, state.step, [], already_finished=True)
        model = build_sequence_model(
            recipe, material.description, options.pooling, options.both_strands, options.seed, pretrained
        )
        _introduce(progress, options, material, model, rows_per_step)
        introduce_state(progress, options, state)
        loss = SequenceLoss(material.description)
        if options.balanced:
            loss = SequenceLoss.balanced(material.description, training[1])
        validation = material.part("valid")
        task = TableTask(model, loss, recipe.batch, validation, training, rows_per_step, options.seed)
        bases_per_step = rows_per_step * statistics.fmean(map(len, training[0]))
        run = TrainingRun(
            options=options,
            recipe=recipe,
            folder=folder,
            task=task,
            plan=FinetuningPlan(recipe, bases_per_step, sum(map(len, validation[0]))),
            fingerprint=fingerprint,
            progress=progress,
            start_seconds=start_seconds,
        )
        steps = run.train(state).steps
        best_step = keep_best_state(model, folder)
        model.eval()
        rows = _measure_and_write(options, material, model, progress)
        details = {
            "recipe": recipe.to_dict(),
            "recipe_name": options.recipe,
            "start_from": options.start_from,
            "table": options.table,
            "rows": dict(Counter(material.splits)),
            "balanced": options.balanced,
            "steps": steps,
            "best_step": best_step,
            "seed": options.seed,
            "test": [{"predictor": row.predictor, "target": row.target, **_without_nan(row.figures)} for row in rows],
            "provenance": provenance(),
        }
        with published_model(options.output, folder) as temporary:
            save_sequence_model(temporary, model, details)
        progress.note(f"wrote {options.output} after {format_duration(time.monotonic() - start_seconds)}")
    return FinetuningResult(options.output, steps, rows)


def read_material(options: FinetuningOptions) -> Material:
    """Read, split and encode the table.

    Raises:
        InputError: see `genomamba.io.tables` and `genomamba.data.targets`.
    """
    if Path(options.table).is_dir():
        if options.labels or options.fasta or options.reference:
            raise InputError(f"{options.table} is a folder of classes: leave out --label, --fasta and --reference.")
        table = read_class_folders(Path(options.table))
    else:
        table = read_sequence_table(options.table, list(options.labels) or None, options.fasta, options.reference)
    kind = guess_kind(table) if options.kind == AUTOMATIC_KIND else checked_kind(options.kind)
    strata = next(iter(table.labels.values()), [None] * len(table)) if kind == "classes" else [None] * len(table)
    splits = assign_splits(table, strata, options.seed)
    description = describe_targets(table, splits, kind)
    return Material(table, splits, description, encode_targets(table, description))


def keep_best_state(model: SequenceModel, folder: RunFolder) -> int | None:
    """Give the model the weights of the best validation, if they were kept; which step that was."""
    best_step = folder.load().history.best_step
    if best_step is None or not folder.keep_best:
        return None
    best = folder.load(best_step)
    model.load_state_dict(best.weights | best.average)
    return best_step


def _measure_and_write(
    options: FinetuningOptions, material: Material, model: SequenceModel, progress: TrainingProgress
) -> list[MetricsRow]:
    """The figures of the test rows, of the model and of the control; both tables are written."""
    sequences, targets = material.part("test")
    if not sequences:
        progress.note("there are no test rows, so nothing is measured: give some in a column split")
        return []
    description = material.description
    predictions = predictions_from(description, model_outputs(model, sequences))
    rows = measure(MODEL_NAME, description, targets, predictions)
    control = fit_kmer_control(description, material.part("train"), material.part("valid"), options.balanced)
    progress.note(f"control: words of {control.word_length} bases, penalty {control.penalty:g}, chosen on validation")
    rows += measure(CONTROL_NAME, description, targets, control.predict(sequences))
    names = [material.table.names[row] for row in material.rows("test")]
    write_whole(options.output / METRICS_TABLE_NAME, metrics_table(description.kind, rows))
    lengths = [len(tokens) for tokens in sequences]
    write_whole(options.output / PREDICTIONS_NAME, predictions_table(description, names, lengths, predictions))
    return rows


def _fingerprint(
    options: FinetuningOptions, recipe: SequenceRecipe, material: Material, pretrained: LanguageModel | None
) -> dict[str, Any]:
    """What the numbers of a run depend on; the keys are what the user would call them."""
    checksum = 0
    for tokens, split in zip(material.table.tokens, material.splits, strict=True):
        checksum = zlib.crc32(split.encode(), zlib.crc32(tokens.tobytes(), checksum))
    return {
        "--table": f"{zlib.crc32(material.targets.tobytes(), checksum):08x}",
        "--kind": material.description.kind,
        "--label": list(material.description.columns),
        "--from": None if pretrained is None else weights_checksum(pretrained.model),
        "--pooling": options.pooling,
        "both strands": options.both_strands,
        "--balanced": options.balanced,
        "--seed": options.seed,
        "--steps": options.steps,
        "--minutes": planned_minutes(options, recipe),
        "recipe": _json_able(recipe.to_dict()),
    }


def _introduce(
    progress: TrainingProgress,
    options: FinetuningOptions,
    material: Material,
    model: SequenceModel,
    rows_per_step: int,
) -> None:
    """Say what is about to be trained, what is missing, and what is uneven."""
    description, counts = material.description, Counter(material.splits)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    origin = f"from {options.start_from}" if options.start_from else "from scratch"
    progress.note(
        f"{description.kind}: {', '.join(description.columns)}; {parameters:,} parameters, {origin}; "
        f"{', '.join(f'{counts[split]} {split}' for split in ('train', 'valid', 'test'))} rows, {rows_per_step} a step"
    )
    missing = int(np.isnan(material.targets).sum())
    if missing:
        progress.note(f"{missing} labels are missing: they count neither in training nor in the figures")
    repeated = repeated_in_training(material.table, material.splits)
    if repeated:
        progress.note(f"{repeated} validation or test sequences also occur in training: their figures are too good")
    _introduce_balance(progress, options, material)


def _introduce_balance(progress: TrainingProgress, options: FinetuningOptions, material: Material) -> None:
    """Say how frequent classes or labels are among the training rows."""
    description, targets = material.description, material.part("train")[1]
    if description.kind == "classes":
        counts = np.bincount(targets[~np.isnan(targets)].astype(np.int64), minlength=len(description.class_names))
        shown = ", ".join(f"{name} {count}" for name, count in zip(description.class_names, counts, strict=True))
    elif description.kind == "labels":
        shares = np.nanmean(targets, axis=0)
        shown = ", ".join(f"{name} {share:.1%}" for name, share in zip(description.columns, shares, strict=True))
    else:
        return
    weighing = "all weighed alike (--balanced)" if options.balanced else "not weighed; --balanced weighs them alike"
    progress.note(f"training rows: {shown}; {weighing}")


def _with_steps(options: FinetuningOptions, steps: int) -> FinetuningOptions:
    return FinetuningOptions(**{**vars(options), "epochs": None, "steps": steps})


def _without_nan(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def _json_able(values: Any) -> Any:
    """As the state of a run gives it back: lists for tuples."""
    if isinstance(values, dict):
        return {name: _json_able(value) for name, value in values.items()}
    return [_json_able(value) for value in values] if isinstance(values, list | tuple) else values
