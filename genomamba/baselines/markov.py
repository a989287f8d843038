"""The Markov baseline: one interpolated Markov model per class, and the likelihood of a window under each."""

from collections.abc import Sequence

import numpy as np
from scipy.special import softmax

from genomamba.baselines.words import reverse_complement_codes, word_codes, word_counts
from mambacore.errors import InputError

MAXIMUM_ORDER = 10
SCORED_BASES_AT_A_TIME = 2**15


class MarkovBaseline:
    """One order-k Markov model per class, interpolated Witten-Bell, counted on both strands.

    The probability of base b after context c is (Witten and Bell 1991, IEEE Trans. Inf. Theory 37:1085, method C;
    interpolated as in Chen and Goodman 1999, Comput. Speech Lang. 13:359)

        P(b | c) = (n(c b) + t(c) P(b | c')) / (n(c) + t(c))

    with n the counts, t(c) the number of distinct bases that follow c, and c' the context without its oldest base;
    below order 0 it is 1/4.

    Args:
        order: k, bases of context, 0 to 10. Order 10 takes 16.8 MB per class.
    """

    def __init__(self, order: int) -> None:
        if not 0 <= order <= MAXIMUM_ORDER:
            raise InputError(
                f"a Markov model of order {order} is not supported: give an order from 0 to {MAXIMUM_ORDER}"
            )
        self.order = order
        self._scores = np.zeros((4 ** (order + 1), 0), dtype=np.float32)

    def fit(self, sequences_by_class: Sequence[Sequence[np.ndarray]]) -> "MarkovBaseline":
        """Count the sequences of each class; tokens, uint8 (length,) each."""
        return self.fit_counts([strand_symmetric_counts(sequences, self.order + 1) for sequences in sequences_by_class])

    def fit_counts(self, counts_by_class: Sequence[np.ndarray]) -> "MarkovBaseline":
        """Fit to `strand_symmetric_counts` of each class for words of order + 1 bases or longer.

        Counts of longer words are summed over their oldest bases, so one table of counts serves every order.
        """
        complements = reverse_complement_codes(self.order + 1)
        by_class = []
        for counts in counts_by_class:
            log_probabilities = _interpolated_log_probabilities(counts, self.order)
            # Averaging the log-probabilities of each word and of its reverse complement gives one table that scores a
            # window on both strands at once.
            by_class.append((log_probabilities + log_probabilities[complements]) / 2)
        self._scores = np.stack(by_class, axis=1)
        return self

    def log_likelihoods(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Return log-likelihoods (windows, classes) in nats, the mean of both strands.

        Only bases after a complete context of known bases (on that strand) count, so a window shorter than order + 1
        bases scores 0 for every class.
        """
        scores = np.zeros((len(windows), self._scores.shape[1]))
        for index, window in enumerate(windows):
            for start in range(0, max(len(window) - self.order, 0), SCORED_BASES_AT_A_TIME):
                codes = word_codes(window[start : start + SCORED_BASES_AT_A_TIME + self.order], self.order + 1)
                # The product with ones is a sum over the positions, several times faster than .sum(axis=0).
                scores[index] += np.ones(len(codes)) @ self._scores.take(codes, axis=0).astype(np.float64)
        return scores

    def predict_proba(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Return probabilities (windows, classes) under a uniform prior.

        They are not calibrated: bases are treated as independent evidence, which makes long windows overconfident.
        """
        return softmax(self.log_likelihoods(windows), axis=1)


def strand_symmetric_counts(sequences: Sequence[np.ndarray], word_length: int) -> np.ndarray:
    """Count each word on both strands of all sequences, int64 (4**word_length,)."""
    complements = reverse_complement_codes(word_length)
    counts = np.zeros(4**word_length, dtype=np.int64)
    for tokens in sequences:
        counts += word_counts(tokens, word_length)
    return counts + counts[complements]


def _interpolated_log_probabilities(counts: np.ndarray, order: int) -> np.ndarray:
    """Return log P(last base | preceding bases) for each word of order + 1 bases, float32 (4**(order + 1),)."""
    probabilities = np.full((1, 4), 0.25)
    for context_length in range(order + 1):
        context_counts = counts.reshape(-1, 4**context_length, 4).sum(axis=0)
        followers = (context_counts > 0).sum(axis=1, keepdims=True)
        # A context without its oldest base is the context's number modulo 4**(context_length - 1).
        lower = np.tile(probabilities, (4, 1)) if context_length else probabilities
        totals = context_counts.sum(axis=1, keepdims=True) + followers
        interpolated = (context_counts + followers * lower) / np.maximum(totals, 1)
        probabilities = np.where(totals > 0, interpolated, lower)
    return np.log(probabilities, dtype=np.float64).astype(np.float32).ravel()
