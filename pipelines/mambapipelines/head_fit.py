"""The last step of training: the classes' heads are fitted again, all at once, by regularised logistic regression.

Pooled over a window, a classifier's evidence is linear in what its heads read: the mean likelihood under each class,
the mean features of the layers, and the spectrum of short contexts. With the layers done, the best heads are therefore
the solution of a convex problem, found exactly where gradient descent with one step size for all would take far longer.
How strongly to regularise is chosen on training sequences set aside by name, as the k-mer baseline chooses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genomamba.genomes import GenomeCollection
from genomamba.models import DEVIATION_SCALE, REFERENCE_LENGTH_BP, Reading, SpeciesClassifier
from genomamba.windows import EvaluationWindow, evaluation_windows

# Stretches are read in blocks; a window is a run of neighbouring blocks.
BLOCK_BP = 4096
BLOCKS_PER_WINDOW = (1, 4, 16)
REGULARISATIONS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
SET_ASIDE_FRACTION = 0.25
ITERATIONS = 100
FEWEST_STRETCHES_PER_CLASS = 8
LONGEST_STRETCH_BP = 65_536
# Reading costs a third of training on the same bases, so this is about 3 % of a run; more than that teaches no more.
READ_FRACTION = 0.1
MOST_BASES = 33_554_432


@dataclass(frozen=True)
class HeadFit:
    """What a fit of the heads chose.

    Attributes:
        regularisation: weight of the squared norm, chosen on sequences set aside.
        cross_entropy_before, cross_entropy_after: on those sequences, mean over the window lengths, nats; with the
            heads as trained, and as fitted on the other training sequences.
        windows: stretches of training sequence that were read.
    """

    regularisation: float
    cross_entropy_before: float
    cross_entropy_after: float
    windows: int

    def summary(self) -> str:
        """One line for the user."""
        return (
            f"heads fitted again on {self.windows} stretches of training sequence: cross entropy on those set aside "
            f"{self.cross_entropy_before:.3f} before, {self.cross_entropy_after:.3f} after"
        )


@dataclass(frozen=True)
class _Statistics:
    """Means over blocks: the likelihood of each class, and everything else that heads read."""

    likelihood: Tensor  # (stretches, blocks, classes)
    inputs: Tensor  # (stretches, blocks, inputs)
    labels: Tensor  # (stretches,)

    def take(self, chosen: Tensor) -> _Statistics:
        return _Statistics(self.likelihood[chosen], self.inputs[chosen], self.labels[chosen])


@dataclass
class _Heads:
    """Logits of a mean over a window are factor(length) * (trust * likelihood + inputs @ weight + bias)."""

    weight: Tensor  # (inputs, classes)
    bias: Tensor  # (classes,)
    trust: Tensor  # ()


@dataclass(frozen=True)
class _Scaling:
    """Inputs of heads are centred and brought to a spread of one before a fit; both are (inputs,)."""

    mean: Tensor
    spread: Tensor


def fit_heads(model: SpeciesClassifier, training: GenomeCollection, bases_trained: int, seed: int) -> HeadFit | None:
    """Replace the heads of a trained model by fitted ones, if those are better on sequences set aside.

    Args:
        model: changed in place: ``deviation`` and ``context_evidence``.
        training: the sequences that the model was trained on.
        bases_trained: how many bases the run has trained on; about a tenth of them are read.
        seed: chooses stretches and what is set aside.

    Returns:
        What was chosen, or None when the sequences do not suffice (too short, or only one name) or the fit was no
        better, in which case the model is as it was.
    """
    longest = [max(item.length for item in training.sequences_of(name)) for name in training.class_names]
    blocks = min(LONGEST_STRETCH_BP, *longest) // BLOCK_BP
    bases = min(MOST_BASES, int(READ_FRACTION * bases_trained))
    per_class = bases // (len(longest) * max(blocks, 1) * BLOCK_BP)
    if blocks < 1 or per_class < FEWEST_STRETCHES_PER_CLASS or model.config.pooling != "mean":
        return None
    windows = evaluation_windows(training, blocks * BLOCK_BP, per_class, seed)
    aside = _set_aside(windows.windows, seed)
    if windows.missing_classes or aside is None:
        return None
    statistics = _read(model, windows.windows)
    scaling = _Scaling(statistics.inputs.flatten(0, 1).mean(0), statistics.inputs.flatten(0, 1).std(0).clamp(min=1e-8))
    statistics = _Statistics(
        statistics.likelihood, (statistics.inputs - scaling.mean) / scaling.spread, statistics.labels
    )
    fitting, checking = statistics.take(~aside), statistics.take(aside)
    slope = float(model.confidence_slope.detach())
    trained = _heads_of(model, scaling)
    scale = _best_scale(trained, fitting, slope)
    before = float(_cross_entropy(_scaled(trained, scale), checking, slope))
    results = []
    for regularisation in REGULARISATIONS:
        heads = _solve(fitting, slope, regularisation)
        results.append((float(_cross_entropy(heads, checking, slope)), regularisation))
    after, regularisation = min(results)
    if after >= before:
        return None
    heads = _solve(statistics, slope, regularisation)
    if float(heads.trust) <= 0:
        return None
    _put_into(model, heads, scaling)
    return HeadFit(regularisation, before, after, len(windows.windows))


def _set_aside(windows: tuple[EvaluationWindow, ...], seed: int) -> Tensor | None:
    """Which windows lie on the sequences that are set aside; those of one name go together in all classes."""
    names = sorted({window.sequence.name for window in windows})
    count = max(1, round(SET_ASIDE_FRACTION * len(names)))
    chosen = set(np.random.default_rng([seed, len(names)]).permutation(names)[:count].tolist())
    aside = torch.tensor([window.sequence.name in chosen for window in windows])
    labels = torch.tensor([window.label for window in windows])
    every_class_on_both_sides = all(
        len(labels[side].unique()) == len(labels.unique()) for side in (aside, ~aside) if len(labels)
    )
    return aside if len(names) > 1 and every_class_on_both_sides else None


@torch.no_grad()
def _read(model: SpeciesClassifier, windows: tuple[EvaluationWindow, ...]) -> _Statistics:
    """Run the model over every window and keep the means over its blocks."""
    likelihoods, inputs = [], []
    for window in windows:
        state, of_blocks = None, []
        for block in torch.from_numpy(window.tokens().copy()).split(BLOCK_BP):
            reading, state = model.read(block.unsqueeze(0), state)
            of_blocks.append(_block_means(reading, model.config.evidence_context_widths))
        likelihood, others = zip(*of_blocks, strict=True)
        likelihoods.append(torch.stack(likelihood))
        inputs.append(torch.stack(others))
    labels = torch.tensor([window.label for window in windows])
    return _Statistics(torch.stack(likelihoods), torch.stack(inputs), labels)


def _block_means(reading: Reading, context_widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean likelihood (classes,), and mean of everything else that heads read (inputs,), over one block."""
    features = (reading.features[0] * reading.known[0].unsqueeze(-1)).mean(0)
    spectra = [
        torch.bincount(numbers[0], minlength=4**width + 1)[:-1] / numbers.shape[1]
        for width, numbers in zip(context_widths, reading.contexts, strict=True)
    ]
    return reading.likelihood[0].mean(0), torch.cat([features, *spectra])


