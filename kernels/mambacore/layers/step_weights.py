"""Weights of linear layers as programs of native steps read them (kernels/native/panels.h)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.layers.step_layout import PADDING, padded

WEIGHT_FORMATS: Final = ("float32", "bfloat16", "int8", "mixed")
"""What a program may keep the weights of linear layers in, instead of the model's dtype. `mixed` is int8 in groups of
positions, whose weights are read rarely and so come from further away, and bfloat16 at every position."""

LARGEST_INT8: Final = 127
_OFFSET: Final = 128  # int8 weights are kept as unsigned bytes
_GROUP_OF: Final = {torch.bfloat16: 2, torch.int8: 4}  # neighbouring inputs that are kept together; else one
# An output in int8 is a sum of 32-bit integers: at most this many products of 255 and 127, beside their offset.
WIDEST_INT8: Final = (2**31 - 1) // (LARGEST_INT8 * (255 + _OFFSET))


def weight_dtype(weight_format: str, in_group: bool) -> torch.dtype:
    """What one of `WEIGHT_FORMATS` is in or outside of a group of positions."""
    if weight_format == "mixed":
        return torch.int8 if in_group else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[weight_format]


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row (outputs, inputs) to multiples of a 127th of its largest magnitude.

    Returns:
        The multiples, in int8, and the scales (outputs,), in float32.
    """
    rows = weight.detach().float()
    largest = rows.abs().amax(1)
    scales = torch.where(largest > 0, largest / LARGEST_INT8, torch.ones_like(largest))
    return (rows / scales.unsqueeze(1)).round().to(torch.int8), scales


def rounded_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a matrix becomes in float32, bfloat16 or int8, as float32."""
    if dtype == torch.int8:
        rows, scales = int8_rows(weight)
        return rows * scales.unsqueeze(1)
    return weight.detach().to(dtype).float()


def rounded_inputs(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """What (..., inputs) a layer with weights of this dtype multiplies, as float32.

    Weights in bfloat16 meet inputs in bfloat16 where the processor multiplies them, weights in int8 inputs that are
    multiples of a 127th of their largest magnitude.
    """
    if dtype == torch.int8:
        largest = inputs.abs().amax(-1, keepdim=True)
        return (inputs * torch.where(largest > 0, LARGEST_INT8 / largest, 0)).round() * (largest / LARGEST_INT8)
    return inputs.to(dtype).float()


def panels(weight: Tensor, dtype: torch.dtype, parts: int = 1) -> Tensor:
    """A matrix (outputs, inputs) as bytes in panels of 16 outputs.

    Args:
        weight: the matrix.
        dtype: to keep it in.
        parts: of the outputs, each padded to whole panels: 2 for a projection to values and their gates.

    Raises:
        ValueError: a matrix too wide for sums of int8 products.
    """
    group, inputs = _GROUP_OF.get(dtype, 1), weight.shape[1]
    scales = None
    if dtype == torch.int8:
        if inputs > WIDEST_INT8:
            raise ValueError(f"a layer of {inputs:,} inputs is too wide for int8; keep it in bfloat16")
        numbers, scales = int8_rows(weight)
        # Outputs past the last one are zeros, so the offset comes first.
        kept = torch.full((_panelled(weight.shape[0], parts), -(-inputs // group) * group), _OFFSET, dtype=torch.uint8)
        kept[_rows(weight.shape[0], parts), :inputs] = (numbers.to(torch.int16) + _OFFSET).to(torch.uint8)
    else:
        kept = torch.zeros(_panelled(weight.shape[0], parts), -(-inputs // group) * group, dtype=dtype)
        kept[_rows(weight.shape[0], parts), :inputs] = weight.detach().to(dtype)
    in_panels = kept.unflatten(0, (-1, PADDING)).unflatten(2, (-1, group)).transpose(1, 2).contiguous()
    content = in_panels.view(torch.uint8).flatten(1)
    if scales is not None:
        row_scales = in_parts(scales, parts)
        content = torch.cat([content, row_scales.view(-1, PADDING).view(torch.uint8)], dim=1)
    return content.contiguous()


def in_parts(numbers: Tensor, parts: int = 1) -> Tensor:
    """Numbers per output (outputs,), each of so many parts padded with zeros to whole panels."""
    each = numbers.shape[0] // parts
    return F.pad(numbers.detach().reshape(parts, each), (0, padded(each) - each)).flatten()


def _panelled(outputs: int, parts: int) -> int:
    return parts * padded(outputs // parts)


def _rows(outputs: int, parts: int) -> Tensor:
    """Where the outputs are among those of all panels."""
    each = outputs // parts
    return torch.cat([torch.arange(each) + part * padded(each) for part in range(parts)])
