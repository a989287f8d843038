"""Pooling over the length, as causal functions with a state: the input of classification heads.

Inside `mambacore.parallel.context_parallel` the result is that of the whole sequence, the same on every rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mambacore.devices import wide_dtype, widened
from mambacore.parallel import RankGroup, active_ranks, gather_over_ranks


class PoolingState(NamedTuple):
    """State of a pooling: the sum (batch, channels) in float64, exact over ten million terms, and the number of
    positions; for last pooling, the last position and 1."""

    total: Tensor
    positions: int


class MeanPooling(nn.Module):
    """The mean over all positions so far."""

    def forward(self, sequence: Tensor, state: PoolingState | None = None) -> tuple[Tensor, PoolingState]:
        """Map (batch, length, channels) and the incoming state to the mean (batch, channels) and the outgoing state."""
        ranks, before = active_ranks(), _before(sequence, state)
        total, positions = (
            sequence.sum(dim=1, dtype=wide_dtype(sequence.device)) + before.total,
            sequence.shape[1] + before.positions,
        )
        if ranks is not None:
            totals, counts = _of_all_ranks(ranks, total, positions)
            total, positions = totals.sum(0), sum(counts)
        return (total / max(positions, 1)).to(sequence.dtype), PoolingState(total, positions)


class LastPooling(nn.Module):
    """The last position so far."""

    def forward(self, sequence: Tensor, state: PoolingState | None = None) -> tuple[Tensor, PoolingState]:
        """Map (batch, length, channels) and the incoming state to the last position (batch, channels) and the state."""
        ranks, last = active_ranks(), _before(sequence, state)
        if sequence.shape[1] > 0:
            # Selected from a stack so that backward reaches the state on all ranks, even without new positions.
            last = PoolingState(torch.stack([last.total, widened(sequence[:, -1])])[1], 1)
        if ranks is not None:
            lasts, counts = _of_all_ranks(ranks, last.total, last.positions)
            filled = [rank for rank in range(ranks.count) if counts[rank] > 0]
            last = PoolingState(lasts[filled[-1] if filled else 0], counts[filled[-1]] if filled else 0)
        return last.total.to(sequence.dtype), last


def _before(sequence: Tensor, state: PoolingState | None) -> PoolingState:
    """Return the state before this process's positions: empty, unless the whole sequence begins here.

    It always depends (with zero gradients) on the sequence and the state, because backward has to reach their exchanges
    on every rank.
    """
    nothing = PoolingState(sequence[:, :0].sum(dim=1, dtype=wide_dtype(sequence.device)), 0)
    ranks = active_ranks()
    if state is None or ranks is None:
        return nothing if state is None else state
    chosen = ranks.is_first(reverse=False)
    return PoolingState(torch.stack([nothing.total, state.total])[int(chosen)], state.positions if chosen else 0)


def _of_all_ranks(ranks: RankGroup, pooled: Tensor, positions: int) -> tuple[Tensor, list[int]]:
    """Return the pooled values of all ranks, (ranks, batch, channels), and their numbers of positions."""
    totals, counts = gather_over_ranks(ranks, pooled, pooled.new_tensor(positions))
    return totals, [int(count) for count in counts.tolist()]


POOLINGS: dict[str, type[MeanPooling] | type[LastPooling]] = {"mean": MeanPooling, "last": LastPooling}
