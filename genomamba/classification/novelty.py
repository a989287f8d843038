"""Out-of-distribution (OOD) detection: records that are predicted worse than held-out windows of the classes are.

Class probabilities only compare the classes with each other, and an OOD record may resemble one class far more than
another. The evidence per base of the best class, a mean log-likelihood in nats, measures how well that class predicts
the record. On its own it mostly reflects how predictable a record is for any model: OOD DNA with many repeats or low GC
would pass as in-distribution. The score of a record is therefore its log-likelihood ratio to a background model (Ren et
al. 2019, "Likelihood ratios for out-of-distribution detection", NeurIPS, equation 2), here a first-order Markov chain
fitted to the record itself. It measures what the model predicts beyond the record's own dinucleotide frequencies, which
are a genomic signature (Karlin & Burge 1995, Trends in Genetics 11:283).

The distribution of the score on held-out windows of several lengths is kept in the model folder, and a record's
*p-value* is the share of those windows that score as low: a conformal p-value (Bates et al. 2023, "Testing for outliers
with conformal p-values", Annals of Statistics 51:149, equation 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from genomamba.classification.held_out import FloatArray, HeldOutEvidence, IntegerArray
from genomamba.models.species_classifier import BASES, FIRST_BASE_TOKEN
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError

QUANTILE_COUNT = 101
KEY = "p_value_quantiles"
OLDER_KEY = "typicality_quantiles"
"""Key used in model folders written before the column was renamed."""
STACK: Final = "stack"
MARKOV: Final = "markov"
"""The parts whose likelihood can be used for the score."""


def pair_counts(tokens: Tokens, base_before: int | None = None) -> IntegerArray:
    """Count dinucleotides of A, C, G and T, (first, second); pairs with other letters are skipped.

    Args:
        tokens: (length,) token ids.
        base_before: the last token of the previous piece, if any.
    """
    if base_before is not None:
        tokens = np.concatenate([np.array([base_before], dtype=np.uint8), tokens])
    bases = tokens.astype(np.int64) - FIRST_BASE_TOKEN
    known = (bases >= 0) & (bases < BASES)
    pairs = (bases[:-1] * BASES + bases[1:])[known[:-1] & known[1:]]
    return np.bincount(pairs, minlength=BASES**2).reshape(BASES, BASES)


def own_likelihood(counts: npt.NDArray[np.integer]) -> float:
    """Return the mean log-likelihood, nats per base, of a record under the first-order Markov chain that fits it best.

    This is the negative conditional entropy of a base given its neighbour, averaged over both strands, so it is the
    same for a record and its reverse complement. Without any pair it is that of uniformly random bases.

    Args:
        counts: (first, second) of `pair_counts`.
    """
    total = counts.sum()
    if not total:
        return -float(np.log(BASES))

    def entropy(shares: FloatArray) -> float:
        return -float(np.sum(shares * np.log(np.maximum(shares, 1e-300))))

    shares = counts / total
    # On the other strand, the second base of a pair comes first.
    return (entropy(shares.sum(axis=1)) + entropy(shares.sum(axis=0))) / 2 - entropy(shares)


def count_scored_words(tokens: Tokens, longest_order: int, before: Tokens | None = None) -> int:
    """Count the words scored by the Markov models of orders 1 to the highest.

    Args:
        tokens: (length,) token ids; words that end here count.
        longest_order: highest order of the models.
        before: preceding tokens, if any; `longest_order` of them suffice.
    """
    context = 0 if before is None else min(longest_order, len(before))
    joined = tokens if not context or before is None else np.concatenate([before[-context:], tokens])
    bases = joined.astype(np.int64) - FIRST_BASE_TOKEN
    places = np.arange(len(joined))
    known_bases = places - np.maximum.accumulate(np.where((bases >= 0) & (bases < BASES), -1, places))
    return int(np.clip(known_bases[context:] - 1, 0, longest_order).sum())


def best_likelihood(evidence: FloatArray, share: FloatArray | float = 1.0) -> FloatArray:
    """Log-likelihood of the best class in nats: per known base of the stack, per word of the Markov models.

    Args:
        evidence: (..., classes) of either, per base.
        share: (...) known bases, or words scored (`count_scored_words`), per base.

    Returns:
        (...).
    """
    best = evidence.max(axis=-1) / np.maximum(share, 1e-9)
    # A record without two known bases side by side is as likely as bases at random.
    return np.where(np.asarray(share) > 0, best, -np.log(BASES))


@dataclass(frozen=True)
class LikelihoodQuantiles:
    """Quantiles of the scores of held-out windows of the classes.

    Attributes:
        lengths_bp: (lengths,) ascending.
        windows: (lengths,) number of windows behind the quantiles.
        quantiles: (lengths, 101) of `best_likelihood` minus `own_likelihood`, at 0, 1, ..., 100 %.
        basis: the parts whose likelihood is used: `stack` or `markov`.
    """

    lengths_bp: FloatArray
    windows: FloatArray
    quantiles: FloatArray
    basis: str = STACK

    @classmethod
    def of_windows(cls, evidence: HeldOutEvidence, longest_order: int = 0) -> LikelihoodQuantiles:
        """The quantiles of held-out windows, every class with the same weight as far as it has as many windows.

        Args:
            evidence: of the windows.
            longest_order: of the Markov models, the first of the counted parts; without any, the stack's likelihood
                is taken.
        """
        if longest_order and evidence.counted is not None:
            basis = MARKOV
            likelihood = best_likelihood(evidence.counted[:, :longest_order].sum(axis=1), evidence.scored_share)
        else:
            basis, likelihood = STACK, best_likelihood(evidence.mean_evidence)
        scores = likelihood - evidence.own_likelihood
        lengths = np.unique(evidence.lengths_bp)
        levels = np.linspace(0, 1, QUANTILE_COUNT)
        by_length = [scores[evidence.lengths_bp == length] for length in lengths]
        return cls(
            lengths.astype(np.float64),
            np.array([len(values) for values in by_length], dtype=np.float64),
            np.stack([np.quantile(values, levels) for values in by_length]),
            basis,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form for the model folder."""
        return {
            "lengths_bp": self.lengths_bp.tolist(),
            "windows": self.windows.tolist(),
            "quantiles": self.quantiles.tolist(),
            "basis": self.basis,
        }

    @classmethod
    def from_details(cls, details: Mapping[str, Any], rate: float) -> LikelihoodQuantiles:
        """Read the quantiles from a model folder's details.

        Raises:
            InputError: if there are none, or they are based on too few windows for the rate.
        """
        calibration = details.get("calibration") or {}
        content = calibration.get(KEY, calibration.get(OLDER_KEY))
        if content is None:
            raise InputError(
                "OOD detection needs the likelihoods of held-out windows, which this model folder lacks: train it "
                "again with --holdout, or leave out --unknown-rate and --ood."
            )
        try:
            lengths_bp, windows, levels = (
                np.array(content[key], dtype=np.float64) for key in ("lengths_bp", "windows", "quantiles")
            )
            quantiles = cls(lengths_bp, windows, levels, content.get("basis", STACK))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the model folder's {KEY} are damaged: train or copy it again.") from error
        shapes = quantiles.lengths_bp.shape, quantiles.windows.shape, quantiles.quantiles.shape
        count = quantiles.lengths_bp.size
        right = shapes == ((count,), (count,), (count, QUANTILE_COUNT)) and quantiles.basis in (STACK, MARKOV)
        if not count or not right:
            raise InputError(f"the model folder's {KEY} are damaged: train or copy it again.")
        most = float(quantiles.windows.max())
        if rate <= 1 / (most + 1):
            raise InputError(
                f"a rate of {rate:g} (--unknown-rate) is too small for the {most:.0f} held-out windows of a length "
                f"that the model was calibrated on: give more than {1 / (most + 1):.4f}."
            )
        # Among fewer windows no p-value is as small as the rate: such long records are held against shorter windows.
        enough = rate * (quantiles.windows + 1) > 1
        return cls(lengths_bp[enough], windows[enough], levels[enough], quantiles.basis)

    def p_value(self, score: float, length_bp: int) -> float:
        """Return the share of held-out windows of this length with a score as low as a record's, counting the record.

        Between two lengths the quantiles are interpolated in the logarithm of the length. Of shorter records the
        spread around the median grows as the mean of independent bases' would, with the root of the length; longer
        ones are compared with the longest windows.
        """
        logarithms, place = np.log(self.lengths_bp), float(np.log(max(1, length_bp)))
        upper = int(np.clip(np.searchsorted(logarithms, place), 0, len(logarithms) - 1))
        lower = max(0, upper - 1)
        span = float(logarithms[upper] - logarithms[lower])
        share = float(np.clip((place - logarithms[lower]) / span, 0, 1)) if span else 0.0
        quantiles = (1 - share) * self.quantiles[lower] + share * self.quantiles[upper]
        windows = (1 - share) * self.windows[lower] + share * self.windows[upper]
        if place < logarithms[0]:
            median = quantiles[QUANTILE_COUNT // 2]
            quantiles = median + (quantiles - median) * float(np.sqrt(self.lengths_bp[0] / max(1, length_bp)))
        below = float(np.interp(score, quantiles, np.linspace(0, 1, QUANTILE_COUNT), left=0.0, right=1.0))
        return (1 + below * windows) / (1 + windows)
