"""Outputs and all gradients of an operator, for comparing one implementation with another."""

import torch
from torch import Tensor

from scan_cases import leaves


def gradients_of(function, arguments: dict[str, Tensor], dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Outputs, final state and all gradients of ``function``, for fixed gradients of both, in the given dtype."""
    inputs = leaves(arguments, dtype)
    outputs, state = function(**inputs, **options)
    generator = torch.Generator().manual_seed(99)
    seeds = [
        torch.randn(tensor.shape, generator=generator, dtype=torch.complex128 if tensor.is_complex() else torch.float64)
        for tensor in (outputs, state)
    ]
    grads = torch.autograd.grad(
        [outputs, state],
        list(inputs.values()),
        [seed.to(tensor.dtype) for seed, tensor in zip(seeds, (outputs, state), strict=True)],
    )
    return dict(zip(["outputs", "final_state", *inputs], [outputs, state, *grads], strict=True))
