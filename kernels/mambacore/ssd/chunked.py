"""The state space dual scan in plain PyTorch, chunk by chunk: matrix products inside, one state per head in between.

Dao & Gu, arXiv 2405.21060, section 6: with the decays of a chunk summed up to `c` (in logarithms), a position i reads
from a position j of its chunk through ``exp(c_i - c_j) <C_i, B_j>``, which for all pairs is one product of matrices
under a mask, and from everything before the chunk through the state that arrives there. Backward is written out:
inside a registered operator PyTorch's own differentiation is switched off.

Everything here is in rows: the positions, each `rank` times (`mambacore.ssd.reference`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.devices import widened
from mambacore.ssd.arguments import SsdArguments, SsdGradients

# Rows of a chunk. A longer one means fewer states to hand on and to keep for backward, and larger masks.
CHUNK_ROWS = 64

# Elements of the masks (rows x rows for every head and chunk) that are computed side by side.
_MASK_ELEMENTS = 1 << 18


def chunk_positions(rank: int) -> int:
    """Positions from one kept state to the next."""
    return max(1, CHUNK_ROWS // rank)


def boundary_shape(
    batch: int, length: int, heads: int, head_width: int, state_size: int, rank: int
) -> tuple[int, int, int, int, int]:
    """Shape of the kept states, those before each chunk: (batch, chunks, heads, head_width, state_size)."""
    return batch, -(-length // chunk_positions(rank)), heads, head_width, state_size


class _Walk(NamedTuple):
    """How a sequence is walked: its sizes, its direction, and the chunks that are computed side by side."""

    length: int
    rank: int
    groups: int
    reverse: bool
    chunks_at_once: int

    def blocks(self) -> list[tuple[int, int, int]]:
        """Begin and end, in the direction of the walk, and positions of a chunk, of every block of chunks.

        All chunks are whole but for the last one, which has what is left.
        """
        chunk = chunk_positions(self.rank)
        whole = self.length - self.length % chunk
        step = chunk * self.chunks_at_once
        blocks = [(begin, min(begin + step, whole), chunk) for begin in range(0, whole, step)]
        return blocks if whole == self.length else [*blocks, (whole, self.length, self.length - whole)]

    def rows(self, sequence: Tensor, bounds: tuple[int, int], rank: int) -> tuple[int, int]:
        """First and last row, as they lie in memory, of the positions between `bounds`."""
        begin, end = (bound * rank for bound in bounds)
        return (sequence.shape[1] - end, sequence.shape[1] - begin) if self.reverse else (begin, end)

    def take(self, sequence: Tensor, bounds: tuple[int, int], chunk: int, rank: int, dtype: torch.dtype) -> Tensor:
        """(batch, rows, ...) between `bounds`, in the direction of the walk: (batch, chunks, rows of a chunk, ...)."""
        begin, end = self.rows(sequence, bounds, rank)
        piece = sequence[:, begin:end].to(dtype)
        return (piece.flip(1) if self.reverse else piece).unflatten(1, (-1, chunk * rank))

    def put(self, sequence: Tensor, bounds: tuple[int, int], rank: int, values: Tensor) -> None:
        """Inverse of `take`."""
        begin, end = self.rows(sequence, bounds, rank)
        values = values.flatten(1, 2)
        sequence[:, begin:end] = (values.flip(1) if self.reverse else values).to(sequence.dtype)


def _walk(arguments: SsdArguments) -> _Walk:
    rank = arguments.rank
    batch, heads, groups, *_ = arguments.sizes
    at_once = max(1, _MASK_ELEMENTS // max(1, batch * heads * (chunk_positions(rank) * rank) ** 2))
    return _Walk(arguments.length, rank, groups, arguments.reverse, at_once)


def running_sum(values: Tensor, starts: Tensor | None) -> Tensor:
    """Sums along the last dimension, which begin at 0 again where `starts` is True.

    Not as differences of total sums: a record must not depend on its neighbours, not even by rounding.
    """
    if starts is None:
        return values.cumsum(-1)
    total, sums = torch.zeros_like(values[..., 0]), []
    for value, start in zip(values.unbind(-1), starts.unbind(-1), strict=True):
        total = torch.where(start, 0.0, total + value)
        sums.append(total)
    return torch.stack(sums, dim=-1)


class _Block:
    """The chunks that are computed side by side.

    Dimensions, in short: b batch, c chunks, g groups, k heads of a group, i and j rows, p head_width, n state_size.
    """

    def __init__(self, walk: _Walk, bounds: tuple[int, int, int], arguments: SsdArguments) -> None:
        *span, chunk = bounds
        self.walk, self.span, self.chunk = walk, (span[0], span[1]), chunk
        self.dtype = arguments.log_decay.dtype
        self.inputs = self.of_heads(arguments.inputs)
        self.input_matrix, self.output_matrix = (
            self._take(matrix, walk.rank).permute(0, 1, 3, 2, 4).unsqueeze(3)
            for matrix in (arguments.input_matrix, arguments.output_matrix)
        )
        weight, own = self._of_positions(arguments.input_weight), arguments.own_weight
        own = weight if own is None else self._of_positions(own)
        resets = arguments.resets
        starts = None if resets is None else walk.take(resets, self.span, chunk, 1, torch.bool)[:, :, None, None]
        # c: (b, c, g, k, positions). In float64: differences of it may be small where it is large itself.
        total = running_sum(widened(self._of_positions(arguments.log_decay)), starts)
        distance = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(self.dtype)
        position = torch.arange(chunk, device=self.inputs.device)
        before = position.unsqueeze(-1) > position
        self.from_state = total.to(self.dtype).exp()  # what a position sees of the state that arrives
        self.to_state = (
            (total[..., -1:] - total).to(self.dtype).exp()
        )  # what is left of an input at the end of the chunk
        self.kept = self.from_state[..., -1]  # what is left of the state that arrives: (b, c, g, k)
        if starts is not None:
            record = starts.cumsum(-1)  # 0 for the record that comes into the chunk
            last = record[..., -1:]
            before = before & (record.unsqueeze(-1) == record.unsqueeze(-2))
            self.from_state = self.from_state * (record == 0)
            self.to_state = self.to_state * (record == last)
            self.kept = self.kept * (last == 0).squeeze(-1)
        # Masked before the exponential: a difference of the future may be large and its exponential infinite.
        self.fading = distance.masked_fill(~before, -torch.inf).exp()
        self.written = self.to_state * weight
        self.weight, self.same = weight, torch.diag_embed(own)
        self.mask = self._in_rows(self.fading * weight.unsqueeze(-2) + self.same)
        self.scores = self.output_matrix @ self.input_matrix.mT  # (b, c, g, 1, i, j)
        self.from_rows, self.written_rows = (
            self._over_rank(values).unsqueeze(-1) for values in (self.from_state, self.written)
        )

    def _take(self, sequence: Tensor, rank: int) -> Tensor:
        return self.walk.take(sequence, self.span, self.chunk, rank, self.dtype)

    def of_heads(self, sequence: Tensor) -> Tensor:
        """(batch, rows, heads, width) to (b, c, g, k, i, width)."""
        return self._take(sequence, self.walk.rank).unflatten(3, (self.walk.groups, -1)).permute(0, 1, 3, 4, 2, 5)

    def _of_positions(self, values: Tensor) -> Tensor:
        """(batch, length, heads) to (b, c, g, k, positions)."""
        return self._take(values, 1).unflatten(3, (self.walk.groups, -1)).permute(0, 1, 3, 4, 2)

    def put_heads(self, sequence: Tensor, values: Tensor) -> None:
        """Inverse of `of_heads`."""
        self.walk.put(sequence, self.span, self.walk.rank, values.permute(0, 1, 4, 2, 3, 5).flatten(3, 4))

    def put_groups(self, sequence: Tensor, values: Tensor) -> None:
        """(b, c, g, k, i, n), summed over the heads of a group, to its place in (batch, rows, groups, state_size)."""
        self.walk.put(sequence, self.span, self.walk.rank, values.sum(3).permute(0, 1, 3, 2, 4))

    def put_positions(self, sequence: Tensor, values: Tensor) -> None:
        """(b, c, g, k, positions) to its place in (batch, length, heads)."""
        self.walk.put(sequence, self.span, 1, values.permute(0, 1, 4, 2, 3).flatten(3, 4))

    def _over_rank(self, values: Tensor) -> Tensor:
        """(..., positions) to (..., rows)."""
        return values if self.walk.rank == 1 else values.repeat_interleave(self.walk.rank, dim=-1)

    def _in_rows(self, pairs: Tensor) -> Tensor:
        """(..., positions, positions) to (..., rows, rows)."""
        rank = self.walk.rank
        return pairs if rank == 1 else pairs.repeat_interleave(rank, -1).repeat_interleave(rank, -2)

    def sum_over_rank(self, values: Tensor) -> Tensor:
        """(..., rows) to (..., positions)."""
        return values if self.walk.rank == 1 else values.unflatten(-1, (-1, self.walk.rank)).sum(-1)

    def sum_of_pairs(self, pairs: Tensor) -> Tensor:
        """(..., rows, rows) to (..., positions, positions)."""
        rank = self.walk.rank
        if rank == 1:
            return pairs
        return pairs.unflatten(-1, (-1, rank)).unflatten(-3, (-1, rank)).sum((-1, -3))

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The states before every chunk, (b, c, g, k, p, n), and the one after the last."""
        added = (self.inputs * self.written_rows).mT @ self.input_matrix
        kept = self.kept[..., None, None]
        before = []
        for number in range(added.shape[1]):
            before.append(state)
            state = kept[:, number] * state + added[:, number]
        return torch.stack(before, dim=1), state


