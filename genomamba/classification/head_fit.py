"""The last step of training: refitting of the class heads by regularised logistic regression.

Pooled over a window, a classifier's evidence is linear in the inputs of its heads: the mean likelihood under each
class, the mean features of the layers, and the spectrum of short contexts. With the layers fixed, the best heads are
therefore the solution of a convex problem, which is solved exactly and far faster than by gradient descent with one
step size for all parameters. They are fitted the way the classifier is used, on the mean of both strands. The
regularisation is chosen by cross-validation over the names of training sequences: homologous sequences of all classes
are left out together.

One parameter cannot be fitted that way: the weight of the likelihood. Its heads were trained on all training sequences,
including those left out here, and predict them better than new ones. `SEEN_SHRINKAGE` reduces the weight accordingly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genomamba.data.genomes import GenomeCollection, GenomeSequence
from genomamba.data.windows import MAXIMUM_UNKNOWN_FRACTION
from genomamba.models.species_classifier import DEVIATION_SCALE, REFERENCE_LENGTH_BP, Reading, SpeciesClassifier
from genomamba.tokenizer import CharacterTokenizer

# Stretches are divided into blocks; a window is a run of adjacent blocks of one stretch.
BLOCK_BP = 4096
BLOCKS_PER_WINDOW = (1, 4, 16, 64)
BLOCKS_PER_STRETCH = max(BLOCKS_PER_WINDOW)
FEWEST_BLOCKS_PER_CLASS = 32
STRANDS = 2
REGULARISATIONS = (1000.0, 300.0, 100.0, 30.0, 10.0)
FOLDS = 5
# The weight of the likelihood hardly depends on the regularisation of the rest.
LIKELIHOOD_WEIGHT_REGULARISATION = 100.0
ITERATIONS = 300
# Candidate confidences of the heads as trained, so that only their direction is compared.
SCALES = tuple(REFERENCE_LENGTH_BP * 2.0**power for power in np.arange(-6, 4, 0.5))
# Ratio of the best likelihood weight on new sequences to that on sequences its heads were trained on, measured on
# chromosomes that were left out of a training run for this purpose (docs/experiments.md).
SEEN_SHRINKAGE = 0.4
# Evaluating both strands of a base costs about 1.3 times as much as training on it, so this is 8 % of a run.
READ_FRACTION = 0.06
MOST_BASES = 33_554_432


@dataclass(frozen=True)
class HeadFit:
    """Result of a fit of the heads.

    Attributes:
        regularisation: weight of the squared norm, chosen by cross validation.
        likelihood_weight: weight of the likelihood in the logits of a window of `REFERENCE_LENGTH_BP`; 1 is unscaled.
        cross_entropy_before: of the heads as trained, with that weight and their best confidence, in nats, with equal
            weight for every window length and class. It is optimistic, as they were trained on these sequences.
        cross_entropy_after: of fitted heads, with that weight, on sequences left out of their fit.
        blocks: number of blocks of training sequence used.
    """

    regularisation: float
    likelihood_weight: float
    cross_entropy_before: float
    cross_entropy_after: float
    blocks: int

    def summary(self) -> str:
        """Summarise in one line for the user."""
        return (
            f"heads fitted again on {self.blocks * BLOCK_BP:,} bp of training sequence: cross entropy "
            f"{self.cross_entropy_before:.3f} before, {self.cross_entropy_after:.3f} after, on sequences left out"
        )


@dataclass(frozen=True)
class _Stretch:
    """`blocks` blocks of one sequence from base `start` on."""

    label: int
    sequence: GenomeSequence
    start: int
    blocks: int


@dataclass(frozen=True)
class _Windows:
    """Windows of all lengths: inputs of the heads, averaged over each window and both strands."""

    likelihood: Tensor  # (windows, classes)
    inputs: Tensor  # (windows, inputs)
    labels: Tensor  # (windows,)
    folds: Tensor  # (windows,)
    blocks: Tensor  # (windows,): length
    penalties: Tensor  # (inputs,): regularisation of each input's weights, relative to that of the largest part

    def weights(self, chosen: Tensor) -> Tensor:
        """Return weights (windows,) summing to 1, equal for every length and class within it; 0 if not chosen."""
        weights = torch.zeros(len(self.labels))
        for count in self.blocks.unique():
            for label in self.labels.unique():
                alike = chosen & (self.blocks == count) & (self.labels == label)
                weights[alike] = 1 / max(int(alike.sum()), 1)
        return weights / weights.sum()


@dataclass
class _Heads:
    """Logits of a mean over a window are factor(length) * (likelihood_weight * likelihood + inputs @ weight + bias)."""

    weight: Tensor  # (inputs, classes)
    bias: Tensor  # (classes,)
    likelihood_weight: Tensor  # ()

    def logits(self, windows: _Windows, slope: float) -> Tensor:
        """Return logits (windows, classes)."""
        evidence = self.likelihood_weight * windows.likelihood + windows.inputs @ self.weight + self.bias
        return evidence * ((windows.blocks * BLOCK_BP / REFERENCE_LENGTH_BP) ** slope).unsqueeze(1)


@dataclass(frozen=True)
class _Scaling:
    """Mean and standard deviation by which the inputs of the heads are standardised, both (inputs,)."""

    mean: Tensor
    spread: Tensor


def fit_heads(model: SpeciesClassifier, training: GenomeCollection, bases_trained: int, seed: int) -> HeadFit | None:
    """Replace the heads of a trained model by refitted ones, if those are better on sequences left out.

    Args:
        model: changed in place: `deviation`, `context_evidence` and the confidence.
        training: the sequences that the model was trained on.
        bases_trained: number of bases the run has trained on; a fraction of it (`READ_FRACTION`) is used for the fit,
            the same for every class.
        seed: seed for choosing stretches and folds.

    Returns:
        The result, or None if the sequences are insufficient (too short, or only one name) or the fit is no better; the
        model is then unchanged.
    """
    classes = len(training.class_names)
    bases = min(MOST_BASES, int(READ_FRACTION * bases_trained))
    stretches = _choose_stretches(training, bases // (classes * BLOCK_BP), seed)
    blocks_of_class = np.zeros(classes, dtype=int)
    for stretch in stretches:
        blocks_of_class[stretch.label] += stretch.blocks
    folds = _folds(stretches, classes, seed)
    if blocks_of_class.min() < FEWEST_BLOCKS_PER_CLASS or folds is None or model.config.pooling != "mean":
        return None
    windows, scaling = _read(model, stretches, folds)
    slope = float(model.confidence_slope.detach())
    everything = windows.weights(torch.ones(len(windows.labels), dtype=torch.bool))
    seen = _solve(windows, everything, slope, LIKELIHOOD_WEIGHT_REGULARISATION)
    if float(seen.likelihood_weight) <= 0:
        return None
    likelihood_weight = SEEN_SHRINKAGE * seen.likelihood_weight
    trained = _heads_of(model, scaling)
    before = min(
        float(
            _cross_entropy(
                _Heads(trained.weight * scale, trained.bias * scale, likelihood_weight), windows, everything, slope
            )
        )
        for scale in SCALES
    )
    after, regularisation = _choose_regularisation(windows, everything, slope, likelihood_weight)
    if after >= before:
        return None
    _put_into(model, _solve(windows, everything, slope, regularisation, likelihood_weight), scaling)
    return HeadFit(
        regularisation, float(likelihood_weight) / REFERENCE_LENGTH_BP, before, after, int(blocks_of_class.sum())
    )


def _choose_stretches(training: GenomeCollection, blocks_per_class: int, seed: int) -> list[_Stretch]:
    """Choose non-overlapping stretches with about `blocks_per_class` blocks per class, or as many as it has."""
    chosen = []
    for label, name in enumerate(training.class_names):
        stretches = [
            _Stretch(label, sequence, first * BLOCK_BP, min(BLOCKS_PER_STRETCH, sequence.length // BLOCK_BP - first))
            for sequence in training.sequences_of(name)
            for first in range(0, sequence.length // BLOCK_BP, BLOCKS_PER_STRETCH)
        ]
        left = blocks_per_class
        for position in np.random.default_rng([seed, label]).permutation(len(stretches)):
            stretch = stretches[position]
            blocks = min(left, stretch.blocks)
            if blocks:
                chosen.append(_Stretch(label, stretch.sequence, stretch.start, blocks))
            left -= blocks
    return chosen


def _folds(stretches: Sequence[_Stretch], classes: int, seed: int) -> list[int] | None:
    """Assign stretches to folds; None if leaving out a fold would leave a class without stretches.

    If the classes share sequence names, stretches of sequences with the same name are in one fold; otherwise those at
    the same relative position in their class.
    """
    names = sorted({stretch.sequence.name for stretch in stretches})
    order = np.random.default_rng([seed, len(names)]).permutation(names).tolist()
    fold_of_name = {name: number % FOLDS for number, name in enumerate(order)}
    by_name = [fold_of_name[stretch.sequence.name] for stretch in stretches]
    for folds in (by_name, _folds_by_place(stretches)):
        if len(set(folds)) > 1 and all(
            len({stretch.label for stretch, own in zip(stretches, folds, strict=True) if own != fold}) == classes
            for fold in set(folds)
        ):
            return folds
    return None


def _folds_by_place(stretches: Sequence[_Stretch]) -> list[int]:
    """Assign stretches to folds by their relative position in their class."""
    folds = [0] * len(stretches)
    for label in {stretch.label for stretch in stretches}:
        own = [number for number, stretch in enumerate(stretches) if stretch.label == label]
        own.sort(key=lambda number: (stretches[number].sequence.name, stretches[number].start))
        for place, number in enumerate(own):
            folds[number] = place * FOLDS // len(own)
    return folds


@torch.no_grad()
def _read(model: SpeciesClassifier, stretches: Sequence[_Stretch], folds: Sequence[int]) -> tuple[_Windows, _Scaling]:
    """Run the model on both strands of every stretch; return windows of all lengths with standardised inputs."""
    tokenizer = CharacterTokenizer()
    likelihoods, inputs, labels, folds_of_windows, blocks = [], [], [], [], []
    for stretch, fold in zip(stretches, folds, strict=True):
        tokens = stretch.sequence.tokens(stretch.start, stretch.start + stretch.blocks * BLOCK_BP)
        strands = torch.from_numpy(np.stack([tokens, tokenizer.reverse_complement(tokens)]))
        likelihood, others, known = _block_means(model, strands)
        # Assembly gaps must not become a feature.
        kept = known >= 1 - MAXIMUM_UNKNOWN_FRACTION
        likelihood, others = likelihood[kept], others[kept]
        for count in BLOCKS_PER_WINDOW:
            whole = len(others) // count
            likelihoods.append(likelihood[: whole * count].unflatten(0, (whole, count)).mean(1))
            inputs.append(others[: whole * count].unflatten(0, (whole, count)).mean(1))
            labels.append(torch.full((whole,), stretch.label))
            folds_of_windows.append(torch.full((whole,), fold))
            blocks.append(torch.full((whole,), count))
    windows = _Windows(
        torch.cat(likelihoods),
        torch.cat(inputs),
        torch.cat(labels),
        torch.cat(folds_of_windows),
        torch.cat(blocks),
        _penalties(model),
    )
    single = windows.inputs[windows.blocks == 1]
    scaling = _Scaling(single.mean(0), single.std(0).clamp(min=1e-8))
    windows.inputs.sub_(scaling.mean).div_(scaling.spread)
    return windows, scaling


def _block_means(model: SpeciesClassifier, strands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the means of the heads' inputs over blocks and both strands.

    Args:
        model: the classifier.
        strands: (2, length) tokens of a stretch and its reverse complement, a whole number of blocks.

    Returns:
        Likelihood (blocks, classes), all other inputs of the heads (blocks, inputs), share of known bases (blocks,).
    """
    likelihoods, inputs, known, state = [], [], [], None
    for block in strands.split(BLOCK_BP, dim=1):
        reading, state = model.read(block, state)
        likelihoods.append(reading.likelihood.mean(1))
        inputs.append(_input_means(reading, model.config.evidence_context_widths))
        known.append(reading.known[0].float().mean())
    likelihood, others = torch.stack(likelihoods, 1), torch.stack(inputs, 1)
    # The last block of the reverse strand is the first of the forward strand.
    return (
        (likelihood[0] + likelihood[1].flip(0)) / STRANDS,
        (others[0] + others[1].flip(0)) / STRANDS,
        torch.stack(known),
    )


