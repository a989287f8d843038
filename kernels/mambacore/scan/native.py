"""The native library's scan (kernels/native/scan_kernel.cpp) on tensors."""

import torch
from torch import Tensor

from mambacore.backends import ELEMENT_TYPES
from mambacore.layout import (
    INTERVAL,
    boundary_shape,
    channels_contiguous,
    group_count,
    matrix_strides,
    optional_contiguous,
    sequence_strides,
    states_contiguous,
    sum_of_parts,
)
from mambacore.native_library import Library, Matrix, Scan, Sequence
from mambacore.scan.arguments import ScanArguments, ScanGradients

# Below so many state elements a second thread takes longer to start than it saves.
_ELEMENTS_PER_THREAD = 1 << 16


def as_sequence(sequence: Tensor | None) -> Sequence:
    """Describe a (batch, length, channels) tensor with contiguous channels to the library."""
    return Sequence(None if sequence is None else sequence.data_ptr(), *sequence_strides(sequence))


def as_matrix(matrix: Tensor) -> Matrix:
    """Describe a (batch, length, groups, state_size) or (channels, state_size) tensor with contiguous states."""
    return Matrix(matrix.data_ptr(), *matrix_strides(matrix), matrix.dim() == 2)


def as_pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor, or None."""
    return None if tensor is None else tensor.data_ptr()


class _Call:
    """The C structure together with the tensors it points to, which must live as long as it does."""

    def __init__(self, native: Library, arguments: ScanArguments) -> None:
        self.sequences = [
            None if sequence is None else channels_contiguous(sequence)
            for sequence in (arguments.inputs, arguments.step_size, arguments.gate)
        ]
        self.matrices = [states_contiguous(matrix) for matrix in (arguments.input_matrix, arguments.output_matrix)]
        self.parameters = [
            optional_contiguous(tensor)
            for tensor in (
                arguments.state_matrix, arguments.skip_weight, arguments.step_bias, arguments.resets,
                arguments.initial_state,
            )
        ]  # fmt: skip
        inputs, step_size, gate = (as_sequence(sequence) for sequence in self.sequences)
        input_matrix, output_matrix = (as_matrix(matrix) for matrix in self.matrices)
        state_matrix, skip_weight, step_bias, resets, initial_state = (as_pointer(each) for each in self.parameters)
        batch, length, channels = arguments.inputs.shape
        elements = arguments.inputs.numel() * arguments.state_size
        self.scan = Scan(
            batch=batch, length=length, channels=channels, groups=group_count(*self.matrices),
            state_size=arguments.state_size, boundary_interval=INTERVAL, element=ELEMENT_TYPES[arguments.inputs.dtype],
            reverse=arguments.reverse, step_softplus=arguments.step_softplus, is_complex=arguments.is_complex,
            threads=max(1, min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD)),
            inputs=inputs, step_size=step_size, gate=gate, input_matrix=input_matrix, output_matrix=output_matrix,
            state_matrix=state_matrix, skip_weight=skip_weight, step_bias=step_bias, resets=resets,
            initial_state=initial_state,
        )  # fmt: skip
        self.scan.plan = native.plan_scan(self.scan)


def forward(native: Library, arguments: ScanArguments, keep_boundaries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `mambacore.scan.fallback.forward`."""
    call, inputs = _Call(native, arguments), arguments.inputs
    batch, length, channels = inputs.shape
    shape = boundary_shape(
        batch, length if keep_boundaries else 0, channels, arguments.state_size, arguments.is_complex
    )
    outputs, boundary_states = inputs.new_empty(inputs.shape), inputs.new_empty(shape, dtype=arguments.dtype)
    final_state = arguments.state_matrix.new_empty(batch, channels, arguments.state_size)
    call.scan.outputs, call.scan.final_state = as_sequence(outputs), as_pointer(final_state)
    call.scan.boundary_states = as_pointer(boundary_states) if keep_boundaries else None
    native.scan_forward(call.scan)
    return outputs, final_state, boundary_states


def backward(
    native: Library,
    grad_outputs: Tensor,
    grad_final_state: Tensor | None,
    arguments: ScanArguments,
    boundary_states: Tensor,
) -> ScanGradients:
    """As `mambacore.scan.fallback.backward`."""
    call, inputs, state_matrix = _Call(native, arguments), arguments.inputs, arguments.state_matrix
    scan = call.scan
    grad_outputs, boundary_states = channels_contiguous(grad_outputs), boundary_states.contiguous()
    grad_final_state = optional_contiguous(grad_final_state)
    grad_inputs, grad_step_size = inputs.new_empty(inputs.shape), inputs.new_empty(inputs.shape)
    grad_gate = inputs.new_empty(0 if arguments.gate is None else inputs.shape)
    parts = scan.batch * scan.plan.segments
    per_range = (scan.plan.ranges, scan.batch, scan.length, scan.groups, scan.state_size)
    per_part = (parts, scan.channels, scan.state_size)
    grad_input_matrix, grad_output_matrix = (
        state_matrix.new_empty(per_part if matrix.dim() == 2 else per_range) for matrix in call.matrices
    )
    grad_state_matrix = state_matrix.new_empty(per_part)
    grad_skip_weight, grad_step_bias = (inputs.new_empty(parts, scan.channels, dtype=arguments.dtype) for _ in range(2))
    grad_initial_state = state_matrix.new_empty(scan.batch, scan.channels, scan.state_size)
    scan.boundary_states = as_pointer(boundary_states)
    scan.grad_outputs = as_sequence(grad_outputs)
    scan.grad_inputs, scan.grad_step_size = as_sequence(grad_inputs), as_sequence(grad_step_size)
    scan.grad_gate = as_sequence(None if arguments.gate is None else grad_gate)
    scan.grad_final_state = as_pointer(grad_final_state)
    scan.grad_input_matrix, scan.grad_output_matrix = as_pointer(grad_input_matrix), as_pointer(grad_output_matrix)
    scan.grad_state_matrix = as_pointer(grad_state_matrix)
    scan.grad_skip_weight, scan.grad_step_bias = as_pointer(grad_skip_weight), as_pointer(grad_step_bias)
    scan.grad_initial_state = as_pointer(grad_initial_state)
    native.scan_backward(scan)
    return ScanGradients(
        grad_inputs,
        grad_step_size,
        sum_of_parts(grad_state_matrix),
        sum_of_parts(grad_input_matrix),
        sum_of_parts(grad_output_matrix),
        inputs.new_empty(0) if arguments.skip_weight is None else sum_of_parts(grad_skip_weight),
        grad_gate,
        inputs.new_empty(0) if arguments.step_bias is None else sum_of_parts(grad_step_bias),
        grad_initial_state,
    )
