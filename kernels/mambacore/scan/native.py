"""Adapter from tensors to the native library's scan (kernels/native/scan_kernel.cpp)."""

import torch
from torch import Tensor

from mambacore.backends import ELEMENT_TYPES, compute_dtype
from mambacore.native.library import Library, Matrix, Scan, Sequence
from mambacore.scan.fallback import BORDER_INTERVAL

# Below so many state elements a second thread takes longer to start than it saves.
_ELEMENTS_PER_THREAD = 1 << 16


def channels_contiguous(sequence: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else a copy."""
    return sequence if sequence.stride(-1) == 1 or sequence.shape[-1] == 1 else sequence.contiguous()


def as_sequence(sequence: Tensor | None) -> Sequence:
    """Describe a (batch, length, channels) tensor with contiguous channels to the library."""
    if sequence is None:
        return Sequence(None, 0, 0)
    return Sequence(sequence.data_ptr(), sequence.stride(0), sequence.stride(1))


def as_matrix(matrix: Tensor) -> Matrix:
    """Describe a (batch, length, groups, state_size) tensor with contiguous states to the library."""
    return Matrix(matrix.data_ptr(), matrix.stride(0), matrix.stride(1), matrix.stride(2))


def as_pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor, or None."""
    return None if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Arguments:
    """The C structure together with the tensors it points to, which must live as long as it does."""

    def __init__(
        self,
        native: Library,
        inputs: Tensor,
        step_size: Tensor,
        state_matrix: Tensor,
        input_matrix: Tensor,
        output_matrix: Tensor,
        skip_weight: Tensor | None,
        gate: Tensor | None,
        step_bias: Tensor | None,
        step_softplus: bool,
        reverse: bool,
    ) -> None:
        self.inputs, self.step_size = channels_contiguous(inputs), channels_contiguous(step_size)
        self.gate = None if gate is None else channels_contiguous(gate)
        self.input_matrix, self.output_matrix = channels_contiguous(input_matrix), channels_contiguous(output_matrix)
        self.parameters = [_contiguous(tensor) for tensor in (state_matrix, skip_weight, step_bias)]
        batch, length, channels = inputs.shape
        groups, state_size = input_matrix.shape[2:]
        self.scan = Scan(
            batch=batch, length=length, channels=channels, groups=groups, state_size=state_size,
            border_interval=BORDER_INTERVAL, element=ELEMENT_TYPES[inputs.dtype], reverse=reverse,
            step_softplus=step_softplus,
            threads=max(1, min(torch.get_num_threads(), inputs.numel() * state_size // _ELEMENTS_PER_THREAD)),
            inputs=as_sequence(self.inputs), step_size=as_sequence(self.step_size), gate=as_sequence(self.gate),
            input_matrix=as_matrix(self.input_matrix), output_matrix=as_matrix(self.output_matrix),
            state_matrix=as_pointer(self.parameters[0]), skip_weight=as_pointer(self.parameters[1]),
            step_bias=as_pointer(self.parameters[2]),
        )  # fmt: skip
        self.scan.plan = native.plan_scan(self.scan)


def forward(
    native: Library,
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None,
    gate: Tensor | None,
    step_bias: Tensor | None,
    initial_state: Tensor | None,
    step_softplus: bool,
    reverse: bool,
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambacore.scan.fallback.forward`."""
    arguments = _Arguments(
        native, inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias,
        step_softplus, reverse,
    )  # fmt: skip
    scan = arguments.scan
    dtype = compute_dtype(inputs.dtype)
    intervals = -(-scan.length // BORDER_INTERVAL) if keep_borders else 0
    outputs = inputs.new_empty(inputs.shape)
    final_state = inputs.new_empty(scan.batch, scan.channels, scan.state_size, dtype=dtype)
    border_states = inputs.new_empty(scan.batch, intervals, scan.state_size, scan.channels, dtype=dtype)
    initial_state = _contiguous(initial_state)
    scan.initial_state = as_pointer(initial_state)
    scan.outputs = as_sequence(outputs)
    scan.final_state = as_pointer(final_state)
    scan.border_states = as_pointer(border_states) if keep_borders else None
    native.scan_forward(scan)
    return outputs, final_state, border_states


def backward(
    native: Library,
    grad_outputs: Tensor,
    grad_final_state: Tensor | None,
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None,
    gate: Tensor | None,
    step_bias: Tensor | None,
    border_states: Tensor,
    step_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`mambacore.scan.fallback.backward`."""
    arguments = _Arguments(
        native, inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias,
        step_softplus, reverse,
    )  # fmt: skip
    scan = arguments.scan
    dtype = compute_dtype(inputs.dtype)
    grad_outputs, border_states = channels_contiguous(grad_outputs), border_states.contiguous()
    grad_final_state = _contiguous(grad_final_state)
    grad_inputs, grad_step_size = inputs.new_empty(inputs.shape), inputs.new_empty(inputs.shape)
    grad_gate = inputs.new_empty(0) if gate is None else inputs.new_empty(inputs.shape)
    ranges, parts = scan.plan.ranges, scan.batch * scan.plan.segments
    per_range = (ranges, scan.batch, scan.length, scan.groups, scan.state_size)
    grad_input_matrix = inputs.new_empty(per_range, dtype=dtype)
    grad_output_matrix = inputs.new_empty(per_range, dtype=dtype)
    grad_state_matrix = inputs.new_empty(parts, scan.channels, scan.state_size, dtype=dtype)
    grad_skip_weight = inputs.new_empty(parts, scan.channels, dtype=dtype)
    grad_step_bias = inputs.new_empty(parts, scan.channels, dtype=dtype)
    grad_initial_state = inputs.new_empty(scan.batch, scan.channels, scan.state_size, dtype=dtype)
    scan.border_states = as_pointer(border_states)
    scan.grad_outputs = as_sequence(grad_outputs)
    scan.grad_inputs, scan.grad_step_size = as_sequence(grad_inputs), as_sequence(grad_step_size)
    scan.grad_gate = as_sequence(None if gate is None else grad_gate)
    scan.grad_final_state = as_pointer(grad_final_state)
    scan.grad_input_matrix, scan.grad_output_matrix = as_pointer(grad_input_matrix), as_pointer(grad_output_matrix)
    scan.grad_state_matrix = as_pointer(grad_state_matrix)
    scan.grad_skip_weight, scan.grad_step_bias = as_pointer(grad_skip_weight), as_pointer(grad_step_bias)
    scan.grad_initial_state = as_pointer(grad_initial_state)
    native.scan_backward(scan)
    return (
        grad_inputs,
        grad_step_size,
        grad_state_matrix.sum(0),
        _sum_of_ranges(grad_input_matrix),
        _sum_of_ranges(grad_output_matrix),
        inputs.new_empty(0) if skip_weight is None else grad_skip_weight.sum(0),
        grad_gate,
        inputs.new_empty(0) if step_bias is None else grad_step_bias.sum(0),
        grad_initial_state,
    )


def _sum_of_ranges(partial: Tensor) -> Tensor:
    """Add the ranges' parts up in their order; a single one is taken as it is."""
    return partial.sum(0) if partial.shape[0] > 1 else partial[0]
