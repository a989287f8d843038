"""Fine-tuning on a table of sequences: from the table to a model folder, with metrics of the model and a baseline.

Layout of an output folder: the model (`config.json`, `model.safetensors`, `README.md`), `metrics.tsv` and
`test_predictions.tsv` of the test rows, and `training/`, the state of the run.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from genomamba.io.tables import repeated_in_training
from genomamba.models.language_model import LanguageModel
from genomamba.models.sequence_model import SequenceModel, save_sequence_model
from genomamba.models.transfer import weights_checksum
from genomamba.prediction.loss import SequenceLoss
from genomamba.prediction.metrics import MetricsRow
from mambacore.errors import InputError
from mambapipelines.finetuning.evaluate import evaluate_test_rows
from mambapipelines.finetuning.recipe import SequenceRecipe, build_sequence_model, load_start
from mambapipelines.finetuning.table import AUTOMATIC_KIND, EncodedTable, read_encoded_table
from mambapipelines.finetuning.task import SequenceModelTask, TableTask
from mambapipelines.training.plan import FORWARD_PASSES_PER_STEP, STRANDS, RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.session import TrainingSession, parameter_count
from mambapipelines.training.state import RunFolder


@dataclass(frozen=True)
class FinetuningOptions:
    """Options of `genomamba finetune`.

    Attributes:
        table: a table (`genomamba.io.tables`), or a folder of classes.
        output: the folder that becomes the model folder.
        labels: label columns; empty for all without another meaning.
        kind: `classes`, `labels`, `numbers`, or `auto`.
        fasta, reference: FASTA files with the table's records or intervals.
        start_from: a language model (folder or `hf://...`); `None` starts from random weights of the recipe's shape.
        pooling: `mean` or `last`.
        both_strands: whether to average over both strands.
        balanced: whether to weight classes equally.
        epochs: number of passes over the training rows, instead of `minutes` or `steps`.
        minutes, steps, seed, resume, threads, device, precision, strategy, deterministic: as in
            `mambapipelines.training.options.RunOptions`.
        recipe: name of a recipe of the package, or path of a YAML file.
        changes: values that replace the recipe's, each written `section.key=value`.
        length: not an option, as sequences have given lengths.
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
    device: str = "auto"
    precision: str | None = None
    strategy: str = "single"
    deterministic: bool = False
    length: int = 1


@dataclass(frozen=True)
class FinetuningResult:
    """Result of a finished run: its folder, the number of steps, and the metrics of the test rows."""

    folder: Path
    steps: int
    metrics: list[MetricsRow]
    already_finished: bool = False


@dataclass(frozen=True)
class FinetuningPlan(RunPlan):
    """The plan of fine-tuning; the cost of a validation is proportional to its bases."""

    recipe: SequenceRecipe
    bases_per_step: float
    validation_bases: int

    @property
    def validation_steps(self) -> float:
        """Return the cost of one validation in optimiser steps."""
        return STRANDS * self.validation_bases / (FORWARD_PASSES_PER_STEP * self.bases_per_step)


def finetune(options: FinetuningOptions) -> FinetuningResult:
    """Fine-tune, keep the state of the best validation, measure on the test rows and write the model folder.

    Raises:
        InputError: if an option, the recipe, the table or the model to start from is invalid.
        KeyboardInterrupt, SystemExit: as `TrainingRun.train`; the state is saved.
    """
    recipe = _checked_recipe(options)
    with TrainingSession(options, recipe, SequenceModelTask) as session:
        pretrained = load_start(options.start_from, options.changes)
        rows = read_encoded_table(
            options.table, options.labels, options.kind, options.seed, options.fasta, options.reference
        )
        training, validation = rows.part("train"), rows.part("valid")
        rows_per_step = recipe.batch.windows_per_step(round(statistics.median(map(len, training.tokens))))
        if options.epochs is not None:
            steps = max(1, math.ceil(options.epochs * len(training.tokens) / rows_per_step))
            session.options = replace(options, epochs=None, steps=steps)
        if session.resume(_depends_on(options, rows, pretrained), rows.checksums()):
            assert session.state is not None
            return FinetuningResult(options.output, session.state.step, [], already_finished=True)
        model = build_sequence_model(
            recipe, rows.description, options.pooling, options.both_strands, options.seed, pretrained
        )
        _introduce(session.progress, options, rows, model, rows_per_step)
        loss = SequenceLoss(rows.description)
        if options.balanced:
            loss = SequenceLoss.balanced(rows.description, training.targets)
        task = TableTask(model, loss, recipe.batch, validation, training, rows_per_step, options.seed)
        bases_per_step = rows_per_step * statistics.fmean(map(len, training.tokens))
        plan = FinetuningPlan(recipe, bases_per_step, sum(map(len, validation.tokens)))
        steps = session.train(task, plan).steps
        best_step = keep_best_state(model, session.folder)
        model.eval()
        metrics = evaluate_test_rows(model, rows, options.output, options.balanced, session.progress)
        details = {
            "start_from": options.start_from,
            "table": options.table,
            "rows": dict(Counter(rows.splits)),
            "balanced": options.balanced,
            "best_step": best_step,
            "test": [
                {"predictor": row.predictor, "target": row.target, **_without_nan(row.figures)} for row in metrics
            ],
        }
        session.publish(lambda folder, every: save_sequence_model(folder, model, every), details)
        return FinetuningResult(options.output, steps, metrics)


