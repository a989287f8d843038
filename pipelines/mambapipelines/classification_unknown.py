"""Records of none of the classes: their bases are foretold worse than those of held-out windows of the classes.

A probability compares the classes with each other, and something foreign may be far more like one than like the other.
The evidence per base of the best class says how well that class foretells the record at all: it is a mean
log-likelihood in nats. Its distribution on held-out windows of several lengths is kept in the model folder, and a
record's *typicality* is the share of those windows that are as unlikely as it: a conformal p-value (Bates et al. 2023,
"Testing for outliers with conformal p-values", Annals of Statistics 51:149, equation 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mambacore.errors import InputError
from mambapipelines.calibration import FloatArray, HeldOutEvidence

QUANTILE_COUNT = 101
KEY = "likelihood_quantiles"


def best_likelihood(evidence: FloatArray, known_share: FloatArray | float = 1.0) -> FloatArray:
    """Evidence of the best class, nats per known base, (windows,) of (windows, classes) and (windows,)."""
    return np.asarray(evidence.max(axis=-1) / np.maximum(known_share, 1e-9))


@dataclass(frozen=True)
class LikelihoodQuantiles:
    """How likely held-out windows of the classes are.

    Attributes:
        lengths_bp: (lengths,) ascending.
        windows: (lengths,) how many windows the quantiles are of.
        quantiles: (lengths, 101) of the best class's evidence per base, at 0, 1, ..., 100 %.
    """

    lengths_bp: FloatArray
    windows: FloatArray
    quantiles: FloatArray

    @classmethod
    def of_windows(cls, evidence: HeldOutEvidence) -> LikelihoodQuantiles:
        """The quantiles of held-out windows, every class with the same weight as far as it has as many windows."""
        scores = best_likelihood(evidence.mean_evidence)
        lengths = np.unique(evidence.lengths_bp)
        levels = np.linspace(0, 1, QUANTILE_COUNT)
        by_length = [scores[evidence.lengths_bp == length] for length in lengths]
        return cls(
            lengths.astype(np.float64),
            np.array([len(values) for values in by_length], dtype=np.float64),
            np.stack([np.quantile(values, levels) for values in by_length]),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for the model folder."""
        return {
            "lengths_bp": self.lengths_bp.tolist(),
            "windows": self.windows.tolist(),
            "quantiles": self.quantiles.tolist(),
        }

    @classmethod
    def from_details(cls, details: Mapping[str, Any], rate: float) -> LikelihoodQuantiles:
        """The quantiles in a model folder's details.

        Raises:
            InputError: there are none, or they are of too few windows for the rate.
        """
        content = (details.get("calibration") or {}).get(KEY)
        if content is None:
            raise InputError(
                "--unknown-rate needs to know how likely held-out windows are, which this model folder does not say: "
                "train it again with --holdout, or use --unknown-below."
            )
        try:
            quantiles = cls(*(np.array(content[key], dtype=np.float64) for key in cls.__dataclass_fields__))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the model folder's {KEY} are damaged: train or copy it again.") from error
        shapes = quantiles.lengths_bp.shape, quantiles.windows.shape, quantiles.quantiles.shape
        count = quantiles.lengths_bp.size
        if not count or shapes != ((count,), (count,), (count, QUANTILE_COUNT)):
            raise InputError(f"the model folder's {KEY} are damaged: train or copy it again.")
        most = float(quantiles.windows.max())
        if rate <= 1 / (most + 1):
            raise InputError(
                f"--unknown-rate {rate:g} is too small for the {most:.0f} held-out windows of a length that the model "
                f"was calibrated on: give more than {1 / (most + 1):.4f}."
            )
        return quantiles

    def typicality(self, score: float, length_bp: int) -> float:
        """Share of held-out windows of this length that are as unlikely as a record, counting the record itself.

        Between two lengths the quantiles are interpolated in the logarithm of the length. Of shorter records the
        spread around the median grows as the mean of independent bases' would, with the root of the length; longer
        ones are held against the longest windows.
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
