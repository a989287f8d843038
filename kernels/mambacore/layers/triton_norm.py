"""The root-mean-square norm's Triton kernels, forward and backward, and their adapter."""

# Compile-time switches and sizes are named like constants.
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mambacore.layout import sum_of_parts
from mambacore.triton.arithmetic import total
from mambacore.triton.launch import kernel, multiprocessors

# Numbers of a program's tile, as rows of the width.
TILE, WARPS = 2048, 4
# Backward, each program walks over many tiles and keeps the gradient of the weight, of which few parts are left.
PROGRAMS_PER_PROCESSOR = 4


@kernel
def normalise(
    inputs, weight, outputs, inverse, row_count, width, epsilon, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Outputs (rows, width) and 1 / root mean square (rows,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    mask = (rows < row_count)[:, None] & (columns < width)[None, :]
    place = rows[:, None] * width + columns[None, :]
    values = tl.load(inputs + place, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(total(values * values, 1) / width + epsilon)
    tl.store(inverse + rows, scale, mask=rows < row_count)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0)
    result = values * scale[:, None] * factor[None, :]
    tl.store(outputs + place, result.to(outputs.dtype.element_ty), mask=mask)


@kernel
def normalise_back(
    grad_outputs, inputs, weight, inverse, grad_inputs, grad_weight, row_count, width, tiles_of_program,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs (rows, width), and this program's part of that of the weight (programs, width)."""
    columns = tl.arange(0, BLOCK_WIDTH)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0)[None, :]
    sums = tl.full((BLOCK_WIDTH,), 0.0, tl.float32)
    for tile in range(tiles_of_program):
        first = (tl.program_id(0).to(tl.int64) * tiles_of_program + tile) * BLOCK_ROWS
        rows = first + tl.arange(0, BLOCK_ROWS)
        mask = (rows < row_count)[:, None] & (columns < width)[None, :]
        place = rows[:, None] * width + columns[None, :]
        grad = tl.load(grad_outputs + place, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(inputs + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(inverse + rows, mask=rows < row_count, other=0.0)[:, None]
        along = grad * values
        pull = (total(along * factor, 1) / width)[:, None] * scale * scale
        result = (grad * factor - values * pull) * scale
        tl.store(grad_inputs + place, result.to(grad_inputs.dtype.element_ty), mask=mask)
        sums += total(along * scale, 0)
    tl.store(grad_weight + tl.program_id(0) * width + columns, sums, mask=columns < width)


def _tile(rows: int, width: int) -> tuple[int, int, int]:
    """Tiles, and the rows and columns of each."""
    columns = 1 << max(width - 1, 0).bit_length()
    block = max(1, TILE // columns)
    return -(-rows // block), block, columns


def forward(inputs: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs in `dtype`, and 1 / root mean square of every row."""
    inputs, weight = inputs.contiguous(), weight.contiguous()
    outputs = inputs.new_empty(inputs.shape, dtype=dtype)
    inverse = inputs.new_empty(inputs.shape[:-1], dtype=torch.float32)
    width = inputs.shape[-1]
    tiles, rows, columns = _tile(inverse.numel(), width)
    normalise.start(
        (tiles,), inputs, weight, outputs, inverse, inverse.numel(), width, epsilon, BLOCK_ROWS=rows,
        BLOCK_WIDTH=columns, num_warps=WARPS,
    )  # fmt: skip
    return outputs, inverse


def backward(grad_outputs: Tensor, inputs: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs and of the weight."""
    grad_outputs, inputs, weight, inverse = (one.contiguous() for one in (grad_outputs, inputs, weight, inverse))
    width = inputs.shape[-1]
    tiles, rows, columns = _tile(inverse.numel(), width)
    of_program = -(-tiles // (PROGRAMS_PER_PROCESSOR * multiprocessors(inputs))) if tiles else 1
    programs = -(-tiles // of_program)
    grad_inputs, grad_weight = torch.empty_like(inputs), weight.new_empty(max(programs, 1), width)
    if programs == 0:
        grad_weight.zero_()
    normalise_back.start(
        (programs,), grad_outputs, inputs, weight, inverse, grad_inputs, grad_weight, inverse.numel(), width,
        of_program, BLOCK_ROWS=rows, BLOCK_WIDTH=columns, num_warps=WARPS,
    )  # fmt: skip
    return grad_inputs, sum_of_parts(grad_weight)
