"""The reference for training on a long sequence: one backward pass over all of it, in unbounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambacore.longsequence.losses import Loss, share_of_loss
from mambacore.state import detached


class LongSequenceResult(NamedTuple):
    """Result of a backward pass over a long sequence, besides the gradients."""

    loss: Tensor  # (), float64, detached, without the scale
    state: Any  # the model's state after the last position, detached


def backward_at_once(
    model: Callable[..., tuple[Any, Any]],
    sequence: Tensor,
    loss: Loss,
    *,
    state: Any = None,
    sequence_starts: Tensor | None = None,
    scale: float = 1.0,
) -> LongSequenceResult:
    """The definition of `mambacore.longsequence.backward_in_pieces`: the whole sequence in one piece.

    Args:
        model, sequence, loss, state, sequence_starts, scale: as there.

    Returns:
        The loss and the final state. `scale` times its gradient is added to `.grad` of everything that the loss depends
        on.

    """
    starts = {} if sequence_starts is None else {"sequence_starts": sequence_starts}
    with torch.enable_grad():
        outputs, final_state = model(sequence, state, **starts)
        whole, _ = share_of_loss(loss, outputs, slice(0, sequence.shape[1]), None, is_last=True)
        assert whole is not None  # only pieces before the last one may have no share
        (scale * whole).backward()
    return LongSequenceResult(whole.detach().double(), detached(final_state))
