"""Inputs for tests of the scan."""

import torch
from torch import Tensor


def scan_arguments(
    batch: int, length: int, channels: int, state_size: int, groups: int = 1, seed: int = 0, everything: bool = True
) -> dict[str, Tensor]:
    """Float64 arguments of ``selective_scan`` with step sizes and decays as in a trained model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    required = {
        "inputs": normal(batch, length, channels),
        "step_size": normal(batch, length, channels) - 2,
        "state_matrix": -torch.rand(channels, state_size, generator=generator, dtype=torch.float64) * 4 - 0.1,
        "input_matrix": normal(batch, length, groups, state_size),
        "output_matrix": normal(batch, length, groups, state_size),
    }
    optional = {
        "skip_weight": normal(channels),
        "gate": normal(batch, length, channels),
        "step_bias": normal(channels),
        "initial_state": normal(batch, channels, state_size),
    }
    return required | optional if everything else required


def leaves(arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies in another dtype that want a gradient."""
    return {name: tensor.to(dtype).clone().requires_grad_() for name, tensor in arguments.items()}
