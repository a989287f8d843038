"""Losses over a sequence that arrives in pieces: shares that add up, or one loss on what was pooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.errors import InputError
from mambacore.layers.pooling import POOLINGS

# The class that PyTorch's cross entropy ignores by default.
IGNORED = -100


class PooledLoss:
    """A loss on what is pooled over the whole sequence.

    Args:
        function: the pooled outputs (batch, channels) to the loss, a scalar. It may hold parameters, such as a head's.
        pooling: `"mean"` or `"last"` (`mambacore.layers.POOLINGS`); any causal `(outputs, state) -> (pooled,
            state)`; or None for a model that pools by itself, whose outputs at the last piece are then the argument.

    Raises:
        InputError: an unknown name of a pooling.
    """

    def __init__(
        self,
        function: Callable[[Any], Tensor],
        pooling: str | Callable[[Any, Any], tuple[Any, Any]] | None = "mean",
    ) -> None:
        if isinstance(pooling, str):
            if pooling not in POOLINGS:
                raise InputError(f"there is no pooling {pooling!r}; choose {' or '.join(POOLINGS)}")
            pooling = POOLINGS[pooling]()
        self.function = function
        self.pooling = pooling

    def pool(self, outputs: Any, state: Any) -> tuple[Any, Any]:
        """What is pooled after these outputs of a piece, and the state of the pooling."""
        return (outputs, None) if self.pooling is None else self.pooling(outputs, state)


# A share of the loss from the outputs of a piece and the positions that they are of; or a pooled loss.
Loss = Callable[[Any, slice], Tensor] | PooledLoss


def share_of_loss(
    loss: Loss, outputs: Any, positions: slice, pooling_state: Any, is_last: bool
) -> tuple[Tensor | None, Any]:
    """What a piece adds to the loss (None for nothing), and the state of the pooling after it.

    Raises:
        ValueError: the loss is not a scalar.
    """
    if isinstance(loss, PooledLoss):
        pooled, pooling_state = loss.pool(outputs, pooling_state)
        share = loss.function(pooled) if is_last else None
    else:
        share = loss(outputs, positions)
    if share is not None and (not isinstance(share, Tensor) or share.dim() > 0):
        given = f"a tensor of shape {tuple(share.shape)}" if isinstance(share, Tensor) else f"a {type(share).__name__}"
        raise ValueError(f"the loss must return a scalar tensor but returned {given}; sum it over the piece")
    return share, pooling_state


class TokenCrossEntropy:
    """The mean cross entropy over all positions, in shares: those of a piece are summed and divided by the whole.

    Call it with logits (batch, positions, classes), computed in float32 at least, and the slice of positions.

    Args:
        targets: (batch, length), integers: the class to predict at each position.
        weights: (batch, length), the weight of each position, not negative; 0 leaves it out. The loss is the weighted
            mean.
        ignored: positions with this target are left out. When all of them are, the loss is 0, and so is its gradient.

    Raises:
        ValueError: weights that do not fit the targets or are negative.
    """

    def __init__(self, targets: Tensor, weights: Tensor | None = None, ignored: int = IGNORED) -> None:
        if targets.dim() != 2:
            raise ValueError(f"targets must be (batch, length) but has shape {tuple(targets.shape)}")
        if weights is not None and weights.shape != targets.shape:
            raise ValueError(
                f"weights must have the shape {tuple(targets.shape)} of the targets but has {tuple(weights.shape)}"
            )
        if weights is not None and bool((weights < 0).any()):
            raise ValueError("weights must not be negative; leave a position out with the weight 0")
        self.targets, self.weights, self.ignored = targets, weights, ignored
        counted = targets != ignored
        total = float(counted.sum() if weights is None else (weights.double() * counted).sum())
        self.total_weight = total if total > 0 else 1.0

    def __call__(self, logits: Tensor, positions: slice) -> Tensor:
        """The part of the loss, a scalar, that the logits at `positions` contribute."""
        targets = self.targets[:, positions].to(logits.device)
        if logits.shape[:-1] != targets.shape:
            raise ValueError(
                f"logits must be {tuple(targets.shape)} and classes to fit the targets of positions {positions.start} "
                f"to {positions.stop} but has shape {tuple(logits.shape)}"
            )
        logits, targets = _widened(logits).flatten(0, 1), targets.flatten()
        if self.weights is None:
            return F.cross_entropy(logits, targets, ignore_index=self.ignored, reduction="sum") / self.total_weight
        losses = F.cross_entropy(logits, targets, ignore_index=self.ignored, reduction="none")
        weights = self.weights[:, positions].to(losses).flatten()
        # A product with 0 would turn the infinite loss of a position that is left out into a NaN.
        return torch.where(weights > 0, losses * weights, 0.0).sum() / self.total_weight


def next_token_targets(tokens: Tensor, sequence_starts: Tensor | None = None, ignored: int = IGNORED) -> Tensor:
    """For each position the token after it: (batch, length) to the same shape.

    Nothing follows the last position, nor the one before a record's start (`sequence_starts`, see
    `mambacore.packing`): there the target is `ignored`.
    """
    targets = torch.full_like(tokens, ignored)
    targets[:, :-1] = tokens[:, 1:]
    if sequence_starts is not None:
        targets[:, :-1].masked_fill_(sequence_starts[:, 1:].to(targets.device), ignored)
    return targets


def next_token_cross_entropy(
    tokens: Tensor, sequence_starts: Tensor | None = None, weights: Tensor | None = None, ignored: int = IGNORED
) -> TokenCrossEntropy:
    """The loss of a language model: the mean cross entropy of each next token.

    Args:
        tokens: (batch, length), the sequence itself.
        sequence_starts: (batch, length), boolean: no record predicts the first token of the next.
        weights: (batch, length): the weight of predicting the token *after* each position.
        ignored: this token (padding, for example) is not predicted.
    """
    return TokenCrossEntropy(next_token_targets(tokens, sequence_starts, ignored), weights, ignored)


def pooled_cross_entropy(
    labels: Tensor,
    head: nn.Module | Callable[[Tensor], Tensor] | None = None,
    pooling: str | Callable[[Any, Any], tuple[Any, Any]] | None = "mean",
    ignored: int = IGNORED,
) -> PooledLoss:
    """The loss of a classifier: the mean cross entropy over the batch of logits read from the pooled outputs.

    Args:
        labels: (batch,), integers; rows labelled `ignored` are left out, and the loss is 0 if all of them are.
        head: the pooled outputs (batch, channels) to logits (batch, classes); None if the model's outputs are logits.
        pooling: see `PooledLoss`.
    """
    count = max(1, int((labels != ignored).sum()))

    def function(pooled: Tensor) -> Tensor:
        logits = _widened(pooled if head is None else head(pooled))
        return F.cross_entropy(logits, labels.to(logits.device), ignore_index=ignored, reduction="sum") / count

    return PooledLoss(function, pooling)


def _widened(logits: Tensor) -> Tensor:
    """In float32 at least: a sum over a piece needs more than 8 bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
