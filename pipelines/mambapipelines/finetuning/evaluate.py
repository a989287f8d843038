"""Metrics of a fine-tuned model and of a k-mer baseline on the test rows of a table."""

from __future__ import annotations

from pathlib import Path

from genomamba.baselines.kmer_regression import CONTROL_NAME, fit_kmer_control
from genomamba.models.sequence_model import SequenceModel
from genomamba.prediction.metrics import MetricsRow, measure, metrics_table
from genomamba.prediction.predict import model_outputs, predictions_from
from mambapipelines.files import write_whole
from mambapipelines.finetuning.predict import predictions_table
from mambapipelines.finetuning.table import EncodedTable
from mambapipelines.training.progress import TrainingProgress

MODEL_NAME = "genomamba"
METRICS_TABLE_NAME = "metrics.tsv"
PREDICTIONS_NAME = "test_predictions.tsv"


def evaluate_test_rows(
    model: SequenceModel, rows: EncodedTable, output: Path, balanced: bool, progress: TrainingProgress
) -> list[MetricsRow]:
    """Measure the model and the baseline on the test rows; writes the metrics and the predictions to `output`.

    Args:
        model: the model, in evaluation mode.
        rows: the table; the baseline is fitted to its training rows and chosen on its validation rows.
        output: folder for `metrics.tsv` and `test_predictions.tsv`.
        balanced: weight classes equally in the baseline's fit.
        progress: for messages about missing rows and the chosen baseline.

    Returns:
        The metrics; empty if there are no test rows.
    """
    sequences, targets = rows.part("test")
    if not sequences:
        progress.note("there are no test rows, so nothing is measured: give some in a column split")
        return []
    description = rows.description
    predictions = predictions_from(description, model_outputs(model, sequences))
    metrics = measure(MODEL_NAME, description, targets, predictions)
    baseline = fit_kmer_control(description, rows.part("train"), rows.part("valid"), balanced)
    progress.note(
        f"baseline: words of {baseline.word_length} bases, penalty {baseline.penalty:g}, chosen on validation"
    )
    metrics += measure(CONTROL_NAME, description, targets, baseline.predict(sequences))
    names = [rows.table.names[row] for row in rows.rows("test")]
    write_whole(output / METRICS_TABLE_NAME, metrics_table(description.kind, metrics))
    lengths = [len(tokens) for tokens in sequences]
    write_whole(output / PREDICTIONS_NAME, predictions_table(description, names, lengths, predictions))
    return metrics
