"""Pooling over the length, as causal functions with a state: what a classification head reads."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class PoolingState(NamedTuple):
    """Everything pooled so far: the sum (batch, channels) in float64, which ten million terms do not wear out, and the
    number of positions; for last pooling, the last position and 1."""

    total: Tensor
    positions: int


class MeanPooling(nn.Module):
    """The mean over all positions so far."""

    def forward(self, sequence: Tensor, state: PoolingState | None = None) -> tuple[Tensor, PoolingState]:
        """(batch, length, channels) and what was pooled before to the mean (batch, channels) and the new state."""
        total, positions = sequence.sum(dim=1, dtype=torch.float64), sequence.shape[1]
        if state is not None:
            total, positions = total + state.total, positions + state.positions
        return (total / max(positions, 1)).to(sequence.dtype), PoolingState(total, positions)


class LastPooling(nn.Module):
    """The last position so far."""

    def forward(self, sequence: Tensor, state: PoolingState | None = None) -> tuple[Tensor, PoolingState]:
        """(batch, length, channels) and what was pooled before to the last position (batch, channels) and the state."""
        if sequence.shape[1] > 0:
            state = PoolingState(sequence[:, -1].double(), 1)
        elif state is None:
            state = PoolingState(sequence.new_zeros(sequence.shape[0], sequence.shape[2], dtype=torch.float64), 0)
        return state.total.to(sequence.dtype), state


POOLINGS: dict[str, type[MeanPooling] | type[LastPooling]] = {"mean": MeanPooling, "last": LastPooling}
