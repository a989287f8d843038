"""Accuracy by length of the model and the baselines on the test chromosomes of a published species task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from genomamba.classification.held_out import FloatArray
from genomamba.data.assembly_genomes import ProtocolGenomes
from genomamba.data.genomes import GenomeCollection, SequenceStore
from genomamba.models.sequence_model import SequenceModel
from genomamba.prediction.predict import model_outputs, predictions_from
from genomamba.tokenizer import Tokens
from mambapipelines.files import write_whole
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
from mambapipelines.training.progress import TrainingProgress

EVALUATION_SEED: Final = 0
"""Seed of the validation and test windows, whatever the seed of the training."""
BASELINE_BASES_PER_CLASS: Final = 1 << 28
"""Maximum number of bases of each species for fitting the baselines, an equal share from the middle of each chromosome:
their accuracy does not improve beyond, and whole genomes of five mammals would take 15 GB of memory."""


def evaluate_protocol(
    model: SequenceModel,
    genomes: ProtocolGenomes,
    lengths: Sequence[int],
    per_class: int,
    baselines: Sequence[str],
    seed: int,
    output: Path,
    progress: TrainingProgress,
) -> str:
    """Measure the model and the baselines on the test chromosomes, and write the table to the output folder.

    Args:
        model: the model, in evaluation mode.
        genomes: training chromosomes for fitting the baselines, and test chromosomes for the evaluation.
        lengths: lengths of the test windows, bp.
        per_class: maximum number of test windows per species and length.
        baselines: names of the baselines.
        seed: seed of the baselines' fit.
        output: folder for the table and the settings of the baselines.
        progress: for messages.

    Returns:
        The table as text.
    """
    classifiers: dict[str, Scores] = {MODEL_NAME: model_scores(model)}
    if baselines:
        progress.note(f"fitting the baselines {', '.join(baselines)}")
        fitted = fit_named_baselines(excerpts(genomes.train, BASELINE_BASES_PER_CLASS), lengths, seed, baselines)
        for name in fitted.names:
            classifiers[name] = lambda windows, length, name=name: (fitted.predict(name, windows, length), None)  # type: ignore[misc]
        write_whole(output / CHOICES_NAME, json.dumps(fitted.describe(), indent=2) + "\n")
    rows = accuracy_by_length(classifiers, genomes.test, lengths, per_class=per_class, seed=EVALUATION_SEED)
    text = table_text(rows)
    write_whole(output / TABLE_NAME, text)
    return text


def model_scores(model: SequenceModel) -> Scores:
    """Adapt the model for `accuracy_by_length`."""

    def scores(windows: Sequence[Tokens], length: int) -> tuple[Labels, FloatArray | None]:
        probabilities = predictions_from(model.config.targets, model_outputs(model, windows))
        return probabilities.argmax(axis=1).astype(np.int64), probabilities

    return scores


@dataclass(frozen=True)
class _Excerpt:
    """A view of a store from `offset` on."""

    store: SequenceStore
    offset: int

    def fetch(self, name: str, start: int, end: int) -> Tokens:
        return self.store.fetch(name, self.offset + start, self.offset + end)


def excerpts(genomes: GenomeCollection, bases_per_class: int) -> GenomeCollection:
    """Return the middle of every chromosome, at most `bases_per_class` bases per class."""
    chosen = []
    for class_name in genomes.class_names:
        sequences = genomes.sequences_of(class_name)
        share = bases_per_class // len(sequences)
        for sequence in sequences:
            length = min(sequence.length, share)
            offset = (sequence.length - length) // 2
            chosen.append(replace(sequence, length=length, store=_Excerpt(sequence.store, offset)))
    return GenomeCollection(genomes.class_names, tuple(chosen))
