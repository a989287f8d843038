"""The state space dual scan's Triton kernels (`triton_kernels`) on tensors: the forward pass.

Backward is that of `mambacore.ssd.chunked`, from the same kept states, whose products PyTorch hands to the device's
libraries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.layout import channels_contiguous
from mambacore.ssd.arguments import SsdArguments
from mambacore.ssd.chunked import boundary_shape, chunk_positions, running_sum
from mambacore.ssd.triton_kernels import add_states, pass_states, read_out
from mambacore.triton.launch import or_first

# Tensor cores take no narrower matrices.
SMALLEST_BLOCK = 16
# Numbers of a state that one program of `pass_states` takes through the chunks.
PASS_BLOCK = 256
# Float32 products take no tensor cores and twice the registers.
WARPS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}


def power_of_two(number: int) -> int:
    """The smallest one that is not below the number."""
    return 1 << max(number - 1, 0).bit_length()


def _by_head(values: Tensor, reverse: bool) -> Tensor:
    """(batch, length, heads) to (batch, heads, length), contiguous, in the direction of the walk."""
    values = values.transpose(1, 2)
    return (values.flip(2) if reverse else values).contiguous()


def forward(arguments: SsdArguments, keep_boundaries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `mambacore.ssd.chunked.forward`, of a sequence that is not empty."""
    log_decay, skip_weight, initial_state = arguments.log_decay, arguments.skip_weight, arguments.initial_state
    resets, reverse, rank, length = arguments.resets, arguments.reverse, arguments.rank, arguments.length
    batch, heads, groups, state_size, head_width = arguments.sizes
    chunk = chunk_positions(rank)
    chunks = -(-length // chunk)
    inputs, input_matrix, output_matrix = (
        channels_contiguous(tensor) for tensor in (arguments.inputs, arguments.input_matrix, arguments.output_matrix)
    )
    weight = _by_head(arguments.input_weight, reverse)
    own = weight if arguments.own_weight is None else _by_head(arguments.own_weight, reverse)

    # In chunks, the last one filled up with positions where nothing fades.
    decays = F.pad(_by_head(log_decay, reverse).double(), (0, chunks * chunk - length)).unflatten(2, (chunks, chunk))
    starts = None
    if resets is not None:
        starts = F.pad(resets.flip(1) if reverse else resets, (0, chunks * chunk - length))
        starts = starts.unflatten(1, (chunks, chunk)).unsqueeze(1)
    total = running_sum(decays, starts)
    record = torch.zeros_like(total, dtype=torch.int32)
    if starts is not None:
        record = (record + starts.cumsum(-1)).to(torch.int32)
    kept = torch.where(record[..., -1] == 0, total[..., -1].exp(), 0.0).float()
    to_end = torch.where(record == record[..., -1:], (total[..., -1:] - total).exp(), 0.0)
    written = weight * to_end.flatten(2)[..., :length].float()
    high = total.float()
    low = (total - high.double()).float()
    # A chunk has no more records than positions, which fit into a byte.
    high, low, record = (
        values.flatten(2)[..., :length].expand(batch, heads, length).contiguous()
        for values in (high, low, record.to(torch.uint8))
    )

    states = log_decay.new_empty(boundary_shape(batch, length, heads, head_width, state_size, rank))
    final_state = log_decay.new_empty(batch, heads, head_width, state_size)
    outputs = inputs.new_empty(inputs.shape)
    sizes = (length, chunks, heads, groups, head_width, state_size)
    blocks = {
        "REVERSE": reverse,
        "RANK": rank,
        "CHUNK": chunk,
        "BLOCK_ROWS": max(SMALLEST_BLOCK, power_of_two(chunk * rank)),
        "BLOCK_WIDTH": max(SMALLEST_BLOCK, power_of_two(head_width)),
        "BLOCK_STATES": max(SMALLEST_BLOCK, power_of_two(state_size)),
    }
    of_inputs, of_into, of_out = (tensor.stride()[:3] for tensor in (inputs, input_matrix, output_matrix))
    add_states.start(
        (batch * chunks, heads), inputs, input_matrix, written.contiguous(), states, *sizes, *of_inputs, *of_into,
        **blocks, num_warps=WARPS[inputs.dtype],
    )  # fmt: skip
    numbers = head_width * state_size
    pass_states.start(
        (batch * heads, -(-numbers // PASS_BLOCK)), states, kept.contiguous(),
        or_first(None if initial_state is None else initial_state.contiguous(), states), final_state, chunks, heads,
        numbers, HAS_STATE=initial_state is not None, BLOCK=PASS_BLOCK, num_warps=1,
    )  # fmt: skip
    read_out.start(
        (batch * chunks, heads), inputs, input_matrix, output_matrix, outputs, states, high, low, record, weight, own,
        or_first(skip_weight, states), *sizes, *of_inputs, *of_into, *of_out, **blocks,
        HAS_SKIP=skip_weight is not None, num_warps=WARPS[inputs.dtype],
    )  # fmt: skip
    return outputs, final_state, states if keep_boundaries else states[:, :0]
