"""The selective scan in plain PyTorch with bounded memory: the fallback without the native library.

It processes the sequence in intervals (`mambacore.layout`). Only the state before each interval is kept; backward goes
through the intervals from the last to the first, recomputes each from its boundary state, and propagates the gradient
of the state. (Backward is written explicitly: inside a registered operator PyTorch's autograd is disabled.)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.layout import as_numbers, as_states, boundary_shape, interval_bounds
from mambacore.scan import reference
from mambacore.scan.arguments import ScanArguments, ScanGradients


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
    """The inverse of `_take`."""
    begin, end = bounds
    if reverse:
        sequence[:, sequence.shape[1] - end : sequence.shape[1] - begin] = values.flip(1).to(sequence.dtype)
    else:
        sequence[:, begin:end] = values.to(sequence.dtype)


class _Interval:
    """The arguments over one interval, in scan order and in the compute dtype, and derived quantities."""

    def __init__(self, arguments: ScanArguments, bounds: tuple[int, int]) -> None:
        reverse, dtype, channels = arguments.reverse, arguments.dtype, arguments.inputs.shape[2]
        self.inputs, self.raw_step = (
            _take(sequence, bounds, reverse, dtype) for sequence in (arguments.inputs, arguments.step_size)
        )
        self.gate = None if arguments.gate is None else _take(arguments.gate, bounds, reverse, dtype)
        self.resets = None if arguments.resets is None else _take(arguments.resets, bounds, reverse, torch.bool)
        self.into, self.out_of = (
            _take_matrix(matrix, bounds, reverse, channels)
            for matrix in (arguments.input_matrix, arguments.output_matrix)
        )
        self.step = reference.positive_step_size(self.raw_step, arguments.step_bias, arguments.step_softplus)
        self.decay = reference.decay(self.step, arguments.state_matrix)

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The states before and after every position, (batch, positions, channels, state_size) each."""
        drive = reference.drive(self.step, self.inputs, self.into)
        before, after = [], []
        for position in range(self.decay.shape[1]):
            if self.resets is not None:
                state = reference.reset(state, self.resets[:, position])
            before.append(state)
            state = reference.next_state(state, self.decay[:, position], drive[:, position])
            after.append(state)
        return torch.stack(before, dim=1), torch.stack(after, dim=1)


