"""Adapter from tensors to the single-position kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from mambacore.layers import triton_step_kernels as kernels
from mambacore.triton.launch import or_first

CONVOLVE_CHANNELS, CONVOLVE_WARPS = 128, 4
# Of the scan's tile; 64 channels of 16 states fill four warps eight times over.
ADVANCE_ELEMENTS, ADVANCE_WARPS = 1024, 4


def convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, new_state: Tensor) -> Tensor:
    """Compute silu(convolution) for one position.

    Args:
        inputs: (batch, channels), contiguous channels.
        weight: (channels, kernel_width), contiguous.
        bias: (channels,).
        state: (batch, kernel_width - 1, channels), contiguous; zeros by default.
        new_state: the same, written; may be `state` itself.

    Returns:
        (batch, channels) in the inputs' dtype.
    """
    batch, channels = inputs.shape
    outputs = inputs.new_empty(batch, channels)
    kernels.convolve.start(
        (batch, -(-channels // CONVOLVE_CHANNELS)),
        inputs, weight, or_first(bias, weight), or_first(state, new_state), new_state, outputs, channels,
        inputs.stride(0), HAS_BIAS=bias is not None, HAS_STATE=state is not None, WIDTH=weight.shape[1],
        BLOCK_CHANNELS=CONVOLVE_CHANNELS, num_warps=CONVOLVE_WARPS,
    )  # fmt: skip
    return outputs


def advance(
    inputs: Tensor,
    gate: Tensor,
    step_size: Tensor,
    matrices: Tensor,
    log_decay_rate: Tensor,
    frequency: Tensor | None,
    skip_weight: Tensor,
    step_bias: Tensor,
    state: Tensor | None,
    new_state: Tensor,
) -> Tensor:
    """Compute the scan of one position with its gate.

    Args:
        inputs: (batch, channels), contiguous.
        gate: (batch, channels), contiguous channels.
        step_size: (batch, channels), contiguous, before bias and softplus.
        matrices: (batch, 2 * numbers), contiguous rows: input_matrix and output_matrix, complex numbers as pairs.
        log_decay_rate: (channels, state_size), contiguous.
        frequency: the same, for complex states.
        skip_weight: (channels,).
        step_bias: (channels,).
        state: (batch, channels, state_size), contiguous, float32 or complex64; zeros by default.
        new_state: the same, written; may be `state` itself.

    Returns:
        (batch, channels) in the inputs' dtype.
    """
    batch, channels = inputs.shape
    state_size = log_decay_rate.shape[1]
    outputs = torch.empty_like(inputs)
    states = 1 << (state_size - 1).bit_length()
    block = max(1, min(ADVANCE_ELEMENTS // states, 1 << (channels - 1).bit_length()))
    before, after = (
        None if tensor is None else torch.view_as_real(tensor) if tensor.is_complex() else tensor
        for tensor in (state, new_state)
    )
    assert after is not None
    kernels.advance.start(
        (batch, -(-channels // block)),
        inputs, gate, step_size, matrices, log_decay_rate, or_first(frequency, log_decay_rate), skip_weight, step_bias,
        or_first(before, after), after, outputs, channels, state_size, gate.stride(0), matrices.stride(0),
        IS_COMPLEX=frequency is not None, HAS_STATE=state is not None, BLOCK_STATES=states, BLOCK_CHANNELS=block,
        num_warps=ADVANCE_WARPS,
    )  # fmt: skip
    return outputs
