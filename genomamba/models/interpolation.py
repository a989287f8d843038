"""A trained causal model interpolated with an n-gram (Markov) model of the same training bases.

Layers learn frequent patterns; rare ones, such as transposons, are captured by counts of long words. The two are
multiplied (a product of experts, Hinton 2002, Neural Computation 14:1771, equation 1)::

    logits(b) = a * layers(b) + w(c) * (log P(b | c) + log 4)

with c the last bases, P an interpolated Markov model, and w one weight for each range of max P(. | c). The few weights
are fitted on the validation split, because P was counted on the training bases and would be overweighted there. The
result is an ordinary `CausalLanguageModel` whose table of output contexts holds the second term.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genomamba.baselines.interpolated_markov import fit_markov_models, log_probability_table
from genomamba.models.language_model import BASE_COUNT, FIRST_BASE_TOKEN, base_log_probabilities
from genomamba.tokenizer import Tokens
from mambacore.devices import device_of
from mambacore.models import CausalLanguageModel

PEAKS: Final = (0.32, 0.36, 0.42, 0.5, 0.65, 0.85)
"""Boundaries of the ranges of the highest base probability, each of which has its own weight."""
_MOST_ITERATIONS: Final = 60
_PIECE_LENGTH: Final = 16_384


@dataclasses.dataclass(frozen=True)
class CountedFit:
    """Result of the interpolation: nats per base on the validation windows before and after, and the weights."""

    bases: int
    nats_before: float
    nats_after: float
    weight_of_layers: float
    weights_of_counts: tuple[float, ...]

    def summary(self) -> str:
        """Summarise in one line for the user."""
        return (
            f"interpolated with an n-gram model: held-out perplexity {math.exp(self.nats_before):.4f} becomes "
            f"{math.exp(self.nats_after):.4f}"
        )


def join_counts(
    model: CausalLanguageModel, order: int, training: Iterable[Tokens], validation: Sequence[Tokens]
) -> tuple[CausalLanguageModel, CountedFit]:
    """Return a new model: the trained one interpolated with a Markov model of the training bases.

    Args:
        model: trained model with an untied head and without output contexts; not changed.
        order: order of the Markov model, whose 4^order contexts become a table.
        training: sequences to count, on both strands.
        validation: windows for fitting the Markov model's strengths and then the weights.
    """
    markov = fit_markov_models(training, validation, order).models[-1]
    table = torch.from_numpy(log_probability_table(markov))
    ranges = torch.bucketize(table.exp().amax(dim=1), torch.tensor(PEAKS))
    joined = _with_table(model, order)
    contexts = joined.output_contexts
    assert contexts is not None
    layers, rows, targets = [], [], []
    for window in validation:
        tokens = torch.from_numpy(window).long().unsqueeze(0)
        numbers = contexts.context_numbers(tokens - FIRST_BASE_TOKEN)[0][0][0, :-1]
        following = tokens[0, 1:] - FIRST_BASE_TOKEN
        counted = (numbers < len(table)) & (following >= 0) & (following < BASE_COUNT)
        layers.append(_base_log_probabilities(model, tokens)[:-1][counted])
        rows.append(numbers[counted])
        targets.append(following[counted])
    row, target = torch.cat(rows), torch.cat(targets)
    weights, before, after = _fit(torch.cat(layers), table[row] + math.log(BASE_COUNT), ranges[row], target)
    fit = CountedFit(len(target), before, after, float(weights[0]), tuple(weights[1:].tolist()))
    with torch.no_grad():
        assert joined.head is not None
        joined.head.weight[:, : model.config.model_width] *= fit.weight_of_layers
        weight = cast(nn.Embedding, contexts.tables[0]).weight
        weight[:-1] = (table + math.log(BASE_COUNT)) * weights[1:].float()[ranges].unsqueeze(1)
    return joined.eval().to(device_of(model)), fit


def _with_table(model: CausalLanguageModel, order: int) -> CausalLanguageModel:
    """Return the same model with an empty table of output contexts."""
    with torch.random.fork_rng(devices=[]):
        joined = CausalLanguageModel(dataclasses.replace(model.config, output_context_widths=(order,)))
    state = joined.state_dict()
    for name, tensor in model.state_dict().items():
        state[name][tuple(slice(size) for size in tensor.shape)] = tensor
    joined.load_state_dict(state)
    return joined


@torch.no_grad()
def _base_log_probabilities(model: CausalLanguageModel, tokens: Tensor) -> Tensor:
    """Return log-probabilities of the base after each position, (length, 4), in the memory of a piece."""
    parts, state = [], cast(Any, None)
    for piece in tokens.split(_PIECE_LENGTH, dim=1):
        logits, state = model(piece.to(device_of(model)), state)
        parts.append(base_log_probabilities(logits)[0].cpu())
    return torch.cat(parts)


def _fit(layers: Tensor, counts: Tensor, ranges: Tensor, targets: Tensor) -> tuple[Tensor, float, float]:
    """Fit the weights of the layers and of each range; also return the cross-entropy (nats) before and after."""
    weights = torch.zeros(2 + len(PEAKS), dtype=torch.float64)
    weights[0] = 1
    before = float(F.cross_entropy(layers, targets))
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_MOST_ITERATIONS, line_search_fn="strong_wolfe")

    def entropy() -> Tensor:
        narrow = weights.float()
        return F.cross_entropy(narrow[0] * layers + narrow[1:][ranges].unsqueeze(1) * counts, targets)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = entropy()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return weights.detach(), before, float(entropy())
