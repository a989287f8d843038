"""Inputs for tests of the state space dual scan."""

import torch
from torch import Tensor

REQUIRED = ("inputs", "log_decay", "input_matrix", "output_matrix")


def ssd_arguments(
    batch: int,
    length: int,
    heads: int = 2,
    head_width: int = 5,
    state_size: int = 4,
    groups: int = 1,
    rank: int | None = None,
    seed: int = 0,
    everything: bool = True,
) -> dict[str, Tensor]:
    """Float64 arguments of `ssd_scan` with decays as in a trained model; `rank` None is without that dimension."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    outer = (batch, length) if rank is None else (batch, length, rank)
    required = {
        "inputs": normal(*outer, heads, head_width),
        "log_decay": -0.3 * normal(batch, length, heads).square(),
        "input_matrix": normal(*outer, groups, state_size),
        "output_matrix": normal(*outer, groups, state_size),
    }
    optional = {
        "input_weight": normal(batch, length, heads).abs(),
        "own_weight": normal(batch, length, heads),
        "skip_weight": normal(heads),
        "initial_state": normal(batch, heads, head_width, state_size),
    }
    return required | optional if everything else required
