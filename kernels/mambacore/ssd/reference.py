"""The state space dual scan, one short function per equation: the definition that faster implementations are tested
against.

The recurrence is that of Dao & Gu, "Transformers are SSMs" (arXiv 2405.21060), section 2.1 with the scalar decay of
section 5: all states of a head decay equally. Three extensions cover Mamba-3 (arXiv 2603.15569) as well:
- `input_weight`, what an input counts for in the state (Mamba-2: the step size), and `own_weight`, what it counts for
  in the output of its own position, if that differs (the trapezoidal rule of Mamba-3, `mambacore.layers.mamba3`);
- a rank: `rank` vectors of each kind per position instead of one (Mamba-3's MIMO), each read after all are written.

Any dtype works; float64 is used as the reference.
Shapes: inputs (batch, length, heads, head_width) or (batch, length, rank, heads, head_width); input_matrix and
output_matrix (batch, length, groups, state_size) or (batch, length, rank, groups, state_size), where heads / groups
neighbouring heads share a group; log_decay, input_weight and own_weight (batch, length, heads); skip_weight (heads,);
state (batch, heads, head_width, state_size).
"""

import torch
from torch import Tensor

from mambacore.packing import resets_before


def per_head(matrix: Tensor, heads: int) -> Tensor:
    """Give every head the matrix of its group: (..., groups, state_size) to (..., heads, state_size)."""
    return matrix.repeat_interleave(heads // matrix.shape[-2], dim=-2)


def drive(weight: Tensor, inputs: Tensor, input_matrix: Tensor) -> Tensor:
    """weight * x B^T, summed over the rank: (batch, heads, head_width, state_size).

    `inputs` is (batch, rank, heads, head_width), `input_matrix` (batch, rank, heads, state_size).
    """
    outer = torch.einsum("brhp,brhn->bhpn", inputs, input_matrix)
    return weight[..., None, None] * outer


def next_state(state: Tensor, log_decay: Tensor, drive_now: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t B_t^T, one decay a_t = exp(log_decay_t) per head."""
    return torch.exp(log_decay)[..., None, None] * state + drive_now


def read_out(state: Tensor, output_matrix: Tensor) -> Tensor:
    """y_t = h_t C_t for each member of the rank: (batch, rank, heads, head_width)."""
    return torch.einsum("bhpn,brhn->brhp", state, output_matrix)


def skip(outputs: Tensor, inputs: Tensor, skip_weight: Tensor | None) -> Tensor:
    """y + D x, the direct path from input to output, one D per head."""
    return outputs if skip_weight is None else outputs + skip_weight.unsqueeze(-1) * inputs


def reset(state: Tensor, resets: Tensor) -> Tensor:
    """Zero the state in the batch items (batch,) where a new record begins."""
    return torch.where(resets[:, None, None, None], torch.zeros_like(state), state)


def ssd_scan_reference(
    inputs: Tensor,
    log_decay: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    input_weight: Tensor | None = None,
    own_weight: Tensor | None = None,
    skip_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    sequence_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the operator position by position.

    Returns:
        `outputs`, of the inputs' shape, and the final `state` (batch, heads, head_width, state_size): the state after
        the last position in scan order, which is position 0 when `reverse`.
    """
    ranked = inputs.dim() == 5
    if not ranked:
        inputs, input_matrix, output_matrix = (tensor.unsqueeze(2) for tensor in (inputs, input_matrix, output_matrix))
    batch, length, _, heads, head_width = inputs.shape
    state = initial_state
    if state is None:
        state = inputs.new_zeros(batch, heads, head_width, input_matrix.shape[-1], dtype=log_decay.dtype)
    resets = None if sequence_starts is None else resets_before(sequence_starts, reverse)
    weight = torch.ones_like(log_decay) if input_weight is None else input_weight
    own = weight if own_weight is None else own_weight

    outputs: list[Tensor] = []
    for position in reversed(range(length)) if reverse else range(length):
        inputs_now = inputs[:, position]
        into, out_of = (per_head(matrix[:, position], heads) for matrix in (input_matrix, output_matrix))
        if resets is not None:
            state = reset(state, resets[:, position])
        read = next_state(state, log_decay[:, position], drive(own[:, position], inputs_now, into))
        state = next_state(state, log_decay[:, position], drive(weight[:, position], inputs_now, into))
        outputs.append(skip(read_out(read, out_of), inputs_now, skip_weight))
    if reverse:
        outputs.reverse()
    stacked = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(inputs)
    return (stacked if ranked else stacked.squeeze(2)), state
