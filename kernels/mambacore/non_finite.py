"""Infinities and NaN stay causal where a chunk of positions is one product of matrices.

A product under a causal mask multiplies what lies in the future by zero, and zero times infinity is NaN: one value that
is not finite would reach earlier positions, and other records. What goes into such a product is therefore cleaned, and
the results are spoiled again from the first such position of their record on. What a model computes in the end must be
numbers (`require_numbers`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambacore.errors import InputError


def taint_of(values: Tensor, dimension: int | tuple[int, ...] = -1) -> Tensor:
    """Zero where all values along a dimension, which is then 1 long, are finite, else NaN; without a gradient."""
    values = values.detach()
    return (values - values).sum(dimension, keepdim=True)


def cleaned(values: Tensor) -> Tensor:
    """The values, with zeros for those that are not finite."""
    return values.nan_to_num(0.0, 0.0, 0.0)


def spoiled_since(taint: Tensor, record: Tensor | None = None, dimension: int = -1) -> Tensor:
    """What to add to the results of a causal product: zero, and NaN from the first tainted position of a record on.

    Args:
        taint: zero or NaN (`taint_of`) of every position.
        record: integers of the same number of dimensions that do not fall along the positions
            (`mambacore.packing.record_numbers`); one record if absent.
        dimension: along which the positions lie.
    """
    if record is None:
        return taint.cumsum(dimension)
    lowest = torch.iinfo(record.dtype).min
    last_tainted = torch.where(taint.isnan(), record, lowest).cummax(dimension).values
    return torch.zeros_like(taint).masked_fill(last_tainted == record, torch.nan)


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
            "precision is too low; use another model, or compute in float32"
        )
    return computed
