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


def complex_scan_arguments(
    batch: int, length: int, channels: int, state_size: int, groups: int = 1, seed: int = 0, everything: bool = True
) -> dict[str, Tensor]:
    """The same with a complex state: complex128 matrices and initial state."""
    arguments = scan_arguments(batch, length, channels, state_size, groups, seed, everything)
    generator = torch.Generator().manual_seed(seed + 1)
    for name in ("state_matrix", "input_matrix", "output_matrix", "initial_state"):
        if name in arguments:
            real = arguments[name]
            imaginary = torch.randn(real.shape, generator=generator, dtype=torch.float64)
            arguments[name] = torch.complex(real, 6 * imaginary if name == "state_matrix" else imaginary)
    return arguments


def time_invariant(arguments: dict[str, Tensor], names: tuple[str, ...], seed: int = 0) -> dict[str, Tensor]:
    """The same with the named matrices replaced by random ones of shape (channels, state_size)."""
    generator = torch.Generator().manual_seed(seed + 2)
    like = arguments["state_matrix"]
    return arguments | {name: torch.randn(like.shape, generator=generator, dtype=like.dtype) for name in names}


def random_starts(batch: int, length: int, share: float = 0.03, seed: int = 0) -> Tensor:
    """Where records begin, (batch, length), boolean; only the first row goes on from an incoming state."""
    generator = torch.Generator().manual_seed(seed + 3)
    starts = torch.rand(batch, length, generator=generator) < share
    starts[:, 0] = torch.arange(batch) > 0
    return starts


def leaves(arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies in another dtype (complex ones in the complex numbers over it) that want a gradient."""
    return {
        name: tensor.to(dtype.to_complex() if tensor.is_complex() else dtype).clone().requires_grad_()
        for name, tensor in arguments.items()
    }
