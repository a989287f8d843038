"""The selective scan, one short function per equation: the definition that faster implementations are tested against.

Equations are those of Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
section 2 and algorithm 2, in the form the published code computes. Any dtype works; float64 is used as the reference.
With a complex state_matrix the state, input_matrix and output_matrix are complex, everything else is real. Shapes:
inputs, step_size, gate (batch, length, channels); state_matrix (channels, state_size); input_matrix and output_matrix
(batch, length, groups, state_size), or (channels, state_size) when they do not depend on time; skip_weight and
step_bias (channels,); state (batch, channels, state_size).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.packing import resets_before


def positive_step_size(step_size: Tensor, step_bias: Tensor | None, step_softplus: bool) -> Tensor:
    """Delta = softplus(raw step + bias): the length of the step that each position takes (algorithm 2, line 4)."""
    if step_bias is not None:
        step_size = step_size + step_bias
    return F.softplus(step_size) if step_softplus else step_size


def decay(step_size: Tensor, state_matrix: Tensor) -> Tensor:
    """exp(Delta A), the zero-order hold of equation 4, as (..., channels, state_size)."""
    return torch.exp(step_size.unsqueeze(-1) * state_matrix)


def drive(step_size: Tensor, inputs: Tensor, input_matrix: Tensor) -> Tensor:
    """Delta B x, Euler's rule for B, which stands in for equation 4's second half when B depends on the input.

    `input_matrix` is already per channel: (..., channels, state_size).
    """
    return (step_size * inputs).unsqueeze(-1) * input_matrix


def next_state(state: Tensor, decay_now: Tensor, drive_now: Tensor) -> Tensor:
    """h_t = exp(Delta A) h_{t-1} + Delta B x_t (equation 2a)."""
    return decay_now * state + drive_now


def read_out(state: Tensor, output_matrix: Tensor) -> Tensor:
    """C h, summed over the states (equation 2b); `output_matrix` is already per channel.

    A complex state stands for itself and its conjugate, so that the sum over both is twice its real part.
    """
    product = (state * output_matrix).sum(-1)
    return 2 * product.real if product.is_complex() else product


def skip(outputs: Tensor, inputs: Tensor, skip_weight: Tensor | None) -> Tensor:
    """y + D x, the direct path from input to output."""
    return outputs if skip_weight is None else outputs + skip_weight * inputs


def gated(outputs: Tensor, gate: Tensor | None) -> Tensor:
    """y * silu(z), the gate of the Mamba block (figure 3)."""
    return outputs if gate is None else outputs * F.silu(gate)


def per_channel(matrix: Tensor, channels: int) -> Tensor:
    """Give every channel the matrix of its group: (..., groups, state_size) to (..., channels, state_size)."""
    return matrix.repeat_interleave(channels // matrix.shape[-2], dim=-2)


def reset(state: Tensor, resets: Tensor) -> Tensor:
    """Zero the state in the batch items (batch,) where a new record begins."""
    return torch.where(resets[:, None, None], torch.zeros_like(state), state)


def selective_scan_reference(
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None = None,
    gate: Tensor | None = None,
    step_bias: Tensor | None = None,
    step_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    sequence_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the operator position by position.

    Returns:
        `outputs` (batch, length, channels) and the final `state` (batch, channels, state_size): the state after the
        last position in scan order, which is position 0 when `reverse`.
    """
    batch, length, channels = inputs.shape
    state = initial_state
    if state is None:
        state = torch.zeros(batch, channels, state_matrix.shape[-1], dtype=state_matrix.dtype, device=inputs.device)
    resets = None if sequence_starts is None else resets_before(sequence_starts, reverse)
    step = positive_step_size(step_size, step_bias, step_softplus)

    def at(matrix: Tensor, position: int) -> Tensor:
        return matrix if matrix.dim() == 2 else per_channel(matrix[:, position], channels)

    outputs: list[Tensor] = []
    for position in reversed(range(length)) if reverse else range(length):
        step_now, inputs_now = step[:, position], inputs[:, position]
        if resets is not None:
            state = reset(state, resets[:, position])
        drive_now = drive(step_now, inputs_now, at(input_matrix, position))
        state = next_state(state, decay(step_now, state_matrix), drive_now)
        outputs.append(read_out(state, at(output_matrix, position)))
    if reverse:
        outputs.reverse()
    stacked = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(inputs)
    return gated(skip(stacked, inputs, skip_weight), gate), state
