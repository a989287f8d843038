"""Scores of generated clips, from what a classifier says of them, and choosing clips by likelihood.

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
"""Of the clips in the order of likelihood: what the published code leaves out, whatever its search finds."""

BOTTOM_FRACTIONS: Final = tuple(round(0.05 * number, 2) for number in range(13))  # 0 to 0.6
TOP_FRACTIONS: Final = tuple(round(0.05 * number, 2) for number in range(5))  # 0 to 0.2
REJECTIONS: Final = ("paper", "search")

# Probabilities that were rounded to 0 are taken as the smallest normal number, so that every divergence is finite.
_SMALLEST_PROBABILITY = np.finfo(np.float64).tiny


class Interval(NamedTuple):
    """A score and where it would lie with other clips of the same source."""

    value: float
    low: float
    high: float


class FeatureSummary(NamedTuple):
    """All that a Fréchet distance needs of a set of features."""

    mean: FloatArray  # (features,)
    factor: FloatArray  # (min(clips, features), features): the covariance is factor^T factor


class Rejection(NamedTuple):
    """Which clips are kept.

    Attributes:
        kept: numbers of the clips, ascending; after a search those of the half that was not searched on.
        bottom_fraction, top_fraction: of the least and the most likely clips, left out.
        lowest, highest: log-likelihoods between which a clip is kept, both included.
        tuned_on: numbers of the clips that the thresholds were found on; empty without a search.
    """

    kept: IndexArray
    bottom_fraction: float
    top_fraction: float
    lowest: float
    highest: float
    tuned_on: IndexArray


def feature_summary(features: npt.ArrayLike) -> FeatureSummary:
    """Mean and a factor of the covariance (with N - 1) of (clips, features) activations.

    Raises:
        InputError: not a table of finite numbers, or fewer than two clips.
    """
    table = _finite_table(features, "features")
    if table.shape[0] < 2:
        raise InputError(f"a covariance needs at least 2 clips but there is {table.shape[0]}; give more")
    mean = table.mean(axis=0)
    factor = np.linalg.qr((table - mean) / math.sqrt(table.shape[0] - 1)).R
    return FeatureSummary(mean, factor)


def frechet_distance(first: npt.ArrayLike | FeatureSummary, second: npt.ArrayLike | FeatureSummary) -> float:
    """The Fréchet distance of two sets of features, each taken as a Gaussian (FID; Heusel et al., arXiv 1706.08500, 6).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

    With S1 = F^T F and S2 = G^T G the eigenvalues of S1 S2 are the squares of the singular values of F G^T, so the last
    trace is their sum. No root of an eigenvalue that rounding made negative is ever taken, and covariances of fewer
    clips than features, which have no inverse, are nothing special.

    Args:
        first, second: (clips, features), or what `feature_summary` made of them.

    Raises:
        InputError: as `feature_summary`; or sets of different features.
    """
    one = first if isinstance(first, FeatureSummary) else feature_summary(first)
    other = second if isinstance(second, FeatureSummary) else feature_summary(second)
    _check_same_features(one.mean, other.mean)
    spread = np.square(one.factor).sum() + np.square(other.factor).sum()
    common = np.linalg.svd(one.factor @ other.factor.T, compute_uv=False).sum()
    distance = float(np.square(one.mean - other.mean).sum() + spread - 2 * common)
    return max(distance, 0.0)  # rounding puts equal sets at -1e-15


def inception_score(probabilities: npt.ArrayLike, seed: int = 0, *, held_out: bool = True) -> float:
    """exp of the mean of KL(p_i || p) over clips: sure of each clip, unsure of all (Salimans et al., arXiv 1606.03498).

    Args:
        probabilities: (clips, classes), of each clip.
        seed: of the halves.
        held_out: the mean p over one half, chosen at random, and the divergences over the other (SaShiMi's code);
            otherwise both over all clips, the common definition.

    Returns:
        From 1 to the number of classes, or somewhat beyond it with a held-out half.

    Raises:
        InputError: not probabilities, or too few clips.
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
    """exp of the mean of KL(p_i || p_j) over pairs of different clips (Gurumurthy et al., arXiv 1706.02071, section 5).

    It grows with the variety within a class too. Published figures take random pairs; this is the mean over all ordered
    pairs, which those estimate: the sum over i and j of p_i log p_j is the product of two sums.

    Raises:
        InputError: not probabilities, or fewer than two clips.
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
    """KL(mean of training || mean of generated) + mean entropy of the generated (Zhou et al., arXiv 1703.02000, 6).

    In nats; less is better, unlike the inception scores it knows how often the classes should come.

    Args:
        training_probabilities: (clips, classes) of the clips that a model learned from.
        probabilities: (clips, classes) of those it generated.

    Raises:
        InputError: not probabilities, or of different classes.
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
    """Fréchet distances of many choices of clips to one fixed set, for intervals: fast, and without what never changes.

    With S1 = R R, R symmetric, the eigenvalues of S1 S2 are those of R S2 R, the covariance of the features times R.
    These products are taken once for all clips. A choice then costs one product of (chosen, features) with itself and
    the eigenvalues of a symmetric matrix, in float64; rounding loses about 1e-7 of the distance's parts.

    Args:
        reference: the fixed set.
        features: (clips, features) to choose from.

    Raises:
        InputError: as `feature_summary`; or sets of different features.
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
        """The distance of the clips with these numbers, at least two."""
        count = len(chosen)
        mean = self._shifted[chosen].mean(axis=0)
        shift = float(mean @ mean)
        spread = (float(self._squares[chosen].sum()) - count * shift) / (count - 1)
        rotated = self._rotated[chosen]
        rotated = rotated - rotated.mean(axis=0)
        # Of fewer clips than features, the smaller of the two products has the same eigenvalues but for zeros.
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
    """A score with an interval, from random halves of its clips, in which no clip comes twice.

    The mean of a random half lies about that of all clips as widely as that of all clips lies about the truth, so how
    the scores of halves spread is how scores of so many clips do: a delete-half jackknife (McCarthy, Review of the
    International Statistical Institute 37, 1969; Shao & Wu, Annals of Statistics 17, 1989), or subsampling (Politis &
    Romano, Annals of Statistics 22, 1994). Drawing with replacement would not do for a Fréchet distance: clips that
    come twice make it that of fewer clips.

    A Fréchet distance of halves is larger than that of all clips, as of any smaller number of clips, but only how they
    spread about their own mean is used. The interval therefore holds the score of as many other clips, which has the
    same bias, and not that of infinitely many.

    Args:
        statistic: the score of the clips with these numbers.
        count: how many clips there are.
        seed: of the halves.
        resamples: how many halves.
        confidence: share of the halves within the interval.
        value: the score of all clips, where it is known already.
        smallest: what no score is below; nor is the interval.

    Raises:
        InputError: numbers that make no sense.
    """
    if count < 4 or resamples < 2 or not 0 < confidence < 1:
        raise InputError(
            f"no interval comes from {count} clips, {resamples} resamples and a confidence of {confidence}; give at "
            "least 4 clips, 2 resamples, and a confidence between 0 and 1"
        )
    value = statistic(np.arange(count)) if value is None else value
    random = np.random.default_rng(seed)
    half = count // 2
    found = np.array([statistic(np.sort(random.permutation(count)[:half])) for _ in range(resamples)])
    # Of an odd number of clips the half is a little less, and lies a little farther.
    deviations = (found - found.mean()) * math.sqrt(half / (count - half))
    low, high = value + np.quantile(deviations, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, max(float(low), smallest), max(float(high), smallest))


def likelihood_rejection(
    log_likelihoods: npt.ArrayLike,
    score: Callable[[IndexArray], float] | None = None,
    seed: int = 0,
    mode: str = "paper",
) -> Rejection:
    """Leave out the least and the most likely clips, as is done with autoregressive models (arXiv 2202.09729, C.4).

    `paper` leaves out the bottom 40 % and the top 5 % of all clips: the published code searches for thresholds but
    never keeps the best it found, so that is what it always does. `search` does what is written in the paper: on a
    random half of the clips it takes the pair of `BOTTOM_FRACTIONS` and `TOP_FRACTIONS` with the best score, and
    keeps the clips of the other half between the same log-likelihoods. Only that half may then be scored.

    Args:
        log_likelihoods: (clips,), of each clip under the model that made it; of clips of unlike lengths per sample.
        score: for a search: the score of the clips with these numbers, larger is better (IS in the paper).
        seed: of the halves of a search.
        mode: one of `REJECTIONS`.

    Raises:
        InputError: another mode, a search without a score, likelihoods that are not finite, or too few clips.
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
    # A fraction of 0 leaves out nothing, whatever the other half holds beyond the extremes of this one.
    lowest = thresholds.lowest if thresholds.bottom_fraction > 0 else -math.inf
    highest = thresholds.highest if thresholds.top_fraction > 0 else math.inf
    kept = other[(values[other] >= lowest) & (values[other] <= highest)]
    return thresholds._replace(kept=kept, lowest=lowest, highest=highest)


def _middle(values: FloatArray, numbers: IndexArray, bottom: float, top: float) -> IndexArray:
    """Those of `numbers` that are left without a share of the least and of the most likely, ascending."""
    ordered = numbers[np.argsort(values[numbers], kind="stable")]
    first, last = round(bottom * len(ordered)), len(ordered) - round(top * len(ordered))
    return np.sort(ordered[first:last])


def _rejection(values: FloatArray, kept: IndexArray, bottom: float, top: float, tuned_on: IndexArray) -> Rejection:
    return Rejection(kept, bottom, top, float(values[kept].min()), float(values[kept].max()), tuned_on)


def _inception_score(scored: FloatArray, averaged: FloatArray) -> float:
    return math.exp(min(float(_divergences(scored, averaged.mean(axis=0)).mean()), 700.0))


def _divergences(table: FloatArray, other: FloatArray) -> FloatArray:
    """KL(row || other) in nats, for each row."""
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
