"""The figures of predictions, on cases whose answers are known."""

import math

import numpy as np
import torch

from genomamba.data.targets import TargetDescription
from genomamba.prediction.loss import SequenceLoss
from genomamba.prediction.metrics import measure, metrics_table

CLASSES = TargetDescription("classes", ("label",), ("a", "b", "c"))
LABELS = TargetDescription("labels", ("one", "two"))
NUMBERS = TargetDescription("numbers", ("value",), (), (10.0,), (2.0,))


def test_classes_labels_and_numbers_get_their_figures() -> None:
    targets = np.array([[0], [1], [2], [np.nan], [1]])
    predictions = np.eye(3)[[0, 1, 2, 0, 1]]
    (row,) = measure("model", CLASSES, targets, predictions)
    assert row.rows == 4
    assert set(row.figures.values()) == {1.0}
    targets = np.array([[1, 1], [0, np.nan], [1, 1], [0, 1]])
    first, second, mean = measure("model", LABELS, targets, np.array([[0.9, 0.9], [0.6, 0.1], [0.7, 0.4], [0.2, 0.6]]))
    assert first.figures["auroc"] == 1.0
    assert first.figures["accuracy"] == 0.75
    assert abs(first.figures["mcc"] - 1 / math.sqrt(3)) < 1e-12
    assert second.rows == 3
    assert math.isnan(second.figures["auroc"])  # one value only
    assert mean.target == "mean"
    (row,) = measure("model", NUMBERS, np.array([[1.0], [2], [3], [np.nan]]), np.array([[3.0], [5], [7], [0]]))
    assert abs(row.figures["pearson"] - 1) < 1e-12
    assert abs(row.figures["r2"] - (1 - (4 + 9 + 16) / 2)) < 1e-12
    assert metrics_table("labels", [second]).splitlines()[1].split("\t")[:4] == ["model", "two", "3", "0.6667"]


def test_missing_labels_do_not_count_and_balanced_classes_count_alike() -> None:
    outputs = torch.tensor([[2.0, 0, 0], [0, 1, 0], [5, 5, 5]])
    targets = torch.tensor([[0.0], [1], [math.nan]])
    plain = SequenceLoss(CLASSES).mean(outputs, targets)
    expected = torch.nn.functional.cross_entropy(outputs[:2], torch.tensor([0, 1]))
    assert torch.allclose(plain, expected)
    balanced = SequenceLoss.balanced(CLASSES, np.array([[0.0], [0], [0], [1], [2]]))
    weights = balanced.element_weights(torch.tensor([[0.0], [1], [2], [math.nan]]))
    assert torch.allclose(weights.squeeze(), torch.tensor([5 / 9, 5 / 3, 5 / 3, 0]))
    labels = SequenceLoss.balanced(LABELS, np.array([[1, 0], [0, 0], [0, np.nan], [0, 1]]))
    assert torch.allclose(labels.element_weights(torch.tensor([[1.0, math.nan]])), torch.tensor([[2.0, 0]]))
    numbers = SequenceLoss(NUMBERS).mean(torch.tensor([[1.0], [0]]), torch.tensor([[14.0], [math.nan]]))
    assert abs(float(numbers) - 1) < 1e-6
    nothing = SequenceLoss(NUMBERS).mean(torch.ones(1, 1), torch.tensor([[math.nan]]))
    assert float(nothing) == 0
