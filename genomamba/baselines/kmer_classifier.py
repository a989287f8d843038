"""The k-mer baseline: canonical k-mer frequencies and logistic regression."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from genomamba.baselines.words import reverse_complement_codes, word_counts


class KmerBaseline:
    """Frequencies of k-mers, each counted with its reverse complement -> standardised -> logistic regression.

    Args:
        word_length: k, bases.
        regularisation: Inverse strength of the L2 penalty, scikit-learn's `C`.
    """

    def __init__(self, word_length: int, regularisation: float = 0.01) -> None:
        self.word_length = word_length
        self.regularisation = regularisation
        self._classifier: Pipeline = make_pipeline(
            StandardScaler(), LogisticRegression(C=regularisation, max_iter=300, tol=1e-3)
        )

    def spectra(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Return canonical k-mer frequencies, float32 (windows, canonical k-mers); rows without k-mers are 0.

        Args:
            windows: Tokens, uint8 (length,) each; k-mers with N are skipped.
        """
        return kmer_spectra(windows, self.word_length)

    def fit(self, windows: Sequence[np.ndarray], labels: np.ndarray) -> "KmerBaseline":
        """Fit to windows and their classes, int (windows,)."""
        return self.fit_spectra(self.spectra(windows), labels)

    def fit_spectra(self, spectra: np.ndarray, labels: np.ndarray) -> "KmerBaseline":
        """Fit to spectra from `spectra`, to reuse them for several regularisations."""
        self._classifier.fit(spectra, labels)
        return self

    def predict_proba(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Return probabilities (windows, classes)."""
        return self.predict_proba_spectra(self.spectra(windows))

    def predict_proba_spectra(self, spectra: np.ndarray) -> np.ndarray:
        """Return probabilities (windows, classes) for spectra from `spectra`."""
        return self._classifier.predict_proba(spectra)


def kmer_spectra(windows: Sequence[np.ndarray], word_length: int) -> np.ndarray:
    """Return canonical k-mer frequencies; see `KmerBaseline.spectra`."""
    feature_of_word, feature_count = _canonical_features(word_length)
    spectra = np.zeros((len(windows), feature_count), dtype=np.float32)
    for index, window in enumerate(windows):
        counts = np.bincount(feature_of_word, weights=word_counts(window, word_length), minlength=feature_count)
        spectra[index] = counts / max(counts.sum(), 1.0)
    return spectra


@cache
def _canonical_features(word_length: int) -> tuple[np.ndarray, int]:
    """Return each word's feature index, shared with its reverse complement, and the number of features."""
    complements = reverse_complement_codes(word_length)
    canonical = np.minimum(complements, np.arange(len(complements)))
    words, feature_of_word = np.unique(canonical, return_inverse=True)
    return feature_of_word, len(words)