def _input_means(reading: Reading, context_widths: tuple[int, ...]) -> Tensor:
    """Return mean features and context spectra over a block of each strand, (strands, inputs)."""
    features = (reading.features * reading.known.unsqueeze(-1)).mean(1)
    spectra = [
        torch.stack([torch.bincount(strand, minlength=4**width + 1)[:-1] / len(strand) for strand in numbers])
        for width, numbers in zip(context_widths, reading.contexts, strict=True)
    ]
    return torch.cat([features, *spectra], dim=1)


def _penalties(model: SpeciesClassifier) -> Tensor:
    """Return penalties (inputs,), higher for larger groups of inputs, which overfit more easily."""
    sizes = _input_sizes(model)
    return torch.cat([torch.full((size,), math.sqrt(size / max(sizes))) for size in sizes])


def _input_sizes(model: SpeciesClassifier) -> list[int]:
    """Return the number of inputs from the features and from the spectrum of each context width."""
    return [model.config.feature_width, *(4**width for width in model.config.evidence_context_widths)]


def _cross_entropy(heads: _Heads, windows: _Windows, weights: Tensor, slope: float) -> Tensor:
    """Return the cross-entropy in nats, weighted by (windows,)."""
    return F.cross_entropy(heads.logits(windows, slope), windows.labels, reduction="none") @ weights


