"""The convolution's Triton kernels on tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambacore.convolution.triton_kernels import convolve, grad_before_activation, grad_of_inputs
from mambacore.layout import channels_contiguous, optional_contiguous, sequence_strides, sum_of_parts
from mambacore.packing import resets_before
from mambacore.triton.launch import or_first

BLOCK_POSITIONS, BLOCK_CHANNELS, WARPS = 32, 64, 4


class _Arguments:
    """Tensors in the kernels' layout, and compile-time switches."""

    def __init__(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        sequence_starts: Tensor | None,
        silu: bool,
        reverse: bool,
    ) -> None:
        self.inputs, self.weight = channels_contiguous(inputs), weight.contiguous()
        self.batch, self.length, self.channels = inputs.shape
        self.bias, self.state = (optional_contiguous(tensor) for tensor in (bias, initial_state))
        resets = None if sequence_starts is None else resets_before(sequence_starts, reverse)
        self.resets = None if resets is None else resets.contiguous().view(torch.uint8)
        self.positions = min(BLOCK_POSITIONS, 1 << max(self.length - 1, 0).bit_length())
        self.tensors = (
            self.inputs, self.weight, or_first(self.bias, self.weight), or_first(self.state, self.inputs),
            or_first(self.resets, self.inputs),
        )  # fmt: skip
        self.sizes = (self.length, self.channels, *sequence_strides(self.inputs))
        self.cut: dict[str, Any] = {
            "REVERSE": reverse, "HAS_RESETS": resets is not None, "WIDTH": weight.shape[1], "num_warps": WARPS,
            "BLOCK_POSITIONS": self.positions, "BLOCK_CHANNELS": BLOCK_CHANNELS,
        }  # fmt: skip
        self.switches = self.cut | {"SILU": silu, "HAS_BIAS": bias is not None, "HAS_STATE": initial_state is not None}

    def stretches(self, positions: int) -> int:
        """Return the number of programs per batch item and block of channels."""
        return -(-positions // self.positions)

    def grid(self, stretches: int) -> tuple[int, int]:
        """Return the grid: segments of all batch items on the only axis that allows more than 65,535, and channels."""
        return self.batch * stretches, -(-self.channels // BLOCK_CHANNELS)


def forward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    sequence_starts: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """Return outputs (batch, length, channels); weight is (channels, kernel_width)."""
    run = _Arguments(inputs, weight, bias, initial_state, sequence_starts, silu, reverse)
    outputs = inputs.new_empty(inputs.shape)
    stretches = run.stretches(run.length)
    convolve.start(run.grid(stretches), *run.tensors, outputs, stretches, *run.sizes, **run.switches)
    return outputs


def backward(
    grad_outputs: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    sequence_starts: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of inputs, weight, bias and initial state, empty for absent arguments."""
    run = _Arguments(inputs, weight, bias, initial_state, sequence_starts, silu, reverse)
    grad_outputs = channels_contiguous(grad_outputs)
    stretches = run.stretches(run.length)
    parts, history = run.batch * stretches, 0 if initial_state is None else weight.shape[1] - 1
    grads = inputs.new_empty(inputs.shape, dtype=torch.float32)
    grad_weight = grads.new_empty(parts, *run.weight.shape)
    grad_bias = grads.new_empty(parts, run.channels)
    grad_inputs = inputs.new_empty(inputs.shape)
    grad_state = inputs.new_empty(0) if initial_state is None else inputs.new_empty(initial_state.shape)
    grad_before_activation.start(
        run.grid(stretches), grad_outputs, *run.tensors, grads, stretches, *run.sizes, *sequence_strides(grad_outputs),
        grad_weight, grad_bias, **run.switches,
    )  # fmt: skip
    stretches = run.stretches(run.length + history)
    grad_of_inputs.start(
        run.grid(stretches), grads, run.weight, or_first(run.resets, run.inputs), grad_inputs,
        or_first(None if history == 0 else grad_state, grad_inputs), stretches, run.length, run.channels, -history,
        **run.cut,
    )  # fmt: skip
    return (
        grad_inputs,
        sum_of_parts(grad_weight),
        inputs.new_empty(0) if bias is None else sum_of_parts(grad_bias),
        grad_state,
    )
