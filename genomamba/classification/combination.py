"""Weighting of the evidence of a classifier's parts: a logistic regression whose coefficients vary with the length.

Each part gives every class a mean log-likelihood (or score) per base. With m(p, c) that of part p and class c over a
window of L bases, the counted parts have the logits

    counted(c) = sqrt(L) sum_p a(p, L) m(p, c) + sqrt(L) b(c, L)

with coefficients at a few lengths, interpolated linearly in log L between them and constant outside. The square root
accounts for most of the dependence on the length, as if bases were independent; the coefficients account for the rest.
This is stacking (Wolpert 1992, "Stacked generalization", Neural Networks 5:241) with smoothness over the length.

The coefficients are fitted on cross-validated windows: none of the parts was fitted on them or on their homologues. The
selective stack is trained only once, so its weight has to be fitted on sequence held out from training:

    logits(c) = exp(g(L)) counted(c) + u(L) stack(c),    u(L) >= 0

with g and u linear in log L, and stack(c) the logits of the stack alone. These four parameters also calibrate.
Matches of long words add their own logits (`genomamba.classification.long_words`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch.nn import functional as F

from genomamba.classification.held_out import FloatArray, IntegerArray
from genomamba.classification.long_words import word_logits
from mambacore.errors import InputError

RIDGE: Final = 1e-3
BIAS_RIDGE: Final = 1e-2
SMOOTHNESS: Final = 3e-3
"""Penalties of squared coefficients, biases, and differences of coefficients between neighbouring lengths, in units of
the standard deviation of each part's evidence, added to a mean cross-entropy in nats."""
FULL_WEIGHT_WINDOWS: Final = 100
"""Lengths with fewer windows get a lower weight."""
ITERATIONS: Final = 300
STACK: Final = "stack"
WORDS: Final = "words"
REFERENCE_LENGTH_BP: Final = 4096
LOG_STEP: Final = float(np.log(4))
"""g and u are linear in the number of fourfold lengths beyond the reference."""
PRIOR_WIDTHS: Final = (0.5, 0.25, 1.0, 0.25)
"""Of g, its slope, u and its slope: Gaussian, around 0 (the stack is ignored, the counted parts are calibrated)."""


@dataclass(frozen=True)
class PartWindows:
    """Counted evidence of windows of one length.

    Attributes:
        evidence: (windows, parts, classes) means per base.
        labels: (windows,) true class.
        folds: (windows,) fold of the cross-validation.
    """

    evidence: FloatArray
    labels: IntegerArray
    folds: IntegerArray


@dataclass(frozen=True)
class CountedWeights:
    """Coefficients of the counted parts.

    Attributes:
        lengths_bp: (lengths,) ascending, at which the coefficients are defined.
        coefficients: (lengths, parts).
        biases: (lengths, classes).
    """

    lengths_bp: FloatArray
    coefficients: FloatArray
    biases: FloatArray

    def logits(self, evidence: FloatArray, lengths_bp: IntegerArray) -> FloatArray:
        """Return logits (windows, classes) for evidence per base (windows, parts, classes) and lengths (windows,)."""
        places = np.log(np.maximum(lengths_bp, 1))
        knots = np.log(self.lengths_bp)

        def at(values: FloatArray) -> FloatArray:
            return np.stack([np.interp(places, knots, column) for column in values.T], axis=1)

        weighed = np.einsum("wpc,wp->wc", evidence, at(self.coefficients)) + at(self.biases)
        return weighed * np.sqrt(lengths_bp)[:, None]


