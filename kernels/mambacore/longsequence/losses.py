"""Losses over a sequence processed in pieces: additive shares, or one loss on a pooled result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.devices import widened
from mambacore.errors import InputError
from mambacore.layers.pooling import POOLINGS

# The class that PyTorch's cross-entropy ignores by default.
IGNORED = -100


class PooledLoss:
    """A loss on the pooled outputs of the whole sequence.

    Args:
        function: maps pooled outputs (batch, channels) to the loss, a scalar. It may have parameters, such as a head.
        pooling: `"mean"` or `"last"` (`mambacore.layers.POOLINGS`); any causal `(outputs, state) -> (pooled,
            state)`; or None for a model that pools by itself, whose outputs at the last piece are then the argument.

    Raises:
        InputError: if the name of the pooling is unknown.
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
        """Pool the outputs of a piece; return the result so far and the state of the pooling."""
        return (outputs, None) if self.pooling is None else self.pooling(outputs, state)


# A share of the loss from the outputs of a piece and the positions that they are of; or a pooled loss.
Loss = Callable[[Any, slice], Tensor] | PooledLoss


def share_of_loss(
    loss: Loss, outputs: Any, positions: slice, pooling_state: Any, is_last: bool
) -> tuple[Tensor | None, Any]:
    """Return a piece's share of the loss (None for nothing), and the state of the pooling.

    Raises:
        ValueError: if the loss is not a scalar.
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
    """The mean cross-entropy over all positions, in shares: the sum over a piece divided by the total weight.

    Call it with logits (batch, positions, classes), computed in float32 at least, and the slice of positions.

    Args:
        targets: (batch, length), integers: the class to predict at each position.
        weights: (batch, length), non-negative weight of each position; 0 ignores it. The loss is the weighted mean.
        ignored: positions with this target are ignored. If all are, the loss and its gradient are 0.

    Raises:
        ValueError: if the weights do not fit the targets or are negative.
    """

    def __init__(self, targets: Tensor, weights: Tensor | None = None, ignored: int = IGNORED) -> None:
        if targets.dim() != 2:
            raise ValueError(f"targets must be (batch, length) but has shape {tuple(targets.shape)}")
        if weights is not None and weights.shape != targets.shape:
            raise ValueError(
                f"weights must have the shape {tuple(targets.shape)} of the targets but has {tuple(weights.shape)}"
            )
        if weights is not None and bool((weights < 0).any()):
            raise ValueError("weights must not be negative; use 0 to ignore a position")
        self.targets, self.weights, self.ignored = targets, weights, ignored
        counted = targets != ignored
        total = float(counted.sum() if weights is None else (widened(weights) * counted).sum())
        self.total_weight = total if total > 0 else 1.0

    def __call__(self, logits: Tensor, positions: slice) -> Tensor:
        """Return the contribution to the loss, a scalar, of the logits at `positions`."""
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
        # A product with 0 would turn an infinite loss of an ignored position into NaN.
        return torch.where(weights > 0, losses * weights, 0.0).sum() / self.total_weight


def next_token_targets(tokens: Tensor, sequence_starts: Tensor | None = None, ignored: int = IGNORED) -> Tensor:
    """Return the next token of each position, (batch, length).

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
    """Return the loss of a language model: the mean cross-entropy of next tokens.

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
    """Return the loss of a classifier: the mean cross-entropy over the batch of logits of the pooled outputs.

    Args:
        labels: (batch,), integers; rows labelled `ignored` are ignored, and the loss is 0 if all are.
        head: maps pooled outputs (batch, channels) to logits (batch, classes); None if the model's outputs are logits.
        pooling: see `PooledLoss`.
    """
    count = max(1, int((labels != ignored).sum()))

    def function(pooled: Tensor) -> Tensor:
        logits = _widened(pooled if head is None else head(pooled))
        return F.cross_entropy(logits, labels.to(logits.device), ignore_index=ignored, reduction="sum") / count

    return PooledLoss(function, pooling)


def _widened(logits: Tensor) -> Tensor:
    """Convert to at least float32: a sum over a piece needs more than 8 bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
