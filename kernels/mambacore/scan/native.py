"""Adapter from tensors to the native library's scan (kernels/native/scan_kernel.cpp)."""

import torch
from torch import Tensor

from mambacore.backends import ELEMENT_TYPES, compute_dtype
from mambacore.native_library import Library, Matrix, Scan, Sequence
from mambacore.scan.fallback import BORDER_INTERVAL, border_shape

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
    """Describe a (batch, length, groups, state_size) or (channels, state_size) tensor with contiguous states."""
    if matrix.dim() == 2:
        return Matrix(matrix.data_ptr(), 0, 0, 0, True)
    numbers = 2 if matrix.is_complex() else 1
    return Matrix(matrix.data_ptr(), *(numbers * stride for stride in matrix.stride()[:3]), False)


def as_pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor, or None."""
    return None if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.resolve_conj().contiguous()


def _states_contiguous(matrix: Tensor) -> Tensor:
    matrix = matrix.resolve_conj()
    return matrix.contiguous() if matrix.dim() == 2 else channels_contiguous(matrix)


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
        resets: Tensor | None,
        step_softplus: bool,
        reverse: bool,
    ) -> None:
        self.inputs, self.step_size = channels_contiguous(inputs), channels_contiguous(step_size)
        self.gate = None if gate is None else channels_contiguous(gate)
        self.input_matrix, self.output_matrix = _states_contiguous(input_matrix), _states_contiguous(output_matrix)
        self.parameters = [_contiguous(tensor) for tensor in (state_matrix, skip_weight, step_bias, resets)]
        batch, length, channels = inputs.shape
        state_size = state_matrix.shape[1]
        groups = max(matrix.shape[2] if matrix.dim() == 4 else 1 for matrix in (input_matrix, output_matrix))
        self.scan = Scan(
            batch=batch, length=length, channels=channels, groups=groups, state_size=state_size,
            border_interval=BORDER_INTERVAL, element=ELEMENT_TYPES[inputs.dtype], reverse=reverse,
            step_softplus=step_softplus, is_complex=state_matrix.is_complex(),
            threads=max(1, min(torch.get_num_threads(), inputs.numel() * state_size // _ELEMENTS_PER_THREAD)),
            inputs=as_sequence(self.inputs), step_size=as_sequence(self.step_size), gate=as_sequence(self.gate),
            input_matrix=as_matrix(self.input_matrix), output_matrix=as_matrix(self.output_matrix),
            state_matrix=as_pointer(self.parameters[0]), skip_weight=as_pointer(self.parameters[1]),
            step_bias=as_pointer(self.parameters[2]), resets=as_pointer(self.parameters[3]),
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
    resets: Tensor | None,
    step_softplus: bool,
    reverse: bool,
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambacore.scan.fallback.forward`."""
    arguments = _Arguments(
        native, inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, resets,
        step_softplus, reverse,
    )  # fmt: skip
    scan = arguments.scan
    dtype = compute_dtype(inputs.dtype)
    borders = border_shape(
        scan.batch, scan.length if keep_borders else 0, scan.channels, scan.state_size, state_matrix.is_complex()
    )
    outputs = inputs.new_empty(inputs.shape)
    final_state = inputs.new_empty(scan.batch, scan.channels, scan.state_size, dtype=state_matrix.dtype)
    border_states = inputs.new_empty(borders, dtype=dtype)
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
    resets: Tensor | None,
    border_states: Tensor,
    step_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`mambacore.scan.fallback.backward`."""
    arguments = _Arguments(
        native, inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, resets,
        step_softplus, reverse,
    )  # fmt: skip
    scan = arguments.scan
    dtype = compute_dtype(inputs.dtype)
    grad_outputs, border_states = channels_contiguous(grad_outputs), border_states.contiguous()
    grad_final_state = _contiguous(grad_final_state)
    grad_inputs, grad_step_size = inputs.new_empty(inputs.shape), inputs.new_empty(inputs.shape)
    grad_gate = inputs.new_empty(0) if gate is None else inputs.new_empty(inputs.shape)
    parts = scan.batch * scan.plan.segments
    per_range = (scan.plan.ranges, scan.batch, scan.length, scan.groups, scan.state_size)
    per_part = (parts, scan.channels, scan.state_size)
    grad_input_matrix, grad_output_matrix = (
        state_matrix.new_empty(per_part if matrix.dim() == 2 else per_range) for matrix in (input_matrix, output_matrix)
    )
    grad_state_matrix = state_matrix.new_empty(per_part)
    grad_skip_weight = inputs.new_empty(parts, scan.channels, dtype=dtype)
    grad_step_bias = inputs.new_empty(parts, scan.channels, dtype=dtype)
    grad_initial_state = state_matrix.new_empty(scan.batch, scan.channels, scan.state_size)
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
        _sum_of_partial(grad_input_matrix),
        _sum_of_partial(grad_output_matrix),
        inputs.new_empty(0) if skip_weight is None else grad_skip_weight.sum(0),
        grad_gate,
        inputs.new_empty(0) if step_bias is None else grad_step_bias.sum(0),
        grad_initial_state,
    )


def _sum_of_partial(partial: Tensor) -> Tensor:
    """Add the tasks' parts up in their order; a single one is taken as it is."""
    return partial.sum(0) if partial.shape[0] > 1 else partial[0]
