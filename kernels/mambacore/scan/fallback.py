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

# Positions from one kept state to the next, on a CPU: kept states then take state_size / 64 of the inputs'
# memory, and what one interval needs for backward stays in a processor's cache.
BORDER_INTERVAL = 64

# The same in the GPU's kernels, where backward keeps an interval's states in registers.
DEVICE_BORDER_INTERVAL = 16


def interval_bounds(length: int) -> list[tuple[int, int]]:
    """Begin and end, in scan order, of every interval."""
    return [(begin, min(begin + BORDER_INTERVAL, length)) for begin in range(0, length, BORDER_INTERVAL)]


def border_shape(
    batch: int, length: int, channels: int, state_size: int, is_complex: bool, interval: int = BORDER_INTERVAL
) -> tuple[int, ...]:
    """Shape of the kept states: (batch, intervals, numbers per channel, channels), real and imaginary parts in turn."""
    intervals = (length + interval - 1) // interval
    return batch, intervals, (2 if is_complex else 1) * state_size, channels


def _as_border(state: Tensor) -> Tensor:
    """A state (batch, channels, state_size) as it is kept: (batch, numbers per channel, channels)."""
    return (torch.view_as_real(state).flatten(2) if state.is_complex() else state).transpose(1, 2)


def _as_state(border: Tensor, is_complex: bool) -> Tensor:
    """The opposite of :func:`_as_border`."""
    numbers = border.transpose(1, 2).contiguous()
    return torch.view_as_complex(numbers.unflatten(2, (-1, 2))) if is_complex else numbers


def _take(sequence: Tensor, bounds: tuple[int, int], reverse: bool, dtype: torch.dtype) -> Tensor:
    """An interval of a sequence, in scan order and in the given dtype."""
    begin, end = bounds
    if not reverse:
        return sequence[:, begin:end].to(dtype)
    return sequence[:, sequence.shape[1] - end : sequence.shape[1] - begin].flip(1).to(dtype)


def _take_matrix(matrix: Tensor, bounds: tuple[int, int], reverse: bool, channels: int) -> Tensor:
    """An interval of a matrix, one for every channel; (channels, state_size) when it does not depend on time."""
    return (
        matrix if matrix.dim() == 2 else reference.per_channel(_take(matrix, bounds, reverse, matrix.dtype), channels)
    )


def _put(sequence: Tensor, bounds: tuple[int, int], reverse: bool, values: Tensor) -> None:
    """The opposite of :func:`_take`."""
    begin, end = bounds
    if reverse:
        sequence[:, sequence.shape[1] - end : sequence.shape[1] - begin] = values.flip(1).to(sequence.dtype)
    else:
        sequence[:, begin:end] = values.to(sequence.dtype)