def _choose_regularisation(
    windows: _Windows, weights: Tensor, slope: float, likelihood_weight: Tensor
) -> tuple[float, float]:
    """Return the lowest cross-validated cross-entropy, and the regularisation that gives it."""
    results = []
    for regularisation in REGULARISATIONS:
        entropy = 0.0
        for fold in windows.folds.unique():
            aside = windows.folds == fold
            heads = _solve(windows, windows.weights(~aside), slope, regularisation, likelihood_weight)
            entropy += float(_cross_entropy(heads, windows, weights * aside, slope))
        results.append((entropy, regularisation))
    return min(results)


def _solve(
    windows: _Windows, weights: Tensor, slope: float, regularisation: float, likelihood_weight: Tensor | None = None
) -> _Heads:
    """Minimise the cross-entropy plus `regularisation` times the penalised squared norm of the weights.

    The weight of the likelihood is fitted too, unless it is given.
    """
    inputs, classes = windows.inputs.shape[1], windows.likelihood.shape[1]
    # In these units the penalty is isotropic; otherwise the optimizer stops far from the optimum.
    unit = 1 / (regularisation * windows.penalties).sqrt().unsqueeze(1)
    scaled_weight = torch.zeros(inputs, classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    # Differences in likelihood are thousandths per base: with this scale its weight is of order one.
    scaled_likelihood_weight = torch.ones((), requires_grad=True)
    parameters = [scaled_weight, bias, *([scaled_likelihood_weight] if likelihood_weight is None else [])]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def heads() -> _Heads:
        return _Heads(
            scaled_weight * unit,
            bias,
            scaled_likelihood_weight * REFERENCE_LENGTH_BP if likelihood_weight is None else likelihood_weight,
        )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _cross_entropy(heads(), windows, weights, slope) + scaled_weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    solved = heads()
    return _Heads(solved.weight.detach(), solved.bias.detach(), solved.likelihood_weight.detach())


@torch.no_grad()
def _heads_of(model: SpeciesClassifier, scaling: _Scaling) -> _Heads:
    """Return the model's current heads, for standardised inputs."""
    tables = [table[:-1] for table in model.context_evidence.parameters()]
    weight = torch.cat([model.deviation.weight.t(), *tables]) * DEVIATION_SCALE
    bias = model.deviation.bias * DEVIATION_SCALE + scaling.mean @ weight
    return _Heads(weight * scaling.spread.unsqueeze(1), bias, torch.tensor(1.0))


@torch.no_grad()
def _put_into(model: SpeciesClassifier, heads: _Heads, scaling: _Scaling) -> None:
    """Write fitted heads into a model, whose likelihood has weight 1, and set the confidence to match."""
    weight = heads.weight / scaling.spread.unsqueeze(1) / heads.likelihood_weight / DEVIATION_SCALE
    bias = heads.bias / heads.likelihood_weight / DEVIATION_SCALE - scaling.mean @ weight
    deviation, *tables = weight.split(_input_sizes(model))
    model.deviation.weight.copy_(deviation.t())
    model.deviation.bias.copy_(bias)
    for table, values in zip(model.context_evidence.parameters(), tables, strict=True):
        table[:-1] = values
    model.confidence_intercept.copy_(heads.likelihood_weight.log())
