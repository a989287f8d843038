"""Exchange of states between ranks, equivalent to a scan of the whole sequence.

The way of a state through a stretch is an affine map: of a scan's state, `total decay * state + state from zero` (the
composition that a parallel scan rests on: Blelloch, "Prefix sums and their applications", 1990, section 1.4.1); of a
convolution's history, a shift by the stretch's length plus its last inputs. Every rank gathers the maps of all, which
are small, and applies those before it in order.

Every rank computes the same thing, whether it needs it or not: a rank that left out an exchange that is of no use to it
(the first one's incoming state, the last one's map), forward or backward, would leave the others waiting.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from mambacore.backends import compute_dtype
from mambacore.packing import resets_before
from mambacore.parallel.context import RankGroup, active_ranks


class _Gather(torch.autograd.Function):
    """Gather all ranks' messages, (count, numbers). The gradient of each is the sum over all ranks.

    `anchor` requires a gradient, so that backward passes here on every rank, whatever the message depends on.
    """

    @staticmethod
    def forward(ctx: Any, message: Tensor, anchor: Tensor, ranks: RankGroup) -> Tensor:
        # Results may outlive the group and shall not keep it: its threads may abort a process that ends before them.
        ctx.group, ctx.rank = weakref.ref(ranks.group), ranks.rank
        return _all_messages(message, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        group = ctx.group()
        if group is None:
            raise RuntimeError("the process group is gone; call backward before destroy_process_group")
        total = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total[ctx.rank], None, None


def _all_messages(message: Tensor, ranks: RankGroup) -> Tensor:
    gathered = message.new_empty(ranks.count * message.numel())
    distributed.all_gather_into_tensor(gathered, message.contiguous(), group=ranks.group)
    return gathered.view(ranks.count, -1)


def gather_over_ranks(ranks: RankGroup, *tensors: Tensor) -> list[Tensor]:
    """Tensors of all ranks, stacked in the order of ranks, in one exchange.

    Args:
        ranks: the participating ranks.
        tensors: of one dtype, or of the complex numbers over it; their shapes are the same on all ranks.

    Returns:
        For each tensor (count, *shape). Differentiable, unless they are integers.

    Raises:
        InputError: ranks that are about to exchange different things (checked at the first exchange of a block).
    """
    flat = [(torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1) for tensor in tensors]
    message = torch.cat(flat)
    ranks.agree(message)
    if message.is_floating_point():
        gathered = _Gather.apply(message, message.new_empty(0).requires_grad_(torch.is_grad_enabled()), ranks)
    else:
        gathered = _all_messages(message, ranks)
    parts = gathered.split([part.numel() for part in flat], dim=1)
    return [
        torch.view_as_complex(part.reshape(ranks.count, *tensor.shape, 2))
        if tensor.is_complex()
        else part.reshape(ranks.count, *tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _hand_on(
    ranks: RankGroup, reverse: bool, initial: Tensor, left_behind: Tensor, carry: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Apply the ranks' maps one after the other.

    Args:
        ranks: the participating ranks.
        reverse: whether the state passes from the last rank to the first.
        initial: the state that enters here if this is the first rank of the walk.
        left_behind: (count, ...), the states that ranks add; the first one's is complete, its incoming state included.
        carry: what rank r makes of the state that arrives there.

    Returns:
        The states that arrive at this rank and after all of them.
    """
    first, *others = ranks.order(reverse)
    arriving = {first: initial}
    state = left_behind[first]
    for rank in others:
        arriving[rank] = state
        state = carry(rank, state) + left_behind[rank]
    # Stacked and then chosen from, so that backward reaches the exchange on the first rank as well.
    return torch.stack([arriving[rank] for rank in range(ranks.count)])[ranks.rank], state