def _states_of_interval(state: Tensor, decay: Tensor, drive: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states before and after every position of an interval, (batch, positions, channels, state_size) each."""
    before, after = [], []
    for position in range(decay.shape[1]):
        if resets is not None:
            state = reference.reset(state, resets[:, position])
        before.append(state)
        state = reference.next_state(state, decay[:, position], drive[:, position])
        after.append(state)
    return torch.stack(before, dim=1), torch.stack(after, dim=1)


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
    resets: Tensor | None,
    step_softplus: bool,
    reverse: bool,
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state, and the states before each interval (:func:`border_shape`)."""
    batch, length, channels = inputs.shape
    state_size, dtype = state_matrix.shape[1], compute_dtype(inputs.dtype)
    state = initial_state
    if state is None:
        state = inputs.new_zeros(batch, channels, state_size, dtype=state_matrix.dtype)
    outputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    borders: list[Tensor] = []
    for bounds in interval_bounds(length):
        if keep_borders:
            borders.append(_as_border(state))
        inputs_here, raw_step = (_take(sequence, bounds, reverse, dtype) for sequence in (inputs, step_size))
        gate_here = None if gate is None else _take(gate, bounds, reverse, dtype)
        resets_here = None if resets is None else _take(resets, bounds, reverse, torch.bool)
        into, out_of = (_take_matrix(matrix, bounds, reverse, channels) for matrix in (input_matrix, output_matrix))
        step = reference.positive_step_size(raw_step, step_bias, step_softplus)
        decay, drive = reference.decay(step, state_matrix), reference.drive(step, inputs_here, into)
        _, after = _states_of_interval(state, decay, drive, resets_here)
        state = after[:, -1]
        ungated = reference.skip(reference.read_out(after, out_of), inputs_here, skip_weight)
        _put(outputs, bounds, reverse, reference.gated(ungated, gate_here))
    kept = torch.stack(borders, dim=1) if borders else inputs.new_empty(0, dtype=dtype)
    if not borders:
        kept = kept.reshape(border_shape(batch, 0, channels, state_size, state_matrix.is_complex()))
    return outputs, state.clone(), kept


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
    resets: Tensor | None,
    border_states: Tensor,
    step_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, state.

    Those of absent arguments are empty tensors. The formulas are those of kernels/native/scan_backward.h; gradients of
    complex numbers follow PyTorch's convention (d/d real + i d/d imaginary), hence the conjugates.
    """
    batch, length, channels = inputs.shape
    state_size, dtype, is_complex = state_matrix.shape[1], compute_dtype(inputs.dtype), state_matrix.is_complex()
    grad_inputs, grad_step_size = (inputs.new_empty(inputs.shape) for _ in range(2))
    grad_gate = inputs.new_empty(0) if gate is None else inputs.new_empty(inputs.shape)
    grad_input_matrix, grad_output_matrix = (torch.zeros_like(matrix) for matrix in (input_matrix, output_matrix))
    grad_state_matrix = torch.zeros_like(state_matrix)
    grad_skip_weight, grad_step_bias = (inputs.new_zeros(channels, dtype=dtype) for _ in range(2))
    carry = state_matrix.new_zeros(batch, channels, state_size)
    if grad_final_state is not None:
        carry = carry + grad_final_state

    def add_to_matrix(grad_matrix: Tensor, bounds: tuple[int, int], per_channel: Tensor) -> None:
        if grad_matrix.dim() == 2:
            grad_matrix += per_channel.sum((0, 1))
        else:
            _put(grad_matrix, bounds, reverse, per_channel.unflatten(2, (grad_matrix.shape[2], -1)).sum(3))

    for number, bounds in reversed(list(enumerate(interval_bounds(length)))):
        inputs_here, raw_step, grad_here = (
            _take(sequence, bounds, reverse, dtype) for sequence in (inputs, step_size, grad_outputs)
        )
        gate_here = None if gate is None else _take(gate, bounds, reverse, dtype)
        resets_here = None if resets is None else _take(resets, bounds, reverse, torch.bool)
        into, out_of = (_take_matrix(matrix, bounds, reverse, channels) for matrix in (input_matrix, output_matrix))
        step = reference.positive_step_size(raw_step, step_bias, step_softplus)
        decay, drive = reference.decay(step, state_matrix), reference.drive(step, inputs_here, into)
        before, after = _states_of_interval(_as_state(border_states[:, number], is_complex), decay, drive, resets_here)
        if gate_here is not None:
            ungated = reference.skip(reference.read_out(after, out_of), inputs_here, skip_weight)
            opening = torch.sigmoid(gate_here)
            slope = opening * (1 + gate_here * (1 - opening))
            _put(grad_gate, bounds, reverse, grad_here * ungated * slope)
            grad_here = grad_here * F.silu(gate_here)

        grad_read = (2 if is_complex else 1) * grad_here.unsqueeze(-1)
        grad_states = grad_read * out_of.conj()
        for position in reversed(range(step.shape[1])):
            grad_states[:, position] += carry
            carry = grad_states[:, position] * decay[:, position].conj()
            if resets_here is not None:
                carry = reference.reset(carry, resets_here[:, position])
        # Where the state was reset, `before` is zero, and so is the gradient of the decay.
        grad_exponent = grad_states * (decay * before).conj()
        grad_drive = (grad_states * into.conj()).sum(-1).real
        grad_step = (grad_exponent * state_matrix.conj()).sum(-1).real + grad_drive * inputs_here
        grad_direct = 0 if skip_weight is None else grad_here * skip_weight
        if step_softplus:
            grad_step = grad_step * torch.sigmoid(raw_step if step_bias is None else raw_step + step_bias)

        _put(grad_inputs, bounds, reverse, grad_drive * step + grad_direct)
        _put(grad_step_size, bounds, reverse, grad_step)
        add_to_matrix(grad_input_matrix, bounds, grad_states * (step * inputs_here).unsqueeze(-1))
        add_to_matrix(grad_output_matrix, bounds, grad_read * after.conj())
        grad_state_matrix += (grad_exponent * step.unsqueeze(-1)).sum((0, 1))
        grad_skip_weight += (grad_here * inputs_here).sum((0, 1))
        grad_step_bias += grad_step.sum((0, 1))
    return (
        grad_inputs, grad_step_size, grad_state_matrix, grad_input_matrix, grad_output_matrix,
        inputs.new_empty(0) if skip_weight is None else grad_skip_weight, grad_gate,
        inputs.new_empty(0) if step_bias is None else grad_step_bias, carry.resolve_conj(),
    )  # fmt: skip
