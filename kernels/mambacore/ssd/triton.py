"""The state space dual scan's Triton kernels (`triton_kernels`, `triton_backward`) on tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

from mambacore.layout import channels_contiguous, sum_of_parts
from mambacore.ssd import chunked
from mambacore.ssd.arguments import SsdArguments, SsdGradients
from mambacore.ssd.chunked import boundary_shape, chunk_positions, running_sum
from mambacore.ssd.triton_backward import read_back_inputs, read_back_matrix
from mambacore.ssd.triton_kernels import add_states, pass_states, read_out
from mambacore.triton.launch import multiprocessors, or_first

# Tensor cores take no narrower matrices.
SMALLEST_BLOCK = 16
# Numbers of a state that one program of `pass_states` takes through the chunks.
PASS_BLOCK = 256
# Float32 products take no tensor cores and twice the registers.
WARPS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}
BACKWARD_WARPS = 8
# States of a program of `read_back_matrix`; more leave the registers.
MATRIX_STATES = 128
# Backward, a program takes so many heads of a group that there are still so many programs per multiprocessor.
PROGRAMS_TO_FILL = 4


def power_of_two(number: int) -> int:
    """The smallest one that is not below the number."""
    return 1 << max(number - 1, 0).bit_length()


def heads_at_once(programs: int, heads_of_group: int, processors: int) -> int:
    """How many heads of a group a backward program takes: the most that leave enough programs to fill the device.

    Args:
        programs: chunks of all groups and sequences.
        heads_of_group: heads that share their matrices.
        processors: multiprocessors of the device.
    """
    fitting = [count for count in range(1, heads_of_group + 1) if heads_of_group % count == 0]
    enough = [count for count in fitting if programs * (heads_of_group // count) >= PROGRAMS_TO_FILL * processors]
    return max(enough, default=1)


class _Call:
    """What both passes share: tensors in the kernels' layout, what decays make of the chunks, sizes and switches."""

    def __init__(self, arguments: SsdArguments) -> None:
        self.arguments, reverse = arguments, arguments.reverse
        rank, length = arguments.rank, arguments.length
        self.batch, self.heads, self.groups, self.state_size, self.head_width = arguments.sizes
        self.chunk = chunk_positions(rank)
        self.chunks = -(-length // self.chunk)
        self.inputs, self.into, self.out_of = (
            channels_contiguous(tensor)
            for tensor in (arguments.inputs, arguments.input_matrix, arguments.output_matrix)
        )
        self.weight = self.by_head(arguments.input_weight)
        self.own = self.weight if arguments.own_weight is None else self.by_head(arguments.own_weight)

        # In chunks, the last one filled up with positions where nothing fades.
        padding, cut = (0, self.chunks * self.chunk - length), (self.chunks, self.chunk)
        decays = F.pad(self.by_head(arguments.log_decay).double(), padding).unflatten(2, cut)
        resets, starts = arguments.resets, None
        if resets is not None:
            starts = F.pad(resets.flip(1) if reverse else resets, padding).unflatten(1, cut).unsqueeze(1)
        total = running_sum(decays, starts)
        record = torch.zeros_like(total, dtype=torch.int32)
        if starts is not None:
            record = (record + starts.cumsum(-1)).to(torch.int32)
        self.kept = torch.where(record[..., -1] == 0, total[..., -1].exp(), 0.0).float().contiguous()
        self._total, self._record = total, record
        high = total.float()
        low = (total - high.double()).float()
        # A chunk has no more records than positions, which fit into a byte.
        self.high, self.low, self.record = (self._by_position(values) for values in (high, low, record.to(torch.uint8)))
        self.sizes = (length, self.chunks, self.heads, self.groups, self.head_width, self.state_size)
        self.blocks: dict[str, Any] = {
            "REVERSE": reverse,
            "RANK": rank,
            "CHUNK": self.chunk,
            "BLOCK_ROWS": max(SMALLEST_BLOCK, power_of_two(self.chunk * rank)),
            "BLOCK_WIDTH": max(SMALLEST_BLOCK, power_of_two(self.head_width)),
            "BLOCK_STATES": max(SMALLEST_BLOCK, power_of_two(self.state_size)),
        }

    def by_head(self, values: Tensor) -> Tensor:
        """(batch, length, heads) to (batch, heads, length), contiguous, in the direction of the walk."""
        values = values.transpose(1, 2)
        return (values.flip(2) if self.arguments.reverse else values).contiguous()

    def _by_position(self, values: Tensor) -> Tensor:
        """(batch, heads, chunks, positions of a chunk) to (batch, heads, length)."""
        return values.flatten(2)[..., : self.arguments.length].expand(self.batch, self.heads, -1).contiguous()

    def to_end(self) -> Tensor:
        """(batch, heads, length): what is left of an input at the end of its chunk."""
        last = (self._record == self._record[..., -1:], self._total[..., -1:] - self._total)
        return self._by_position(torch.where(last[0], last[1].exp(), 0.0).float())

    def from_start(self) -> Tensor:
        """(batch, heads, length): what a position sees of the state before its chunk."""
        return self._by_position(torch.where(self._record == 0, self._total.exp(), 0.0).float())

    def states(self) -> Tensor:
        """Place for a state per chunk."""
        sizes = (self.batch, self.arguments.length, self.heads, self.head_width, self.state_size, self.arguments.rank)
        return self.arguments.log_decay.new_empty(boundary_shape(*sizes))

    def add_up(self, vectors: Tensor, matrix: Tensor, weight: Tensor) -> Tensor:
        """For every chunk and head the sum over its rows of weight * vector row^T."""
        added = self.states()
        add_states.start(
            (self.batch * self.chunks, self.heads), vectors, matrix, weight.contiguous(), added, *self.sizes,
            *vectors.stride()[:3], *matrix.stride()[:3], **self.blocks, num_warps=WARPS[vectors.dtype],
        )  # fmt: skip
        return added

    def hand_on(self, added: Tensor, first: Tensor | None, backward: bool) -> Tensor:
        """Replace what chunks add by the states before them (backward: after them); the last state."""
        last = added.new_empty(self.batch, self.heads, self.head_width, self.state_size)
        numbers = self.head_width * self.state_size
        pass_states.start(
            (self.batch * self.heads, -(-numbers // PASS_BLOCK)), added, self.kept,
            or_first(None if first is None else first.contiguous(), added), last, self.chunks, self.heads, numbers,
            HAS_STATE=first is not None, BACKWARD=backward, BLOCK=PASS_BLOCK, num_warps=1,
        )  # fmt: skip
        return last


def forward(arguments: SsdArguments, keep_boundaries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `mambacore.ssd.chunked.forward`, of a sequence that is not empty."""
    run, skip_weight = _Call(arguments), arguments.skip_weight
    outputs = run.inputs.new_empty(run.inputs.shape)
    states = run.add_up(run.inputs, run.into, run.weight * run.to_end())
    final_state = run.hand_on(states, arguments.initial_state, backward=False)
    read_out.start(
        (run.batch * run.chunks, run.heads), run.inputs, run.into, run.out_of, outputs, states, run.high, run.low,
        run.record, run.weight, run.own, or_first(skip_weight, states), *run.sizes, *run.inputs.stride()[:3],
        *run.into.stride()[:3], *run.out_of.stride()[:3], **run.blocks, HAS_SKIP=skip_weight is not None,
        num_warps=WARPS[run.inputs.dtype],
    )  # fmt: skip
    return outputs, final_state, states if keep_boundaries else states[:, :0]


def backward(
    grad_outputs: Tensor, grad_final_state: Tensor | None, arguments: SsdArguments, boundary_states: Tensor
) -> SsdGradients:
    """As `mambacore.ssd.chunked.backward`, of a sequence that is not empty."""
    run, skip_weight, rank = _Call(arguments), arguments.skip_weight, arguments.rank
    batch, length, heads = arguments.log_decay.shape
    grad_outputs, boundary_states = channels_contiguous(grad_outputs), boundary_states.contiguous()
    grad_states = run.add_up(grad_outputs, run.out_of, run.from_start())
    grad_first_state = run.hand_on(grad_states, grad_final_state, backward=True)
    grad_inputs = run.inputs.new_empty(run.inputs.shape)
    programs, of_group = batch * run.chunks * run.groups, heads // run.groups
    at_once = heads_at_once(programs, of_group, multiprocessors(run.inputs))
    parts = of_group // at_once
    grad_into, grad_out_of = (
        grad_states.new_empty(parts, *matrix.shape) for matrix in (arguments.input_matrix, arguments.output_matrix)
    )
    states_at_once = min(MATRIX_STATES, run.blocks["BLOCK_STATES"])
    state_blocks = -(-run.state_size // states_at_once)
    numbers = grad_states.new_empty(4 + state_blocks, batch, heads, length * rank)
    sequences = [stride for one in (grad_outputs, run.inputs, run.into, run.out_of) for stride in one.stride()[:3]]
    to_end, from_start = run.to_end(), run.from_start()
    rows = run.blocks["BLOCK_ROWS"]
    grad_scores = run.inputs.new_empty(batch, run.chunks, heads, rows, rows)
    written = (run.weight * to_end).contiguous()
    options = {**run.blocks, "num_warps": BACKWARD_WARPS}
    try:
        read_back_inputs.start(
            (batch * run.chunks, heads), grad_outputs, run.inputs, run.into, run.out_of, grad_states, run.high,
            run.low, run.record, run.weight, run.own, to_end, or_first(skip_weight, grad_states), grad_inputs,
            grad_scores, numbers, *run.sizes, batch, *sequences,
            HAS_SKIP=skip_weight is not None, **options,
        )  # fmt: skip
        for into, grad_matrix in ((True, grad_into), (False, grad_out_of)):
            read_back_matrix.start(
                (batch * run.chunks, run.groups * parts, state_blocks), grad_outputs, run.inputs, run.into,
                run.out_of, boundary_states, grad_states, grad_scores, from_start, written, run.kept, grad_matrix,
                numbers, *run.sizes, at_once, batch, *sequences, INTO=into,
                **options | {"BLOCK_STATES": states_at_once},
            )  # fmt: skip
    except OutOfResources:  # a device with less shared memory than such states and heads take
        return chunked.backward(grad_outputs, grad_final_state, arguments, boundary_states)
    of_weight, of_own, to_next, of_skip, *to_this = numbers.unflatten(3, (length, rank)).unbind()
    of_weight, of_own = of_weight.sum(-1), of_own.sum(-1)
    # Sums up to a position are whole in its last row; they are of the next one of the chunk.
    after = to_next[..., -1].flip(2) if arguments.reverse else to_next[..., -1]
    after = F.pad(after, (1, run.chunks * run.chunk - length)).narrow(2, 0, run.chunks * run.chunk)
    after = after.unflatten(2, (run.chunks, run.chunk)).clone()
    after[..., 0] = 0
    after = after.flatten(2)[..., :length]
    of_decay = sum_of_parts(torch.stack(to_this))[..., -1] + (after.flip(2) if arguments.reverse else after)
    own_weight = arguments.own_weight
    return SsdGradients(
        grad_inputs,
        of_decay.transpose(1, 2).contiguous(),
        sum_of_parts(grad_into).to(arguments.input_matrix.dtype),
        sum_of_parts(grad_out_of).to(arguments.output_matrix.dtype),
        (of_weight + of_own if own_weight is None else of_weight).transpose(1, 2).contiguous(),
        numbers.new_empty(0) if own_weight is None else of_own.transpose(1, 2).contiguous(),
        numbers.new_empty(0) if skip_weight is None else of_skip.sum((0, 2, 3)),
        grad_first_state,
    )
