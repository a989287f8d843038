"""What a model computes must be numbers: finite weights may still overflow, and NaN would look like a result."""

from __future__ import annotations

import torch
from torch import Tensor

from mambacore.errors import InputError


def require_numbers(computed: Tensor, what: str) -> Tensor:
    """Return what a model has computed.

    Args:
        computed: any shape.
        what: what it is, for the message.

    Raises:
        InputError: if any of it is NaN.
    """
    if bool(torch.isnan(computed).any()):
        raise InputError(
            f"the model computes {what} that are not numbers (NaN): its weights are damaged or far too large, or the "
            "precision is too low; use another model, or --precision float32."
        )
    return computed
