"""Scores of generated clips, from a classifier's outputs, and rejection of clips by likelihood.

The scores are those of SaShiMi (Goel et al., arXiv 2202.09729, section 4.3 and appendix C.4). All sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mambacore.errors import InputError

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]

PAPER_BOTTOM_FRACTION: Final = 0.40
PAPER_TOP_FRACTION: Final = 0.05
"""Shares of the least and the most likely clips that the published code rejects, whatever its search finds."""

BOTTOM_FRACTIONS: Final = tuple(round(0.05 * number, 2) for number in range(13))  # 0 to 0.6
TOP_FRACTIONS: Final = tuple(round(0.05 * number, 2) for number in range(5))  # 0 to 0.2
REJECTIONS: Final = ("paper", "search")

# Probabilities that were rounded to 0 are replaced by the smallest normal number, so that all divergences are finite.
_SMALLEST_PROBABILITY = np.finfo(np.float64).tiny


class Interval(NamedTuple):
    """A score and its confidence interval over clips of the same source."""

    value: float
    low: float
    high: float


class FeatureSummary(NamedTuple):
    """Mean and covariance of a set of features, for Fréchet distances."""

    mean: FloatArray  # (features,)
    factor: FloatArray  # (min(clips, features), features): the covariance is factor^T factor


class Rejection(NamedTuple):
    """The outcome of a rejection.

    Attributes:
        kept: numbers of the kept clips, ascending; after a search, only from the half not used for it.
        bottom_fraction, top_fraction: shares of the least and the most likely clips that are rejected.
        lowest, highest: log-likelihoods between which a clip is kept, inclusive.
        tuned_on: numbers of the clips used to search the thresholds; empty without a search.
    """

    kept: IndexArray
    bottom_fraction: float
    top_fraction: float
    lowest: float
    highest: float
    tuned_on: IndexArray


def feature_summary(features: npt.ArrayLike) -> FeatureSummary:
    """Return mean and a factor of the covariance (with N - 1) of (clips, features) activations.

    Raises:
        InputError: if this is not a table of finite numbers, or has fewer than two clips.
    """
    table = _finite_table(features, "features")
    if table.shape[0] < 2:
        raise InputError(f"a covariance needs at least 2 clips but there is {table.shape[0]}; give more")
    mean = table.mean(axis=0)
    factor = np.linalg.qr((table - mean) / math.sqrt(table.shape[0] - 1)).R
    return FeatureSummary(mean, factor)


def frechet_distance(first: npt.ArrayLike | FeatureSummary, second: npt.ArrayLike | FeatureSummary) -> float:
    """Return the Fréchet distance of two sets of features, each fitted by a Gaussian (FID; arXiv 1706.08500, eq. 6).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

    With S1 = F^T F and S2 = G^T G the eigenvalues of S1 S2 are the squares of the singular values of F G^T, so the last
    trace is the sum of the singular values. This never takes the root of an eigenvalue that rounding made negative, and
    singular covariances (fewer clips than features) need no special treatment.

    Args:
        first, second: (clips, features), or the `feature_summary` of these.

    Raises:
        InputError: as `feature_summary`, or if the numbers of features differ.
    """
    one = first if isinstance(first, FeatureSummary) else feature_summary(first)
    other = second if isinstance(second, FeatureSummary) else feature_summary(second)
    _check_same_features(one.mean, other.mean)
    spread = np.square(one.factor).sum() + np.square(other.factor).sum()
    common = np.linalg.svd(one.factor @ other.factor.T, compute_uv=False).sum()
    distance = float(np.square(one.mean - other.mean).sum() + spread - 2 * common)
    return max(distance, 0.0)  # rounding gives -1e-15 for equal sets


def inception_score(probabilities: npt.ArrayLike, seed: int = 0, *, held_out: bool = True) -> float:
    """Return exp of the mean of KL(p_i || p) over clips (Salimans et al., arXiv 1606.03498).

    Args:
        probabilities: (clips, classes).
        seed: seed for choosing the halves.
        held_out: average p over a random half and the divergences over the other (SaShiMi's code); otherwise both
            over all clips, the common definition.

    Returns:
        A score from 1 to the number of classes, or slightly above with a held-out half.

    Raises:
        InputError: if the rows are not probabilities, or there are too few clips.
    """
    table = _probability_table(probabilities)
    if not held_out:
        return _inception_score(table, table)
    if table.shape[0] < 2:
        raise InputError("a held-out half needs at least 2 clips but there is 1; give more")
    order = np.random.default_rng(seed).permutation(table.shape[0])
    half = table.shape[0] // 2
    return _inception_score(table[order[half:]], table[order[:half]])


def modified_inception_score(probabilities: npt.ArrayLike) -> float:
    """Return exp of the mean of KL(p_i || p_j) over pairs of different clips (Gurumurthy et al., arXiv 1706.02071, 5).

    It also grows with the variety within a class. Published figures use random pairs, which estimate this mean over all
    ordered pairs; the sum over i and j of p_i log p_j is the product of two sums.

    Raises:
        InputError: if the rows are not probabilities, or there are fewer than two clips.
    """
    table = _probability_table(probabilities)
    count = table.shape[0]
    if count < 2:
        raise InputError("pairs need at least 2 clips but there is 1; give more")
    logarithms = np.log(np.maximum(table, _SMALLEST_PROBABILITY))
    own = float((table * logarithms).sum())
    crossed = float(table.sum(axis=0) @ logarithms.sum(axis=0)) - own
    return math.exp(min(own / count - crossed / (count * (count - 1)), 700.0))


def am_score(training_probabilities: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Return KL(mean of training || mean of generated) + mean entropy of the generated (arXiv 1703.02000, section 6).

    In nats, lower is better. Unlike the inception scores it takes the frequencies of the classes into account.

    Args:
        training_probabilities: (clips, classes) of the training clips.
        probabilities: (clips, classes) of the generated clips.

    Raises:
        InputError: if the rows are not probabilities, or the numbers of classes differ.
    """
    training, generated = _probability_table(training_probabilities), _probability_table(probabilities)
    if training.shape[1] != generated.shape[1]:
        raise InputError(
            f"probabilities of {training.shape[1]} and {generated.shape[1]} classes cannot be compared; take both from "
            "one classifier"
        )
    entropies = -(generated * np.log(np.maximum(generated, _SMALLEST_PROBABILITY))).sum(axis=1)
    return float(_divergences(training.mean(axis=0)[None], generated.mean(axis=0))[0] + entropies.mean())


class FrechetDistanceTo:
    """Fréchet distances of many subsets of clips to one fixed set, fast enough for resampling.

    With S1 = R R, R symmetric, the eigenvalues of S1 S2 are those of R S2 R, the covariance of the features times R.
    These products are computed once for all clips. A subset then costs one product of (chosen, features) with itself
    and the eigenvalues of a symmetric matrix, in float64; the relative rounding error is about 1e-7.

    Args:
        reference: the fixed set.
        features: (clips, features) to choose subsets of.

    Raises:
        InputError: as `feature_summary`, or if the numbers of features differ.
    """

    def __init__(self, reference: FeatureSummary, features: npt.ArrayLike) -> None:
        table = _finite_table(features, "features")
        _check_same_features(reference.mean, table[0])
        self._shifted = table - reference.mean
        values, directions = np.linalg.eigh(reference.factor.T @ reference.factor)
        self._rotated = self._shifted @ (directions * np.sqrt(np.maximum(values, 0))) @ directions.T
        self._squares = np.square(self._shifted).sum(axis=1)
        self._reference_spread = float(np.square(reference.factor).sum())

    def __call__(self, chosen: IndexArray) -> float:
        """Return the distance of the clips with these numbers, at least two."""
        count = len(chosen)
        mean = self._shifted[chosen].mean(axis=0)
        shift = float(mean @ mean)
        spread = (float(self._squares[chosen].sum()) - count * shift) / (count - 1)
        rotated = self._rotated[chosen]
        rotated = rotated - rotated.mean(axis=0)
        # With fewer clips than features, the smaller of the two products has the same non-zero eigenvalues.
        product = rotated @ rotated.T if count < rotated.shape[1] else rotated.T @ rotated
        common = np.sqrt(np.maximum(np.linalg.eigvalsh(product / (count - 1)), 0)).sum()
        return max(shift + self._reference_spread + spread - 2 * float(common), 0.0)


def half_sample_interval(
    statistic: Callable[[IndexArray], float],
    count: int,
    seed: int = 0,
    resamples: int = 200,
    confidence: float = 0.95,
    value: float | None = None,
    smallest: float = 0.0,
) -> Interval:
    """Estimate a confidence interval of a score from random halves of its clips, sampled without replacement.

    The mean of a random half deviates from that of all clips as much as the mean of all clips deviates from the truth,
    so the spread of the halves estimates the sampling error of the score: a delete-half jackknife (McCarthy, Review of
    the International Statistical Institute 37, 1969; Shao & Wu, Annals of Statistics 17, 1989), or subsampling (Politis
    & Romano, Annals of Statistics 22, 1994). A bootstrap with replacement is unsuitable for Fréchet distances, as
    repeated clips reduce the effective number of clips.

    Fréchet distances of halves are biased upwards, as of any smaller number of clips, but only their spread about their
    own mean is used. The interval is for the score of as many other clips, with the same bias, not for the limit of
    infinitely many.

    Args:
        statistic: returns the score of the clips with these numbers.
        count: number of clips.
        seed: seed for choosing the halves.
        resamples: number of halves.
        confidence: share of the halves within the interval.
        value: the score of all clips, if already computed.
        smallest: lower bound of the score, and so of the interval.

    Raises:
        InputError: if a number is invalid.
    """
    if count < 4 or resamples < 2 or not 0 < confidence < 1:
        raise InputError(
            f"no interval can be computed from {count} clips, {resamples} resamples and a confidence of {confidence}; "
            "give at least 4 clips, 2 resamples, and a confidence between 0 and 1"
        )
    value = statistic(np.arange(count)) if value is None else value
    random = np.random.default_rng(seed)
    half = count // 2
    found = np.array([statistic(np.sort(random.permutation(count)[:half])) for _ in range(resamples)])
    # With an odd number of clips a half is slightly smaller, so its scores spread slightly more.
    deviations = (found - found.mean()) * math.sqrt(half / (count - half))
    low, high = value + np.quantile(deviations, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, max(float(low), smallest), max(float(high), smallest))


def likelihood_rejection(
    log_likelihoods: npt.ArrayLike,
    score: Callable[[IndexArray], float] | None = None,
    seed: int = 0,
    mode: str = "paper",
) -> Rejection:
    """Reject the least and the most likely clips, as is done for autoregressive models (arXiv 2202.09729, C.4).

    `paper` rejects the bottom 40 % and the top 5 % of all clips, as the published code always does: it searches for
    thresholds but never stores the best. `search` follows the text of the paper: on a random half of the clips it
    selects the pair of `BOTTOM_FRACTIONS` and `TOP_FRACTIONS` with the best score, and keeps the clips of the other
    half between the same log-likelihoods. Only that half may then be scored.

    Args:
        log_likelihoods: (clips,) log-likelihoods under the generating model; per sample if the lengths differ.
        score: for a search: returns the score of the clips with these numbers, higher is better (IS in the paper).
        seed: seed for choosing the halves of a search.
        mode: one of `REJECTIONS`.

    Raises:
        InputError: if the mode is unknown, a search has no score, likelihoods are not finite, or clips are too few.
    """
    values = np.asarray(log_likelihoods, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InputError("log-likelihoods must be one finite number per clip; score the clips again")
    if mode not in REJECTIONS:
        raise InputError(f"there is no rejection {mode!r}; choose {' or '.join(REJECTIONS)}")
    fewest = 4 if mode == "paper" else 40
    if len(values) < fewest:
        raise InputError(f"rejection ({mode}) needs at least {fewest} clips but there are {len(values)}; give more")
    everything = np.arange(len(values))
    if mode == "paper":
        kept = _middle(values, everything, PAPER_BOTTOM_FRACTION, PAPER_TOP_FRACTION)
        return _rejection(values, kept, PAPER_BOTTOM_FRACTION, PAPER_TOP_FRACTION, everything[:0])
    if score is None:
        raise InputError("a search for thresholds needs a score; give a classifier, or choose paper")
    order = np.random.default_rng(seed).permutation(len(values))
    tuned_on, other = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    best: tuple[float, Rejection] | None = None
    for bottom in BOTTOM_FRACTIONS:
        for top in TOP_FRACTIONS:
            chosen = _middle(values, tuned_on, bottom, top)
            found = score(chosen)
            if best is None or found > best[0]:
                best = found, _rejection(values, chosen, bottom, top, tuned_on)
    assert best is not None
    thresholds = best[1]
    # A fraction of 0 rejects nothing, even if the other half goes beyond the extremes of this one.
    lowest = thresholds.lowest if thresholds.bottom_fraction > 0 else -math.inf
    highest = thresholds.highest if thresholds.top_fraction > 0 else math.inf
    kept = other[(values[other] >= lowest) & (values[other] <= highest)]
    return thresholds._replace(kept=kept, lowest=lowest, highest=highest)


def _middle(values: FloatArray, numbers: IndexArray, bottom: float, top: float) -> IndexArray:
    """Return `numbers` without the given shares of the least and the most likely clips, ascending."""
    ordered = numbers[np.argsort(values[numbers], kind="stable")]
    first, last = round(bottom * len(ordered)), len(ordered) - round(top * len(ordered))
    return np.sort(ordered[first:last])


def _rejection(values: FloatArray, kept: IndexArray, bottom: float, top: float, tuned_on: IndexArray) -> Rejection:
    return Rejection(kept, bottom, top, float(values[kept].min()), float(values[kept].max()), tuned_on)


def _inception_score(scored: FloatArray, averaged: FloatArray) -> float:
    return math.exp(min(float(_divergences(scored, averaged.mean(axis=0)).mean()), 700.0))


def _divergences(table: FloatArray, other: FloatArray) -> FloatArray:
    """Return KL(row || other) in nats for each row."""
    ratio = np.log(np.maximum(table, _SMALLEST_PROBABILITY)) - np.log(np.maximum(other, _SMALLEST_PROBABILITY))
    return (table * ratio).sum(axis=1)


def _check_same_features(one: FloatArray, other: FloatArray) -> None:
    if one.shape != other.shape:
        raise InputError(
            f"features of {one.shape[0]} and {other.shape[0]} numbers cannot be compared; take both from one classifier"
        )


def _finite_table(values: npt.ArrayLike, what: str) -> FloatArray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape or not np.isfinite(table).all():
        raise InputError(f"{what} must be a table of finite numbers, one row per clip, but have shape {table.shape}")
    return table


def _probability_table(values: npt.ArrayLike) -> FloatArray:
    table = _finite_table(values, "probabilities")
    if (table < 0).any() or np.abs(table.sum(axis=1) - 1).max() > 1e-3:
        raise InputError("probabilities of a clip must not be negative and must add up to 1; normalise them first")
    return table
