"""The root-mean-square norm's Triton kernels, forward and backward, and their adapter."""

# Compile-time switches and sizes are named like constants.
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mambacore.layout import sum_of_parts
from mambacore.triton.arithmetic import total
from mambacore.triton.launch import kernel, multiprocessors, or_first

# Numbers of a program's tile, as rows of the width.
TILE, WARPS = 2048, 4
# Backward, each program walks over many tiles and keeps the gradient of the weight, of which few parts are left.
PROGRAMS_PER_PROCESSOR = 4


@kernel
def normalise(
    inputs, branch, weight, sums, outputs, inverse, row_count, width, epsilon, HAS_BRANCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Outputs (rows, width) and 1 / root mean square (rows,), of the inputs or of their sum with a branch."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    mask = (rows < row_count)[:, None] & (columns < width)[None, :]
    place = rows[:, None] * width + columns[None, :]
    values = tl.load(inputs + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        # Rounded as it is kept, so that the norm is that of the sum which goes on.
        summed = (values + tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)).to(sums.dtype.element_ty)
        tl.store(sums + place, summed, mask=mask)
        values = summed.to(tl.float32)
    scale = 1.0 / tl.sqrt(total(values * values, 1) / width + epsilon)
    tl.store(inverse + rows, scale, mask=rows < row_count)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0)
    result = values * scale[:, None] * factor[None, :]
    tl.store(outputs + place, result.to(outputs.dtype.element_ty), mask=mask)


@kernel
def normalise_back(
    grad_outputs, grad_sums, inputs, weight, inverse, grad_inputs, grad_branch, grad_weight, row_count, width,
    tiles_of_program, HAS_BRANCH: tl.constexpr, HAS_GRAD_SUMS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs (rows, width), and this program's part of that of the weight (programs, width).

    Where the inputs are a sum with a branch, the gradient by what else reads the sum is added, and the branch has the
    same gradient, which is written a second time if its dtype differs.
    """
    columns = tl.arange(0, BLOCK_WIDTH)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0)[None, :]
    of_weight = tl.full((BLOCK_WIDTH,), 0.0, tl.float32)
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
        if HAS_GRAD_SUMS:
            result += tl.load(grad_sums + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_inputs + place, result.to(grad_inputs.dtype.element_ty), mask=mask)
        if HAS_BRANCH:
            tl.store(grad_branch + place, result.to(grad_branch.dtype.element_ty), mask=mask)
        of_weight += total(along * scale, 0)
    tl.store(grad_weight + tl.program_id(0) * width + columns, of_weight, mask=columns < width)


def _tile(rows: int, width: int) -> tuple[int, int, int]:
    """Tiles, and the rows and columns of each."""
    columns = 1 << max(width - 1, 0).bit_length()
    block = max(1, TILE // columns)
    return -(-rows // block), block, columns


def forward(inputs: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs in `dtype`, and 1 / root mean square of every row."""
    outputs, _, inverse = _forward(inputs, None, weight, epsilon, dtype)
    return outputs, inverse


def forward_of_sum(
    inputs: Tensor, branch: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs in `dtype`, the sum of the inputs and the branch, and 1 / root mean square of every row of it."""
    return _forward(inputs, branch.contiguous(), weight, epsilon, dtype)


def _forward(
    inputs: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, weight = inputs.contiguous(), weight.contiguous()
    outputs = inputs.new_empty(inputs.shape, dtype=dtype)
    sums = inputs
    if branch is not None:
        sums = inputs.new_empty(inputs.shape, dtype=torch.promote_types(inputs.dtype, branch.dtype))
    inverse = inputs.new_empty(inputs.shape[:-1], dtype=torch.float32)
    width = inputs.shape[-1]
    tiles, rows, columns = _tile(inverse.numel(), width)
    normalise.start(
        (tiles,), inputs, or_first(branch, inputs), weight, sums, outputs, inverse, inverse.numel(), width, epsilon,
        HAS_BRANCH=branch is not None, BLOCK_ROWS=rows, BLOCK_WIDTH=columns, num_warps=WARPS,
    )  # fmt: skip
    return outputs, sums, inverse


def backward(
    grad_outputs: Tensor,
    inputs: Tensor,
    weight: Tensor,
    inverse: Tensor,
    grad_sums: Tensor | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inputs, of the branch (empty where it is that of the inputs) and of the weight.

    Args:
        grad_outputs: gradient of the outputs.
        inputs: what was normalised, the sum where there was a branch.
        weight, inverse: as in forward.
        grad_sums: gradient of the sum by what else reads it.
        dtypes: of the inputs and of the branch; without a branch that of `inputs`.
    """
    grad_outputs, inputs, weight, inverse = (one.contiguous() for one in (grad_outputs, inputs, weight, inverse))
    grad_sums = None if grad_sums is None else grad_sums.contiguous()
    width = inputs.shape[-1]
    tiles, rows, columns = _tile(inverse.numel(), width)
    of_program = -(-tiles // (PROGRAMS_PER_PROCESSOR * multiprocessors(inputs))) if tiles else 1
    programs = -(-tiles // of_program)
    own, other = (inputs.dtype, inputs.dtype) if dtypes is None else dtypes
    grad_inputs = torch.empty_like(inputs, dtype=own)
    grad_branch = inputs.new_empty(inputs.shape if own != other else 0, dtype=other)
    grad_weight = weight.new_empty(max(programs, 1), width)
    if programs == 0:
        grad_weight.zero_()
    normalise_back.start(
        (programs,), grad_outputs, or_first(grad_sums, inputs), inputs, weight, inverse, grad_inputs, grad_branch,
        grad_weight, inverse.numel(), width, of_program, HAS_BRANCH=own != other,
        HAS_GRAD_SUMS=grad_sums is not None, BLOCK_ROWS=rows, BLOCK_WIDTH=columns, num_warps=WARPS,
    )  # fmt: skip
    return grad_inputs, grad_branch, sum_of_parts(grad_weight)
