"""The native library's convolution (kernels/native/convolution_kernel.cpp) on tensors."""

import torch
from torch import Tensor

from mambacore.backends import ELEMENT_TYPES, compute_dtype
from mambacore.layout import channels_contiguous, optional_contiguous, sum_of_parts
from mambacore.native_library import Convolution, Library
from mambacore.packing import resets_before
from mambacore.scan.native import as_pointer, as_sequence

# Outputs per thread below which another thread costs more than it saves.
_OUTPUTS_PER_THREAD = 1 << 15


def _segments(inputs: Tensor) -> int:
    """Return the number of segments of the length per batch item, so that a small batch occupies all threads."""
    batch, length, _ = inputs.shape
    threads = min(torch.get_num_threads(), inputs.numel() // _OUTPUTS_PER_THREAD)
    return max(1, min(-(-threads // max(batch, 1)), length))


def _arguments(inputs: Tensor, weight: Tensor, silu: bool, reverse: bool) -> Convolution:
    batch, length, channels = inputs.shape
    return Convolution(
        batch=batch, length=length, channels=channels, kernel_width=weight.shape[0],
        element=ELEMENT_TYPES[inputs.dtype], reverse=reverse, silu=silu,
        threads=torch.get_num_threads() if inputs.numel() >= _OUTPUTS_PER_THREAD else 1,
        inputs=as_sequence(inputs), weight=as_pointer(weight), segments=_segments(inputs),
    )  # fmt: skip


def forward(
    native: Library,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    sequence_starts: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """Return outputs (batch, length, channels); weight is (channels, kernel_width)."""
    inputs = channels_contiguous(inputs)
    by_tap = weight.t().contiguous()
    initial_state, bias = optional_contiguous(initial_state), optional_contiguous(bias)
    outputs = inputs.new_empty(inputs.shape)
    resets = None if sequence_starts is None else resets_before(sequence_starts, reverse).contiguous()
    convolution = _arguments(inputs, by_tap, silu, reverse)
    convolution.resets = as_pointer(resets)
    convolution.bias, convolution.initial_state = as_pointer(bias), as_pointer(initial_state)
    convolution.outputs = as_sequence(outputs)
    native.convolution_forward(convolution)
    return outputs


def backward(
    native: Library,
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
    inputs, grad_outputs = channels_contiguous(inputs), channels_contiguous(grad_outputs)
    by_tap = weight.t().contiguous()
    initial_state, bias = optional_contiguous(initial_state), optional_contiguous(bias)
    resets = None if sequence_starts is None else resets_before(sequence_starts, reverse).contiguous()
    convolution = _arguments(inputs, by_tap, silu, reverse)
    convolution.resets = as_pointer(resets)
    parts, dtype = inputs.shape[0] * convolution.segments, compute_dtype(inputs.dtype)
    grad_inputs = inputs.new_empty(inputs.shape)
    grad_weight = inputs.new_empty(parts, *by_tap.shape, dtype=dtype)
    grad_bias = inputs.new_empty(parts, inputs.shape[2], dtype=dtype)
    grad_initial_state = inputs.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    convolution.bias, convolution.initial_state = as_pointer(bias), as_pointer(initial_state)
    convolution.grad_outputs, convolution.grad_inputs = as_sequence(grad_outputs), as_sequence(grad_inputs)
    convolution.grad_weight, convolution.grad_bias = as_pointer(grad_weight), as_pointer(grad_bias)
    convolution.grad_initial_state = None if initial_state is None else as_pointer(grad_initial_state)
    native.convolution_backward(convolution)
    grad_bias = inputs.new_empty(0) if bias is None else sum_of_parts(grad_bias)
    return grad_inputs, sum_of_parts(grad_weight).t().contiguous(), grad_bias, grad_initial_state
