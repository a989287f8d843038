"""The selective scan in plain PyTorch with bounded memory: what runs when there is no native library.

It walks the sequence in intervals. Only the state before each interval is kept; backward goes through the intervals
from the last to the first, computes each one again from its kept state, and hands the state's gradient on. (Backward
is written out: inside a registered operator PyTorch's own differentiation is switched off.)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.backends import compute_dtype
from mambacore.scan import reference

# Positions from one kept state to the next, in every backend: kept states then take state_size / 64 of the inputs'
# memory, and what one interval needs for backward stays in a processor's cache.
BORDER_INTERVAL = 64


def interval_bounds(length: int) -> list[tuple[int, int]]:
    """Begin and end, in scan order, of every interval."""
    return [(begin, min(begin + BORDER_INTERVAL, length)) for begin in range(0, length, BORDER_INTERVAL)]


def _take(sequence: Tensor, bounds: tuple[int, int], reverse: bool, dtype: torch.dtype) -> Tensor:
    """An interval of a sequence, in scan order and in the compute dtype."""
    begin, end = bounds
    if not reverse:
        return sequence[:, begin:end].to(dtype)
    return sequence[:, sequence.shape[1] - end : sequence.shape[1] - begin].flip(1).to(dtype)


def _put(sequence: Tensor, bounds: tuple[int, int], reverse: bool, values: Tensor) -> None:
    """The opposite of :func:`_take`."""
    begin, end = bounds
    if reverse:
        sequence[:, sequence.shape[1] - end : sequence.shape[1] - begin] = values.flip(1).to(sequence.dtype)
    else:
        sequence[:, begin:end] = values.to(sequence.dtype)


def forward(
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
    """Outputs, final state, and the states before each interval as (batch, intervals, state_size, channels)."""
    batch, length, channels = inputs.shape
    dtype = compute_dtype(inputs.dtype)
    state = initial_state
    if state is None:
        state = inputs.new_zeros(batch, channels, state_matrix.shape[1], dtype=dtype)
    outputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    borders: list[Tensor] = []
    for bounds in interval_bounds(length):
        if keep_borders:
            borders.append(state.transpose(1, 2))
        inputs_here, step_here, input_matrix_here, output_matrix_here = (
            _take(sequence, bounds, reverse, dtype) for sequence in (inputs, step_size, input_matrix, output_matrix)
        )
        gate_here = None if gate is None else _take(gate, bounds, reverse, dtype)
        outputs_here, state = reference.selective_scan_reference(
            inputs_here, step_here, state_matrix, input_matrix_here, output_matrix_here, skip_weight, gate_here,
            step_bias, step_softplus, state,
        )  # fmt: skip
        _put(outputs, bounds, reverse, outputs_here)
    if borders:
        return outputs, state.clone(), torch.stack(borders, dim=1)
    return outputs, state.clone(), state.new_zeros(batch, 0, state_matrix.shape[1], channels)


def backward(
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
    """Gradients of inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, state.

    Those of absent arguments are empty tensors. The formulas are those of kernels/native/scan_kernel.cpp.
    """
    batch, length, channels = inputs.shape
    groups, state_size = input_matrix.shape[2:]
    dtype = compute_dtype(inputs.dtype)
    grad_inputs, grad_step_size = (inputs.new_empty(inputs.shape) for _ in range(2))
    grad_gate = inputs.new_empty(0) if gate is None else inputs.new_empty(inputs.shape)
    grad_input_matrix, grad_output_matrix = (input_matrix.new_empty(input_matrix.shape) for _ in range(2))
    grad_state_matrix = torch.zeros_like(state_matrix)
    grad_skip_weight, grad_step_bias = (state_matrix.new_zeros(channels) for _ in range(2))
    carry = state_matrix.new_zeros(batch, channels, state_size)
    if grad_final_state is not None:
        carry = carry + grad_final_state

    def sum_over_group(per_channel: Tensor) -> Tensor:
        return per_channel.unflatten(2, (groups, channels // groups)).sum(3)

    for number, bounds in reversed(list(enumerate(interval_bounds(length)))):
        inputs_here, raw_step, input_matrix_here, output_matrix_here, grad_here = (
            _take(sequence, bounds, reverse, dtype)
            for sequence in (inputs, step_size, input_matrix, output_matrix, grad_outputs)
        )
        gate_here = None if gate is None else _take(gate, bounds, reverse, dtype)
        into = reference.per_channel(input_matrix_here, channels)
        out_of = reference.per_channel(output_matrix_here, channels)
        step = reference.positive_step_size(raw_step, step_bias, step_softplus)
        decay = reference.decay(step, state_matrix)
        drive = reference.drive(step, inputs_here, into)
        states = [border_states[:, number].transpose(1, 2)]
        for position in range(step.shape[1]):
            states.append(reference.next_state(states[-1], decay[:, position], drive[:, position]))
        before, after = torch.stack(states[:-1], dim=1), torch.stack(states[1:], dim=1)
        if gate_here is not None:
            ungated = reference.skip(reference.read_out(after, out_of), inputs_here, skip_weight)
            opening = torch.sigmoid(gate_here)
            slope = opening * (1 + gate_here * (1 - opening))
            _put(grad_gate, bounds, reverse, grad_here * ungated * slope)
            grad_here = grad_here * F.silu(gate_here)

        grad_states = torch.empty_like(decay)
        for position in reversed(range(step.shape[1])):
            grad_states[:, position] = grad_here[:, position].unsqueeze(-1) * out_of[:, position] + carry
            carry = grad_states[:, position] * decay[:, position]
        grad_exponent = grad_states * decay * before
        grad_drive = (grad_states * into).sum(-1)
        grad_step = (grad_exponent * state_matrix).sum(-1) + grad_drive * inputs_here
        grad_direct = 0 if skip_weight is None else grad_here * skip_weight
        if step_softplus:
            grad_step = grad_step * torch.sigmoid(raw_step if step_bias is None else raw_step + step_bias)

        _put(grad_inputs, bounds, reverse, grad_drive * step + grad_direct)
        _put(grad_step_size, bounds, reverse, grad_step)
        scaled_inputs = (step * inputs_here).unsqueeze(-1)
        _put(grad_input_matrix, bounds, reverse, sum_over_group(grad_states * scaled_inputs))
        _put(grad_output_matrix, bounds, reverse, sum_over_group(grad_here.unsqueeze(-1) * after))
        grad_state_matrix += (grad_exponent * step.unsqueeze(-1)).sum((0, 1))
        grad_skip_weight += (grad_here * inputs_here).sum((0, 1))
        grad_step_bias += grad_step.sum((0, 1))
    return (
        grad_inputs, grad_step_size, grad_state_matrix, grad_input_matrix, grad_output_matrix,
        inputs.new_empty(0) if skip_weight is None else grad_skip_weight, grad_gate,
        inputs.new_empty(0) if step_bias is None else grad_step_bias, carry,
    )  # fmt: skip
