"""Standard metrics of predicted classes, binary labels and numbers, ignoring missing labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn import metrics

from genomamba.data.targets import TargetDescription, TargetKind, Targets
from mambacore.safe_text import table_line

FIGURES: Final[Mapping[TargetKind, tuple[str, ...]]] = {
    "classes": ("accuracy", "mcc", "auroc", "auprc", "f1"),
    "labels": ("accuracy", "mcc", "auroc", "auprc", "f1"),
    "numbers": ("pearson", "spearman", "r2"),
}
"""Metrics by kind. For classes, `auroc`, `auprc` and `f1` are means over the classes, each against all others; for two
classes they are those of the second. `mcc` is Matthews' correlation (Gorodkin 2004 for several classes)."""

ALL_COLUMNS: Final = "mean"
"""Name of the row that averages several columns."""

Predictions = npt.NDArray[np.float64]
"""(sequences, outputs): probabilities of classes or labels, or numbers in the units of the table."""


@dataclass(frozen=True)
class MetricsRow:
    """Metrics of one predictor on one column; NaN where undefined (rows of a single class)."""

    predictor: str
    target: str
    rows: int
    figures: dict[str, float]


def measure(
    predictor: str, description: TargetDescription, targets: Targets, predictions: Predictions
) -> list[MetricsRow]:
    """Compute the metrics of each column, and their mean if there are several.

    Args:
        predictor: name of the predictor in the table.
        description: description of the targets.
        targets: (rows, columns), NaN where missing.
        predictions: (rows, outputs).
    """
    rows: list[MetricsRow] = []
    for which, name in enumerate(description.columns):
        known = ~np.isnan(targets[:, which])
        truth = targets[known, which]
        if description.kind == "classes":
            figures = _of_classes(truth.astype(np.int64), predictions[known])
        elif description.kind == "labels":
            figures = _of_label(truth.astype(np.int64), predictions[known, which])
        else:
            figures = _of_numbers(truth, predictions[known, which])
        rows.append(MetricsRow(predictor, name, int(known.sum()), figures))
    if len(rows) > 1:
        means = {name: float(np.mean([row.figures[name] for row in rows])) for name in FIGURES[description.kind]}
        rows.append(MetricsRow(predictor, ALL_COLUMNS, max(row.rows for row in rows), means))
    return rows


def metrics_table(kind: TargetKind, rows: Sequence[MetricsRow]) -> str:
    """Return tab-separated text with a header; four decimals, NA where undefined."""
    lines = [table_line(["predictor", "target", "rows", *FIGURES[kind]])]
    for row in rows:
        figures = [row.figures[name] for name in FIGURES[kind]]
        shown = ["NA" if math.isnan(value) else f"{value:.4f}" for value in figures]
        lines.append(table_line([row.predictor, row.target, str(row.rows), *shown]))
    return "\n".join(lines) + "\n"


def _of_classes(truth: npt.NDArray[np.int64], probabilities: Predictions) -> dict[str, float]:
    count = probabilities.shape[1]
    if count == 2:
        called = probabilities.argmax(axis=1)
        return _ranked(truth, probabilities[:, 1]) | _of_calls(truth, called)
    called = probabilities.argmax(axis=1)
    present = [number for number in range(count) if (truth == number).any()]
    each = [_ranked((truth == number).astype(np.int64), probabilities[:, number]) for number in present]
    means = {name: float(np.mean([one[name] for one in each])) if each else math.nan for name in ("auroc", "auprc")}
    return means | _of_calls(truth, called, average="macro")


def _of_label(truth: npt.NDArray[np.int64], probability: npt.NDArray[np.float64]) -> dict[str, float]:
    return _ranked(truth, probability) | _of_calls(truth, (probability >= 0.5).astype(np.int64))


def _of_calls(truth: npt.NDArray[np.int64], called: npt.NDArray[np.int64], average: str = "binary") -> dict[str, float]:
    if len(truth) == 0:
        return dict.fromkeys(("accuracy", "mcc", "f1"), math.nan)
    single = len(np.unique(truth)) < 2
    return {
        "accuracy": float(metrics.accuracy_score(truth, called)),
        "mcc": math.nan if single else float(metrics.matthews_corrcoef(truth, called)),
        "f1": math.nan if single else float(metrics.f1_score(truth, called, average=average, zero_division=0)),
    }


def _ranked(truth: npt.NDArray[np.int64], score: npt.NDArray[np.float64]) -> dict[str, float]:
    if len(np.unique(truth)) < 2:
        return {"auroc": math.nan, "auprc": math.nan}
    return {
        "auroc": float(metrics.roc_auc_score(truth, score)),
        "auprc": float(metrics.average_precision_score(truth, score)),
    }


def _of_numbers(truth: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> dict[str, float]:
    if len(truth) < 2 or np.ptp(truth) == 0:
        return dict.fromkeys(FIGURES["numbers"], math.nan)
    constant = np.ptp(predicted) == 0
    return {
        "pearson": math.nan if constant else float(stats.pearsonr(truth, predicted).statistic),
        "spearman": math.nan if constant else float(stats.spearmanr(truth, predicted).statistic),
        "r2": float(metrics.r2_score(truth, predicted)),
    }