def state_over_ranks(
    ranks: RankGroup,
    total_decay: Tensor,
    stretch_state: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The states of a linear recurrence before this rank's stretch and after the whole sequence.

    Args:
        ranks: the participating ranks.
        total_decay: what is left of a state after this rank's stretch: 1 of an empty one, 0 if a record starts in it.
            Any shape that broadcasts to that of a state.
        stretch_state: the state after this rank's stretch: from `initial_state` where the sequence is entered
            (`RankGroup.is_first`), from zero elsewhere. Real or complex, as `total_decay`.
        initial_state: the state before the whole sequence; None for zero. Counts where the sequence is entered.
        reverse: the recurrence runs from the last position to the first.

    Returns:
        The state before this rank's stretch, and that after the whole sequence, which is the same on every rank.
    """
    decays, states = gather_over_ranks(ranks, total_decay, stretch_state)
    initial = torch.zeros_like(stretch_state) if initial_state is None else initial_state.to(stretch_state.dtype)
    return _hand_on(ranks, reverse, initial, states, lambda rank, state: decays[rank] * state)


def recurrence_over_ranks(
    run: Callable[[Tensor | None], tuple[Tensor, Tensor]],
    final_state: Callable[[Tensor | None], Tensor],
    total_decay: Callable[[], Tensor],
    initial_state: Tensor | None,
    sequence_starts: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a linear recurrence; inside `mambacore.parallel.context_parallel` over the stretches of all ranks.

    Args:
        run: from the state before this process's positions (None for zero) to outputs and the state after them.
        final_state: the same without the outputs, which may be cheaper.
        total_decay: gives what these positions leave of a state, (batch, ...), as many dimensions as a state and
            broadcasting to it. Records that start among them need not be considered.
        initial_state: (batch, ...), the state before the whole sequence; None for zero.
        sequence_starts: (batch, length), boolean, where records begin; None for nowhere.
        reverse: the recurrence runs from the last position to the first.

    Returns:
        The outputs of this process, and the state after the whole sequence.
    """
    ranks = active_ranks()
    if ranks is None:
        return run(initial_state)
    entry = entry_resets(ranks, sequence_starts, reverse)
    decay = _zero_rows(total_decay(), _resets_in_stretch(sequence_starts, reverse, entry))
    stretch_state = final_state(initial_state if ranks.is_first(reverse) else None)
    incoming, outgoing = state_over_ranks(ranks, decay, stretch_state, initial_state, reverse)
    outputs, _ = run(_zero_rows(incoming, entry))
    return outputs, outgoing


def positions_over_ranks(sequence: Tensor, initial_positions: int = 0) -> tuple[int, int]:
    """How many positions come before this process's, and how many there are up to the end of the whole sequence.

    Args:
        sequence: (batch, length, ...), this process's positions.
        initial_positions: how many came before the whole sequence. Counts on the first rank.
    """
    ranks, length = active_ranks(), sequence.shape[1]
    if ranks is None:
        return initial_positions, initial_positions + length
    mine = torch.tensor([length, initial_positions], device=sequence.device)
    (everyone,) = gather_over_ranks(ranks, mine)
    lengths, initial = everyone[:, 0].tolist(), int(everyone[0, 1])
    return initial + sum(lengths[: ranks.rank]), initial + sum(lengths)


def history_over_ranks(
    ranks: RankGroup,
    inputs: Tensor,
    positions: int,
    initial_history: Tensor | None = None,
    reverse: bool = False,
    sequence_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The last positions before this rank's stretch and of the whole sequence, however many ranks they come from.

    Args:
        ranks: the participating ranks.
        inputs: (batch, length, *rest), this rank's stretch.
        positions: how many positions a history has; 1 or more.
        initial_history: (batch, positions, *rest), what came before the whole sequence, oldest first; None for zeros.
            Counts where the sequence is entered.
        reverse: the walk is from the last position to the first.
        sequence_starts: (batch, length), boolean, where records begin: what belongs to another record is zero.

    Returns:
        Both (batch, positions, *rest), oldest first in the direction of the walk; the second is the same on every rank.
    """
    batch, length, *rest = inputs.shape
    walk = inputs.flip(1) if reverse else inputs
    kept = min(length, positions)
    last = walk[:, length - kept :]
    # By how many positions the stretch moves the history that arrives; by all of them if a record starts in between.
    shift = torch.full((batch,), kept, dtype=torch.int64, device=inputs.device)
    entry = entry_resets(ranks, sequence_starts, reverse)
    resets = _resets_in_stretch(sequence_starts, reverse, entry)
    if sequence_starts is not None and resets is not None:
        last = torch.where(_with_dimensions(_of_last_record(sequence_starts, kept, reverse), last), last, 0)
        shift = torch.where(resets, positions, shift)
    left_behind = torch.cat([inputs.new_zeros(batch, positions - kept, *rest), last], dim=1)
    if inputs.is_floating_point():
        left_behind = left_behind.to(compute_dtype(inputs.dtype))
    initial = torch.zeros_like(left_behind) if initial_history is None else initial_history.to(left_behind.dtype)
    if ranks.is_first(reverse):
        left_behind = left_behind + _shifted(initial, shift)
    # Integers up to the width of a kernel are exact in the message's dtype.
    histories, shifts = gather_over_ranks(ranks, left_behind, shift.to(left_behind.dtype))
    incoming, outgoing = _hand_on(
        ranks, reverse, initial, histories, lambda rank, history: _shifted(history, shifts[rank].long())
    )
    return _zero_rows(incoming, entry).to(inputs.dtype), outgoing.to(inputs.dtype)


def entry_resets(ranks: RankGroup, sequence_starts: Tensor | None, reverse: bool) -> Tensor | None:
    """(batch,), boolean: in reverse, whether the state that arrives at this rank is that of another record.

    It is if the next position, the first one of a later rank's stretch, is where a record begins. Forwards a rank sees
    that for itself: None.
    """
    if not reverse or sequence_starts is None:
        return None
    filled = sequence_starts.shape[1] > 0
    begins = sequence_starts[:, 0] if filled else sequence_starts.new_zeros(sequence_starts.shape[0])
    (everyone,) = gather_over_ranks(ranks, torch.stack([begins.long(), torch.full_like(begins, filled).long()]))
    resets = torch.zeros_like(begins)
    for rank in reversed(range(ranks.rank + 1, ranks.count)):
        resets = torch.where(everyone[rank, 1].bool(), everyone[rank, 0].bool(), resets)
    return resets


def _resets_in_stretch(sequence_starts: Tensor | None, reverse: bool, entry: Tensor | None) -> Tensor | None:
    """(batch,), boolean: whether nothing is left after the stretch of the state that arrives; None for nowhere."""
    if sequence_starts is None:
        return None
    inside = resets_before(sequence_starts, reverse).any(1)
    return inside if entry is None else inside | entry


def _of_last_record(sequence_starts: Tensor, count: int, reverse: bool) -> Tensor:
    """(batch, count), boolean, of the walk's last positions: whether they are of the same record as the very last."""
    resets = resets_before(sequence_starts, reverse)
    resets = (resets.flip(1) if reverse else resets)[:, sequence_starts.shape[1] - count :].long()
    return resets.flip(1).cumsum(1).flip(1) == resets


def _shifted(history: Tensor, shift: Tensor) -> Tensor:
    """The history (batch, positions, ...) after `shift` (batch,) more positions, which are left zero."""
    positions = history.shape[1]
    extended = torch.cat([history, torch.zeros_like(history)], dim=1)
    index = torch.arange(positions, device=history.device) + shift.unsqueeze(1)
    return extended.gather(1, _with_dimensions(index, history).expand_as(history))


def _zero_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Zero in the batch items (batch,) that are True."""
    return tensor if rows is None else torch.where(_with_dimensions(rows, tensor), 0, tensor)


def _with_dimensions(flags: Tensor, like: Tensor) -> Tensor:
    """The same with trailing dimensions of size 1, as many as `like` has."""
    return flags.reshape(*flags.shape, *[1] * (like.dim() - flags.dim()))