def keep_best_state(model: SequenceModel, folder: RunFolder) -> int | None:
    """Load the weights of the best validation, if they were kept, and return their step."""
    best_step = folder.load().history.best_step
    if best_step is None or not folder.keep_best:
        return None
    best = folder.load(best_step)
    model.load_state_dict(best.weights | best.average)
    return best_step


def _checked_recipe(options: FinetuningOptions) -> SequenceRecipe:
    """The recipe.

    Raises:
        InputError: if it is not suitable for a table, or the length of the run is given twice.
    """
    if options.epochs is not None and (options.minutes is not None or options.steps is not None):
        raise InputError("--epochs is given along with --minutes or --steps: remove one of them.")
    if options.epochs is not None and not options.epochs > 0:
        raise InputError(f"--epochs is {options.epochs}: use a positive number.")
    recipe = load_task_recipe(SequenceRecipe, options.recipe, options.changes)
    if recipe.length.warmup_steps_per_stage:
        raise InputError(
            "length.warmup_steps_per_stage in the recipe is for windows, and the rows of a table have the lengths they "
            "have: set it to 0."
        )
    return recipe


def _depends_on(options: FinetuningOptions, rows: EncodedTable, pretrained: LanguageModel | None) -> dict[str, Any]:
    """Return everything the result of a run depends on, keyed by names known to the user."""
    return {
        "--table": rows.checksum(),
        "--kind": rows.description.kind,
        "--label": list(rows.description.columns),
        "--from": None if pretrained is None else weights_checksum(pretrained.model),
        "--pooling": options.pooling,
        "both strands": options.both_strands,
        "--balanced": options.balanced,
    }


def _introduce(
    progress: TrainingProgress,
    options: FinetuningOptions,
    rows: EncodedTable,
    model: SequenceModel,
    rows_per_step: int,
) -> None:
    """Report what is to be trained, missing labels, and class imbalance."""
    description, counts = rows.description, Counter(rows.splits)
    origin = f"from {options.start_from}" if options.start_from else "from scratch"
    progress.note(
        f"{description.kind}: {', '.join(description.columns)}; {parameter_count(model):,} parameters, {origin}; "
        f"{', '.join(f'{counts[split]} {split}' for split in ('train', 'valid', 'test'))} rows, {rows_per_step} a step"
    )
    missing = int(np.isnan(rows.targets).sum())
    if missing:
        progress.note(f"{missing} labels are missing and are ignored in training and in the metrics")
    repeated = repeated_in_training(rows.table, rows.splits)
    if repeated:
        progress.note(
            f"{repeated} validation or test sequences also occur in training: their metrics are too optimistic"
        )
    _introduce_balance(progress, options, rows)


def _introduce_balance(progress: TrainingProgress, options: FinetuningOptions, rows: EncodedTable) -> None:
    """Report the frequencies of classes or labels among the training rows."""
    description, targets = rows.description, rows.part("train").targets
    if description.kind == "classes":
        counts = np.bincount(targets[~np.isnan(targets)].astype(np.int64), minlength=len(description.class_names))
        shown = ", ".join(f"{name} {count}" for name, count in zip(description.class_names, counts, strict=True))
    elif description.kind == "labels":
        shares = np.nanmean(targets, axis=0)
        shown = ", ".join(f"{name} {share:.1%}" for name, share in zip(description.columns, shares, strict=True))
    else:
        return
    weighting = "weighted equally" if options.balanced else "not weighted; --balanced weights classes equally"
    progress.note(f"training rows: {shown}; {weighting}")


def _without_nan(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in figures.items()}