def forward(arguments: SsdArguments, keep_boundaries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state, and the states before each chunk (`boundary_shape`).

    Args:
        arguments: of the scan.
        keep_boundaries: whether the states before the chunks are wanted; none are returned otherwise.
    """
    inputs, log_decay, state = arguments.inputs, arguments.log_decay, arguments.initial_state
    batch, heads, _, state_size, head_width = arguments.sizes
    walk = _walk(arguments)
    if state is None:
        state = log_decay.new_zeros(batch, heads, head_width, state_size)
    state = state.unflatten(1, (walk.groups, -1))
    outputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    boundaries = log_decay.new_empty(
        boundary_shape(batch, walk.length if keep_boundaries else 0, heads, head_width, state_size, walk.rank)
    )
    first = 0
    for bounds in walk.blocks():
        block = _Block(walk, bounds, arguments)
        before, state = block.states(state)
        result = (block.scores * block.mask) @ block.inputs
        result = result + block.from_rows * (block.output_matrix @ before.mT)
        if arguments.skip_weight is not None:
            result = result + arguments.skip_weight.view(walk.groups, -1, 1, 1) * block.inputs
        block.put_heads(outputs, result)
        if keep_boundaries:
            boundaries[:, first : first + before.shape[1]] = before.flatten(2, 3)
        first += before.shape[1]
    return outputs, state.flatten(1, 2).clone(), boundaries


def backward(
    grad_outputs: Tensor, grad_final_state: Tensor | None, arguments: SsdArguments, boundary_states: Tensor
) -> SsdGradients:
    """The gradients, from those of the outputs and of the final state."""
    log_decay, own_weight, skip_weight = arguments.log_decay, arguments.own_weight, arguments.skip_weight
    batch, heads, _, state_size, head_width = arguments.sizes
    walk = _walk(arguments)
    grad_inputs, grad_input_matrix, grad_output_matrix = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (arguments.inputs, arguments.input_matrix, arguments.output_matrix)
    )
    grad_log_decay, grad_input_weight = (log_decay.new_empty(log_decay.shape) for _ in range(2))
    grad_own_weight = log_decay.new_empty(0 if own_weight is None else log_decay.shape)
    grad_skip_weight = log_decay.new_zeros(walk.groups, heads // walk.groups)
    if grad_final_state is None:
        grad_final_state = log_decay.new_zeros(batch, heads, head_width, state_size)
    carry = grad_final_state.unflatten(1, (walk.groups, -1))
    last = boundary_states.shape[1]
    for bounds in reversed(walk.blocks()):
        block = _Block(walk, bounds, arguments)
        grad = block.of_heads(grad_outputs)
        first = last - block.inputs.shape[1]
        before = boundary_states[:, first:last].unflatten(2, (walk.groups, -1))
        last = first
        # From the last chunk to the first: the gradient of the state after each of them.
        from_outputs = (grad * block.from_rows).mT @ block.output_matrix
        after: list[Tensor] = []
        for number in reversed(range(from_outputs.shape[1])):
            after.append(carry)
            carry = block.kept[:, number, ..., None, None] * carry + from_outputs[:, number]
        grad_after = torch.stack(after[::-1], dim=1)

        grad_mask = grad @ block.inputs.mT  # of scores * mask
        masked = block.scores * block.mask
        written = block.input_matrix @ grad_after.mT  # gradient of each input through the state after the chunk
        grad_here = masked.mT @ grad + block.written_rows * written
        if skip_weight is not None:
            grad_here = grad_here + skip_weight.view(walk.groups, -1, 1, 1) * grad
            grad_skip_weight += (grad * block.inputs).sum((0, 1, 4, 5))
        block.put_heads(grad_inputs, grad_here)
        grad_scores = grad_mask * block.mask
        read = grad @ before  # gradient of the arriving state through each output
        block.put_groups(grad_output_matrix, grad_scores @ block.input_matrix + block.from_rows * read)
        block.put_groups(
            grad_input_matrix,
            grad_scores.mT @ block.output_matrix + block.written_rows * (block.inputs @ grad_after),
        )

        pairs = block.sum_of_pairs(grad_mask * block.scores)
        own = pairs.diagonal(dim1=-2, dim2=-1)
        faded = pairs * block.fading
        in_state = block.sum_over_rank((written * block.inputs).sum(-1)) * block.to_state
        grad_weight = faded.sum(-2) + in_state
        block.put_positions(grad_input_weight, grad_weight + own if own_weight is None else grad_weight)
        if own_weight is not None:
            block.put_positions(grad_own_weight, own)
        # The decay of a position t stands between all i >= t and j < t. Their gradients are added up as they are: as
        # differences of sums over rows and columns, those of one record would leave roundings in the others.
        spanning = (faded * block.weight.unsqueeze(-2)).cumsum(-1)
        grad_decay = F.pad(spanning.tril(-1)[..., :-1].sum(-2), (1, 0))
        from_state = block.sum_over_rank((read * block.output_matrix).sum(-1)) * block.from_state
        grad_decay = grad_decay + from_state.flip(-1).cumsum(-1).flip(-1)
        grad_decay = grad_decay + F.pad((in_state * block.weight).cumsum(-1)[..., :-1], (1, 0))
        grad_decay = grad_decay + (block.kept * (before * grad_after).sum((-1, -2))).unsqueeze(-1)
        block.put_positions(grad_log_decay, grad_decay)
    return SsdGradients(
        grad_inputs,
        grad_log_decay,
        grad_input_matrix,
        grad_output_matrix,
        grad_input_weight,
        grad_own_weight,
        log_decay.new_empty(0) if skip_weight is None else grad_skip_weight.flatten(),
        carry.flatten(1, 2).clone(),
    )
