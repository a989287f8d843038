"""The baseline for fine-tuned models: canonical k-mer spectra with logistic or ridge regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from genomamba.baselines.kmer_classifier import kmer_spectra
from genomamba.data.targets import TargetDescription, Targets
from genomamba.prediction.metrics import Predictions
from genomamba.tokenizer import Tokens

WORD_LENGTHS: Final = (3, 4, 5, 6)
PENALTIES: Final = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)
"""Strengths of the L2 penalty; for logistic regression the inverse of scikit-learn's `C`."""
CONTROL_NAME: Final = "kmer"


@dataclass
class KmerControl:
    """Fitted regressions on canonical k-mer spectra, one per column.

    Attributes:
        description: the prediction target.
        word_length, penalty: the best settings on the validation rows.
    """

    description: TargetDescription
    word_length: int
    penalty: float
    models: list[Any] = field(default_factory=list)

    def predict(self, tokens: Sequence[Tokens]) -> Predictions:
        """Predict probabilities or numbers, (sequences, outputs)."""
        return _predict(self.models, self.description, kmer_spectra(tokens, self.word_length))


def fit_kmer_control(
    description: TargetDescription,
    training: tuple[Sequence[Tokens], Targets],
    validation: tuple[Sequence[Tokens], Targets],
    balanced: bool = False,
) -> KmerControl:
    """Choose k and the penalty on the validation rows, by likelihood or squared error; fit to the training rows.

    Args:
        description: the prediction target.
        training, validation: sequences and targets (rows, columns), NaN where missing.
        balanced: give every class or label the same weight, as in the model it is compared with.
    """
    best: KmerControl | None = None
    best_loss = math.inf
    for word_length in WORD_LENGTHS:
        spectra, seen = kmer_spectra(training[0], word_length), kmer_spectra(validation[0], word_length)
        for penalty in PENALTIES:
            models = [
                _fit(description, spectra, training[1][:, which], penalty, balanced)
                for which in range(len(description.columns))
            ]
            loss = _loss(description, validation[1], _predict(models, description, seen))
            if best is None or loss < best_loss:
                best, best_loss = KmerControl(description, word_length, penalty, models), loss
    assert best is not None  # there are word lengths
    return best


def _fit(
    description: TargetDescription,
    spectra: npt.NDArray[np.float32],
    targets: npt.NDArray[np.float64],
    penalty: float,
    balanced: bool,
) -> Any:
    known = ~np.isnan(targets)
    if description.kind == "numbers":
        return make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(spectra[known], targets[known])
    regression = LogisticRegression(
        C=1 / penalty, max_iter=300, tol=1e-3, class_weight="balanced" if balanced else None
    )
    return make_pipeline(StandardScaler(), regression).fit(spectra[known], targets[known].astype(np.int64))


def _predict(models: Sequence[Any], description: TargetDescription, spectra: npt.NDArray[np.float32]) -> Predictions:
    if description.kind == "classes":
        # Every class has training rows, so that the columns are the classes.
        return models[0].predict_proba(spectra)
    if description.kind == "labels":
        return np.stack([model.predict_proba(spectra)[:, 1] for model in models], axis=1)
    return np.stack([model.predict(spectra) for model in models], axis=1)


def _loss(description: TargetDescription, targets: Targets, predictions: Predictions) -> float:
    """Return the mean negative log-likelihood, or the mean squared error in units of the training targets' variance."""
    if description.kind == "classes":
        known = ~np.isnan(targets[:, 0])
        chosen = predictions[known, targets[known, 0].astype(np.int64)]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean()) if known.any() else math.inf
    known = ~np.isnan(targets)
    if not known.any():
        return math.inf
    if description.kind == "labels":
        chosen = np.where(targets == 1, predictions, 1 - predictions)[known]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())
    errors = (predictions - targets) / np.array(description.deviations)
    return float((errors[known] ** 2).mean())