@dataclass(frozen=True)
class Combination:
    """Weights that combine the parts into class logits.

    Attributes:
        part_names: names of the counted parts, in the order of their evidence.
        counted: coefficients of all counted parts together.
        alone: coefficients of the parts of one kind (`markov`, `kmer`) alone, for comparison; 0 for the other parts.
        gain: g at the reference length, and its slope.
        stack: u at the reference length, and its slope.
        lengths_bp: shortest and longest length that gain and stack were fitted on; they are constant beyond.
        words_one_in: `long_words.LongWords.one_in`; None without long words.
    """

    part_names: tuple[str, ...]
    counted: CountedWeights
    alone: dict[str, CountedWeights] = field(default_factory=dict)
    gain: tuple[float, float] = (0.0, 0.0)
    stack: tuple[float, float] = (0.0, 0.0)
    lengths_bp: tuple[float, float] = (1.0, np.inf)
    words_one_in: int | None = None

    def logits(self, stack_logits: FloatArray, evidence: FloatArray, lengths_bp: IntegerArray) -> FloatArray:
        """Return the logits of windows.

        Args:
            stack_logits: (windows, classes) of the stack alone.
            evidence: (windows, rows, classes) of the counted parts, per base (`parts.CountedParts.block_evidence`).
            lengths_bp: (windows,) length of each.

        Returns:
            (windows, classes).
        """
        counted = self.counted.logits(evidence[:, : len(self.part_names)], lengths_bp)
        return self.join(stack_logits, counted, lengths_bp) + self.word_logits(evidence, lengths_bp)

    def word_logits(self, evidence: FloatArray, lengths_bp: IntegerArray) -> FloatArray:
        """Return the logits (windows, classes) of long words, 0 without any."""
        if self.words_one_in is None:
            return np.zeros_like(evidence[:, 0])
        lengths = np.asarray(lengths_bp, dtype=np.float64)
        return word_logits(evidence[:, len(self.part_names)] * lengths[:, None], lengths / self.words_one_in)

    def logits_alone(self, kind: str, evidence: FloatArray, lengths_bp: IntegerArray) -> FloatArray:
        """Return the logits (windows, classes) of one kind of counted part alone."""
        if kind == WORDS:
            return self.word_logits(evidence, lengths_bp)
        return self.alone[kind].logits(evidence[:, : len(self.part_names)], lengths_bp)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the counted parts."""
        return tuple(self.alone) if self.words_one_in is None else (*self.alone, WORDS)

    def join(self, stack_logits: FloatArray, counted_logits: FloatArray, lengths_bp: IntegerArray) -> FloatArray:
        """Combine the logits (windows, classes) of the stack and the counted parts."""
        step = np.log(np.clip(lengths_bp, *self.lengths_bp) / REFERENCE_LENGTH_BP) / LOG_STEP
        gain = np.exp(self.gain[0] + self.gain[1] * step)
        weight = np.maximum(self.stack[0] + self.stack[1] * step, 0.0)
        return gain[:, None] * counted_logits + weight[:, None] * stack_logits

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_dict` is the inverse."""

        def listed(weights: CountedWeights) -> dict[str, Any]:
            return {name: getattr(weights, name).tolist() for name in CountedWeights.__dataclass_fields__}

        lengths = None if np.isinf(self.lengths_bp[1]) else list(self.lengths_bp)
        return {
            "part_names": list(self.part_names),
            "counted": listed(self.counted),
            "alone": {name: listed(weights) for name, weights in self.alone.items()},
            "gain": list(self.gain),
            "stack": list(self.stack),
            "lengths_bp": lengths,
            "words_one_in": self.words_one_in,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Combination:
        """Inverse of `to_dict`.

        Raises:
            InputError: if the content is damaged.
        """

        def weights(of: Mapping[str, Any]) -> CountedWeights:
            return CountedWeights(
                *(np.array(of[name], dtype=np.float64) for name in CountedWeights.__dataclass_fields__)
            )

        try:
            return cls(
                tuple(content["part_names"]),
                weights(content["counted"]),
                {name: weights(of) for name, of in content["alone"].items()},
                (float(content["gain"][0]), float(content["gain"][1])),
                (float(content["stack"][0]), float(content["stack"][1])),
                (1.0, np.inf) if content["lengths_bp"] is None else tuple(map(float, content["lengths_bp"])),  # type: ignore[arg-type]
                None if content.get("words_one_in") is None else int(content["words_one_in"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError("the model folder's combination of parts is damaged: train or copy it again.") from error


def kind_of(part_name: str) -> str:
    """Return the kind of a part, such as `markov` for `markov 3`."""
    return part_name.partition(" ")[0]


def fit_combination(windows: Mapping[int, PartWindows], part_names: Sequence[str]) -> Combination:
    """Fit the counted parts together, and each kind of part alone.

    Args:
        windows: cross-validated evidence by length, with every class at every length.
        part_names: names of the counted parts.
    """
    kinds = list(dict.fromkeys(kind_of(name) for name in part_names))
    alone = {kind: fit_counted(windows, np.array([kind_of(name) == kind for name in part_names])) for kind in kinds}
    together = fit_counted(windows, np.ones(len(part_names), dtype=bool)) if len(kinds) > 1 else alone[kinds[0]]
    return Combination(tuple(part_names), together, alone)


def fit_counted(windows: Mapping[int, PartWindows], used: np.ndarray) -> CountedWeights:
    """Minimise the penalised cross-entropy, with equal weight for every length and every class.

    Args:
        windows: cross-validated evidence by length.
        used: (parts,) which parts have coefficients; the others stay 0.
    """
    lengths = sorted(windows)
    inputs, labels, weights, spreads = [], [], [], []
    for length in lengths:
        of_length = windows[length]
        evidence = of_length.evidence[:, used] - of_length.evidence[:, used].mean(axis=2, keepdims=True)
        spread = np.maximum(evidence.std(axis=(0, 2)), 1e-12)
        spreads.append(spread)
        inputs.append(torch.from_numpy(evidence / spread[:, None]))
        labels.append(torch.from_numpy(of_length.labels))
        counts = np.bincount(of_length.labels, minlength=of_length.evidence.shape[2])
        of_window = 1 / (counts[of_length.labels] * np.count_nonzero(counts))
        reliability = min(1.0, float(counts[counts > 0].min()) / FULL_WEIGHT_WINDOWS)
        weights.append(torch.from_numpy(of_window * reliability))
    classes = inputs[0].shape[2]
    coefficients = torch.zeros(len(lengths), int(used.sum()), dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(len(lengths), classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coefficients, biases], max_iter=ITERATIONS, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = RIDGE * coefficients.square().sum() + BIAS_RIDGE * biases.square().sum()
        loss = loss + SMOOTHNESS * (coefficients.diff(dim=0).square().sum() + biases.diff(dim=0).square().sum())
        for place, (values, label, weight) in enumerate(zip(inputs, labels, weights, strict=True)):
            logits = torch.einsum("wpc,p->wc", values, coefficients[place]) + biases[place]
            loss = loss + F.cross_entropy(logits, label, reduction="none") @ weight
        loss.backward()
        return loss

    optimizer.step(closure)
    root = np.sqrt(np.array(lengths, dtype=np.float64))[:, None]
    full = np.zeros((len(lengths), len(used)))
    full[:, used] = coefficients.detach().numpy() / np.stack(spreads) / root
    return CountedWeights(np.array(lengths, dtype=np.float64), full, biases.detach().numpy() / root)


def fit_to_held_out(
    combination: Combination,
    stack_logits: FloatArray,
    evidence: FloatArray,
    lengths_bp: IntegerArray,
    labels: IntegerArray,
    *,
    use_stack: bool = True,
) -> Combination:
    """Fit the weight of the stack relative to the counted parts, and calibrate both, on held-out windows.

    Args:
        combination: combination with fitted counted parts.
        stack_logits, evidence, lengths_bp: as in `Combination.logits`.
        labels: (windows,) true class.
        use_stack: whether to use the stack; otherwise u stays 0.
    """
    counted = combination.counted.logits(evidence[:, : len(combination.part_names)], lengths_bp)
    words = combination.word_logits(evidence, lengths_bp)
    bounds = (float(lengths_bp.min()), float(lengths_bp.max()))
    weights = equal_weights(lengths_bp, labels)
    rows = np.arange(len(labels))

    def with_numbers(numbers: FloatArray) -> Combination:
        stack = (float(numbers[2]), float(numbers[3])) if use_stack else (0.0, 0.0)
        return replace(combination, gain=(float(numbers[0]), float(numbers[1])), stack=stack, lengths_bp=bounds)

    def objective(numbers: FloatArray) -> float:
        logits = with_numbers(numbers).join(stack_logits, counted, lengths_bp) + words
        prior = 0.5 * float(np.square(numbers / np.array(PRIOR_WIDTHS)).sum()) / len(labels)
        return float(-weights @ log_softmax(logits, axis=1)[rows, labels]) + prior

    # From two starting points, because u is clipped at 0, where the gradient vanishes.
    starts = [np.array([0.0, 0.0, u, 0.0]) for u in (0.05, 0.5)]
    solutions = [
        minimize(objective, start, method="Nelder-Mead", options={"maxiter": 2000, "xatol": 1e-4, "fatol": 1e-7})
        for start in starts
    ]
    return with_numbers(min(solutions, key=lambda solution: float(solution.fun)).x)


def equal_weights(lengths_bp: IntegerArray, labels: IntegerArray) -> FloatArray:
    """Return weights (windows,) summing to 1, equal for every length and for every class within it."""
    weights = np.zeros(len(labels))
    for length in np.unique(lengths_bp):
        of_length = lengths_bp == length
        for label in np.unique(labels[of_length]):
            alike = of_length & (labels == label)
            weights[alike] = 1 / alike.sum()
        weights[of_length] /= weights[of_length].sum()
    return weights / weights.sum()
