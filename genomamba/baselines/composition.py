"""The negative control: classification by GC content and the number of unknown bases alone."""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from genomamba.baselines.words import FIRST_BASE_TOKEN


class CompositionControl:
    """Logistic regression on the GC fraction of the known bases and the fraction of unknown bases (N, UNK)."""

    def __init__(self) -> None:
        self._classifier: Pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))

    def fit(self, windows: Sequence[np.ndarray], labels: np.ndarray) -> "CompositionControl":
        """Fit to windows, tokens uint8 (length,) each, and their classes, int (windows,)."""
        self._classifier.fit(composition_features(windows), labels)
        return self

    def predict_proba(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Return probabilities (windows, classes)."""
        return self._classifier.predict_proba(composition_features(windows))


def composition_features(windows: Sequence[np.ndarray]) -> np.ndarray:
    """Return GC fraction and unknown fraction, float64 (windows, 2); without known bases the GC fraction is 0."""
    features = np.zeros((len(windows), 2))
    for index, window in enumerate(windows):
        counts = np.bincount(window, minlength=FIRST_BASE_TOKEN + 4)[FIRST_BASE_TOKEN : FIRST_BASE_TOKEN + 4]
        known = counts.sum()
        features[index] = (counts[1] + counts[2]) / max(known, 1), 1 - known / max(len(window), 1)
    return features