def _cross_entropy(heads: _Heads, statistics: _Statistics, slope: float) -> Tensor:
    """Mean over the window lengths of the mean cross entropy."""
    blocks = statistics.inputs.shape[1]
    evidence = heads.trust * statistics.likelihood + statistics.inputs @ heads.weight + heads.bias
    entropies = []
    for count in BLOCKS_PER_WINDOW:
        if count > blocks:
            break
        whole = evidence[:, : blocks // count * count].unflatten(1, (-1, count)).mean(2)
        factor = (count * BLOCK_BP / REFERENCE_LENGTH_BP) ** slope
        labels = statistics.labels.repeat_interleave(whole.shape[1])
        entropies.append(F.cross_entropy(whole.flatten(0, 1) * factor, labels))
    return torch.stack(entropies).mean()


def _solve(statistics: _Statistics, slope: float, regularisation: float) -> _Heads:
    """The heads with the least cross entropy plus ``regularisation`` times the squared norm of the weights."""
    classes = statistics.likelihood.shape[2]
    weight = torch.zeros(statistics.inputs.shape[2], classes, requires_grad=True)
    # The likelihood's differences are thousandths per base: so scaled, its trust is of order one for the optimizer.
    trust = torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, trust], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def heads() -> _Heads:
        return _Heads(weight, torch.zeros(classes), trust * REFERENCE_LENGTH_BP)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _cross_entropy(heads(), statistics, slope) + regularisation * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    solved = heads()
    return _Heads(solved.weight.detach(), solved.bias, solved.trust.detach())


@torch.no_grad()
def _heads_of(model: SpeciesClassifier, scaling: _Scaling) -> _Heads:
    """The model's own heads, for scaled inputs."""
    tables = [table[:-1] for table in model.context_evidence.parameters()]
    weight = torch.cat([model.deviation.weight.t(), *tables]) * DEVIATION_SCALE
    bias = model.deviation.bias * DEVIATION_SCALE + scaling.mean @ weight
    return _Heads(weight * scaling.spread.unsqueeze(1), bias, torch.tensor(1.0))


def _scaled(heads: _Heads, scale: float) -> _Heads:
    return _Heads(heads.weight * scale, heads.bias * scale, heads.trust * scale)


def _best_scale(heads: _Heads, statistics: _Statistics, slope: float) -> float:
    """The confidence that suits given heads best, so that only their direction is compared."""
    scales = [REFERENCE_LENGTH_BP * 2.0**power for power in np.arange(-6, 4, 0.5)]
    return min(scales, key=lambda scale: float(_cross_entropy(_scaled(heads, scale), statistics, slope)))


@torch.no_grad()
def _put_into(model: SpeciesClassifier, heads: _Heads, scaling: _Scaling) -> None:
    """Write fitted heads into a model whose likelihood is trusted as it is, and set the confidence to match."""
    weight = heads.weight / scaling.spread.unsqueeze(1) / heads.trust / DEVIATION_SCALE
    bias = heads.bias / heads.trust / DEVIATION_SCALE - scaling.mean @ weight
    sizes = [model.config.feature_width, *(4**width for width in model.config.evidence_context_widths)]
    deviation, *tables = weight.split(sizes)
    model.deviation.weight.copy_(deviation.t())
    model.deviation.bias.copy_(bias)
    for table, values in zip(model.context_evidence.parameters(), tables, strict=True):
        table[:-1] = values
    model.confidence_intercept.copy_(heads.trust.log())
