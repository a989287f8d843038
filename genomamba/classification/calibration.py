"""Calibration of class probabilities at every length: calls with a probability of 0.9 are right nine times out of ten.

A classifier gives evidence per base, averaged over a window; its confidence grows with the window's length by
`exp(intercept + slope * log(length / 1024))`. That is temperature scaling (Guo et al. 2017, "On Calibration of Modern
Neural Networks", section 4.2) with a temperature that is a power of the length. The two numbers are fitted on held-out
windows of several lengths by minimising the negative log-likelihood. They never change which class is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from genomamba.classification.combination import Combination, fit_to_held_out
from genomamba.classification.evidence import evidence_of_records, longest_markov_order, split_evidence
from genomamba.classification.held_out import FloatArray, HeldOutEvidence, IntegerArray
from genomamba.classification.novelty import LikelihoodQuantiles, count_scored_words, own_likelihood, pair_counts
from genomamba.data.genomes import GenomeCollection
from genomamba.data.windows import evaluation_windows
from genomamba.models.species_classifier import SpeciesClassifier

REFERENCE_LENGTH_BP = 1024
CALIBRATION_LENGTHS_BP = (1024, 4096, 16_384, 65_536, 262_144)
# Used only for the p-values of short records, whose probabilities follow from the fit to the lengths above, unless no
# held-out sequence is as long as those.
SHORT_LENGTHS_BP = (256, 512)
CALIBRATION_ERROR_BINS = 15
# Width, in units of the log confidence, of the Gaussian prior around the trained confidence: wide enough to be
# overruled by a dozen windows, but it keeps the fit finite if every held-out window is called correctly.
PRIOR_WIDTH = 2.0


@dataclass(frozen=True)
class Confidence:
    """`logits = exp(intercept + slope * log(length / 1024)) * mean_evidence`."""

    intercept: float
    slope: float

    def log_probabilities(self, mean_evidence: FloatArray, lengths_bp: IntegerArray) -> FloatArray:
        """Return log-probabilities (windows, classes) for evidence per base (windows, classes)."""
        log_scale = self.intercept + self.slope * np.log(lengths_bp / REFERENCE_LENGTH_BP)
        return log_softmax(np.exp(log_scale)[:, None] * mean_evidence, axis=1)


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration metrics, with equal weight for every length.

    `before` is the confidence as trained. `after` is evaluated on windows that were not used for the fit (two folds by
    position on the chromosomes); the stored confidence is then fitted on all of them. `p_value_quantiles` describe the
    likelihoods of the windows (`novelty.LikelihoodQuantiles`).
    """

    intercept: float
    slope: float
    expected_calibration_error_before: float
    expected_calibration_error_after: float
    negative_log_likelihood_before: float
    negative_log_likelihood_after: float
    windows_by_length: dict[int, int]
    accuracy_by_length: dict[int, float]
    p_value_quantiles: dict[str, Any]
    error_bins: int = CALIBRATION_ERROR_BINS

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable metrics for the model folder."""
        content = asdict(self)
        for key in ("windows_by_length", "accuracy_by_length"):
            content[key] = {str(length): value for length, value in content[key].items()}
        return content

    def summary(self) -> str:
        """Summarise in one line for the terminal."""
        windows = sum(self.windows_by_length.values())
        return (
            f"calibration error {self.expected_calibration_error_before:.1%} as trained, "
            f"{self.expected_calibration_error_after:.1%} after calibration ({self.error_bins} bins, {windows} "
            f"held-out windows of {min(self.windows_by_length):,} to {max(self.windows_by_length):,} bp)"
        )


def calibration_lengths(held_out: GenomeCollection, training_length: int, bases_per_class: int) -> list[int]:
    """Return window lengths for which every class has a held-out sequence, with at least two windows in the budget.

    The training length is always among them when the held-out sequences are long enough. Where they are all too short,
    as those of a draft assembly in short contigs, `SHORT_LENGTHS_BP` take their place.
    """
    longest = dict.fromkeys(held_out.class_names, 0)
    for sequence in held_out.sequences:
        longest[sequence.class_name] = max(longest[sequence.class_name], sequence.length)
    within_budget = {length for length in CALIBRATION_LENGTHS_BP if 2 * length <= bases_per_class}
    usual = sorted(length for length in within_budget | {training_length} if length <= min(longest.values()))
    return usual or [length for length in SHORT_LENGTHS_BP if length <= min(longest.values())]


def collect_evidence(
    model: SpeciesClassifier,
    held_out: GenomeCollection,
    lengths: Sequence[int],
    *,
    bases_per_class: int,
    maximum_windows_per_class: int,
    seed: int,
) -> HeldOutEvidence | None:
    """Run the model over held-out windows of several lengths.

    Args:
        model: the trained classifier.
        held_out: sequences not used for training.
        lengths: window lengths in bases.
        bases_per_class: bases per class and length.
        maximum_windows_per_class: upper limit of windows per class, however short.
        seed: seed for choosing the windows.

    Returns:
        The evidence, or `None` if there is no length at which every class has a window.
    """
    parts = []
    longest_order = longest_markov_order(model)
    for length in lengths:
        wanted = max(1, min(bases_per_class // length, maximum_windows_per_class))
        material = evaluation_windows(held_out, length, wanted, seed)
        if material.missing_classes:
            continue
        windows = material.windows
        tokens = np.stack([window.tokens() for window in windows])
        middles = [(window.start + length / 2) / window.sequence.length for window in windows]
        stack, counted = split_evidence(model, evidence_of_records(model, tokens))
        parts.append(
            HeldOutEvidence(
                mean_evidence=stack,
                counted=counted,
                lengths_bp=np.full(len(windows), length, dtype=np.int64),
                labels=np.array([window.label for window in windows], dtype=np.int64),
                folds=np.array([int(middle >= 0.5) for middle in middles], dtype=np.int64),
                own_likelihood=np.array([own_likelihood(pair_counts(window)) for window in tokens]),
                scored_share=np.array([count_scored_words(window, longest_order) for window in tokens]) / length,
            )
        )
    if not parts:
        return None
    return HeldOutEvidence.joined(parts)


def fit_confidence(evidence: HeldOutEvidence, prior: Confidence) -> Confidence:
    """Fit the confidence by minimal negative log-likelihood, with equal weight for every length.

    A weak Gaussian prior (`PRIOR_WIDTH`) around `prior` keeps both parameters finite if the windows do not determine
    them because all are called correctly or have the same length.
    """
    weights = _equal_weight_per_length(evidence.lengths_bp)
    window_count = len(evidence.labels)

    def objective(parameters: FloatArray) -> float:
        confidence = Confidence(float(parameters[0]), float(parameters[1]))
        distance = (parameters - [prior.intercept, prior.slope]) / PRIOR_WIDTH
        return negative_log_likelihood(evidence, confidence, weights) + 0.5 * float(distance @ distance) / window_count

    solution = minimize(objective, [prior.intercept, prior.slope], method="Nelder-Mead")
    return Confidence(float(solution.x[0]), float(solution.x[1]))


def negative_log_likelihood(evidence: HeldOutEvidence, confidence: Confidence, weights: FloatArray) -> float:
    """Return the weighted mean of -log p(true class), in nats."""
    log_probabilities = confidence.log_probabilities(evidence.mean_evidence, evidence.lengths_bp)
    return float(-weights @ log_probabilities[np.arange(len(evidence.labels)), evidence.labels])


def expected_calibration_error(
    probabilities: FloatArray, labels: IntegerArray, weights: FloatArray | None = None
) -> float:
    """Return the expected calibration error of the top probability (Guo et al. 2017, equation 3), 15 equal bins.

    Args:
        probabilities: (windows, classes).
        labels: (windows,) true classes.
        weights: (windows,) summing to 1; equal by default.
    """
    window_count = len(labels)
    weights = np.full(window_count, 1.0 / window_count) if weights is None else weights
    top = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.minimum((top * CALIBRATION_ERROR_BINS).astype(np.int64), CALIBRATION_ERROR_BINS - 1)
    gaps = np.bincount(bins, weights * (correct - top), minlength=CALIBRATION_ERROR_BINS)
    return float(np.abs(gaps).sum())


def calibrate(
    model: SpeciesClassifier,
    evidence: HeldOutEvidence,
    short: HeldOutEvidence | None = None,
    *,
    use_stack: bool = True,
) -> CalibrationReport:
    """Fit the model's confidence to held-out evidence, store it in the model, and report the effect.

    The stack's confidence is fitted first; if there are counted parts, the weight of the stack relative to them is
    fitted next (`combination.fit_to_held_out`), and the metrics are those of the combination.

    Args:
        model: its `confidence_intercept`, `confidence_slope` and `combination` are replaced.
        evidence: from `collect_evidence`.
        use_stack: whether the stack is used along with counted parts.
        short: evidence of windows of `SHORT_LENGTHS_BP`, used only for the p-values of short records.
    """
    trained = Confidence(float(model.confidence_intercept.detach()), float(model.confidence_slope.detach()))
    weights = _equal_weight_per_length(evidence.lengths_bp)
    untouched = _Fitted(trained, model.combination)
    log_probabilities_before = untouched.log_probabilities(evidence)
    log_probabilities_after = np.empty_like(log_probabilities_before)
    for fold in (0, 1):
        tested = evidence.folds == fold
        fitted = untouched if tested.all() else _fit(evidence.subset(~tested), untouched, use_stack=use_stack)
        log_probabilities_after[tested] = fitted.log_probabilities(evidence.subset(tested))
    final = _fit(evidence, untouched, use_stack=use_stack)
    model.combination = final.combination
    with torch.no_grad():
        model.confidence_intercept.fill_(final.confidence.intercept)
        model.confidence_slope.fill_(final.confidence.slope)

    rows = np.arange(len(evidence.labels))
    correct = log_probabilities_after.argmax(axis=1) == evidence.labels
    lengths = [int(length) for length in np.unique(evidence.lengths_bp)]
    return CalibrationReport(
        intercept=final.confidence.intercept,
        slope=final.confidence.slope,
        expected_calibration_error_before=expected_calibration_error(
            np.exp(log_probabilities_before), evidence.labels, weights
        ),
        expected_calibration_error_after=expected_calibration_error(
            np.exp(log_probabilities_after), evidence.labels, weights
        ),
        negative_log_likelihood_before=float(-weights @ log_probabilities_before[rows, evidence.labels]),
        negative_log_likelihood_after=float(-weights @ log_probabilities_after[rows, evidence.labels]),
        windows_by_length={length: int((evidence.lengths_bp == length).sum()) for length in lengths},
        accuracy_by_length={length: float(correct[evidence.lengths_bp == length].mean()) for length in lengths},
        p_value_quantiles=LikelihoodQuantiles.of_windows(
            evidence if short is None else HeldOutEvidence.joined([short, evidence]),
            longest_markov_order(model),
        ).to_dict(),
    )


def _equal_weight_per_length(lengths_bp: IntegerArray) -> FloatArray:
    """Return weights (windows,) summing to 1 that give every length the same total."""
    _, positions, counts = np.unique(lengths_bp, return_inverse=True, return_counts=True)
    return 1.0 / (counts[positions] * len(counts))


@dataclass(frozen=True)
class _Fitted:
    """The stack's confidence, and its combination with counted parts, if any."""

    confidence: Confidence
    combination: Combination | None

    def log_probabilities(self, evidence: HeldOutEvidence) -> FloatArray:
        """Return log-probabilities (windows, classes)."""
        stack = self.confidence.log_probabilities(evidence.mean_evidence, evidence.lengths_bp)
        if self.combination is None or evidence.counted is None:
            return stack
        # Log-probabilities are valid logits.
        return log_softmax(self.combination.logits(stack, evidence.counted, evidence.lengths_bp), axis=1)


def _fit(evidence: HeldOutEvidence, untouched: _Fitted, *, use_stack: bool) -> _Fitted:
    confidence = fit_confidence(evidence, untouched.confidence)
    if untouched.combination is None or evidence.counted is None:
        return _Fitted(confidence, untouched.combination)
    combination = fit_to_held_out(
        untouched.combination,
        confidence.log_probabilities(evidence.mean_evidence, evidence.lengths_bp),
        evidence.counted,
        evidence.lengths_bp,
        evidence.labels,
        use_stack=use_stack,
    )
    return _Fitted(confidence, combination)