def forward(arguments: ScanArguments, keep_boundaries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run the scan.

    Returns:
        Outputs (batch, length, channels), the final state (batch, channels, state_size), and the boundary states
        (`mambacore.layout.boundary_shape`), of no interval when they are not kept.
    """
    inputs, state_matrix, reverse = arguments.inputs, arguments.state_matrix, arguments.reverse
    batch, length, channels = inputs.shape
    state = arguments.initial_state
    if state is None:
        state = inputs.new_zeros(batch, channels, arguments.state_size, dtype=state_matrix.dtype)
    outputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    boundaries: list[Tensor] = []
    for bounds in interval_bounds(length):
        if keep_boundaries:
            boundaries.append(as_numbers(state))
        here = _Interval(arguments, bounds)
        _, after = here.states(state)
        state = after[:, -1]
        ungated = reference.skip(reference.read_out(after, here.out_of), here.inputs, arguments.skip_weight)
        _put(outputs, bounds, reverse, reference.gated(ungated, here.gate))
    kept = torch.stack(boundaries, dim=1) if boundaries else inputs.new_empty(0, dtype=arguments.dtype)
    if not boundaries:
        kept = kept.reshape(boundary_shape(batch, 0, channels, arguments.state_size, arguments.is_complex))
    return outputs, state.clone(), kept


def backward(
    grad_outputs: Tensor, grad_final_state: Tensor | None, arguments: ScanArguments, boundary_states: Tensor
) -> ScanGradients:
    """Compute the gradients of all arguments.

    The formulas are those of kernels/native/scan_backward.h; gradients of complex numbers follow PyTorch's convention
    (d/d real + i d/d imaginary), hence the conjugates.
    """
    inputs, state_matrix, reverse = arguments.inputs, arguments.state_matrix, arguments.reverse
    skip_weight, gate, step_bias = arguments.skip_weight, arguments.gate, arguments.step_bias
    batch, length, channels = inputs.shape
    grad_inputs, grad_step_size = (inputs.new_empty(inputs.shape) for _ in range(2))
    grad_gate = inputs.new_empty(0) if gate is None else inputs.new_empty(inputs.shape)
    matrices = (arguments.input_matrix, arguments.output_matrix)
    grad_input_matrix, grad_output_matrix = (torch.zeros_like(matrix) for matrix in matrices)
    grad_state_matrix = torch.zeros_like(state_matrix)
    grad_skip_weight, grad_step_bias = (inputs.new_zeros(channels, dtype=arguments.dtype) for _ in range(2))
    carry = state_matrix.new_zeros(batch, channels, arguments.state_size)
    if grad_final_state is not None:
        carry = carry + grad_final_state

    def add_to_matrix(grad_matrix: Tensor, bounds: tuple[int, int], per_channel: Tensor) -> None:
        if grad_matrix.dim() == 2:
            grad_matrix += per_channel.sum((0, 1))
        else:
            _put(grad_matrix, bounds, reverse, per_channel.unflatten(2, (grad_matrix.shape[2], -1)).sum(3))

    for number, bounds in reversed(list(enumerate(interval_bounds(length)))):
        here = _Interval(arguments, bounds)
        grad_here = _take(grad_outputs, bounds, reverse, arguments.dtype)
        before, after = here.states(as_states(boundary_states[:, number], arguments.is_complex))
        if here.gate is not None:
            ungated = reference.skip(reference.read_out(after, here.out_of), here.inputs, skip_weight)
            opening = torch.sigmoid(here.gate)
            slope = opening * (1 + here.gate * (1 - opening))
            _put(grad_gate, bounds, reverse, grad_here * ungated * slope)
            grad_here = grad_here * F.silu(here.gate)

        grad_read = (2 if arguments.is_complex else 1) * grad_here.unsqueeze(-1)
        grad_states = grad_read * here.out_of.conj()
        for position in reversed(range(here.step.shape[1])):
            grad_states[:, position] += carry
            carry = grad_states[:, position] * here.decay[:, position].conj()
            if here.resets is not None:
                carry = reference.reset(carry, here.resets[:, position])
        # Where the state is reset, `before` is zero, and so is the gradient of the decay.
        grad_exponent = grad_states * (here.decay * before).conj()
        grad_drive = (grad_states * here.into.conj()).sum(-1).real
        grad_step = (grad_exponent * state_matrix.conj()).sum(-1).real + grad_drive * here.inputs
        grad_direct = 0 if skip_weight is None else grad_here * skip_weight
        if arguments.step_softplus:
            grad_step = grad_step * torch.sigmoid(here.raw_step if step_bias is None else here.raw_step + step_bias)

        _put(grad_inputs, bounds, reverse, grad_drive * here.step + grad_direct)
        _put(grad_step_size, bounds, reverse, grad_step)
        add_to_matrix(grad_input_matrix, bounds, grad_states * (here.step * here.inputs).unsqueeze(-1))
        add_to_matrix(grad_output_matrix, bounds, grad_read * after.conj())
        grad_state_matrix += (grad_exponent * here.step.unsqueeze(-1)).sum((0, 1))
        grad_skip_weight += (grad_here * here.inputs).sum((0, 1))
        grad_step_bias += grad_step.sum((0, 1))
    return ScanGradients(
        grad_inputs, grad_step_size, grad_state_matrix, grad_input_matrix, grad_output_matrix,
        inputs.new_empty(0) if skip_weight is None else grad_skip_weight, grad_gate,
        inputs.new_empty(0) if step_bias is None else grad_step_bias, carry.resolve_conj(),
    )  # fmt: skip
