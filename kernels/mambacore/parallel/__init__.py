"""Context parallelism: every rank holds a part of a sequence, and ranks exchange states, not activations."""

from mambacore.parallel.context import RankGroup, active_ranks, context_parallel, ranks_of, stretch_of
from mambacore.parallel.exchange import (
    gather_over_ranks,
    history_over_ranks,
    positions_over_ranks,
    recurrence_over_ranks,
    state_over_ranks,
)
from mambacore.parallel.operators import convolution_over_ranks, scan_over_ranks, ssd_over_ranks
from mambacore.parallel.training import part_of_mean, sum_gradients

__all__ = [
    "RankGroup",
    "active_ranks",
    "context_parallel",
    "convolution_over_ranks",
    "gather_over_ranks",
    "history_over_ranks",
    "part_of_mean",
    "positions_over_ranks",
    "ranks_of",
    "recurrence_over_ranks",
    "scan_over_ranks",
    "ssd_over_ranks",
    "state_over_ranks",
    "stretch_of",
    "sum_gradients",
]
