"""The ranks that share a sequence, and the `with` block that activates them for layers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

# Its functions take the default group of the moment of its import as their default and keep it for good. The compiler
# imports it when the first operator runs; imported here, usually before there is a group, it keeps none, so that
# destroy_process_group ends the group's threads. Threads that live on may abort the process when it ends.
import torch.distributed.nn.functional
from torch import Tensor, distributed

from mambacore.errors import InputError

_active: ContextVar[RankGroup | None] = ContextVar("mambacore_ranks", default=None)

# How many blocks are open in any thread. The compiler can guard an integer but cannot read a context variable, so
# that outside of all blocks, where the number is 0, layers compile without a break.
_open_blocks = 0
_counting = threading.Lock()


@dataclass
class RankGroup:
    """The processes that share a sequence, in the order of their parts, as seen by one of them.

    Attributes:
        group: the process group; its rank r holds the r-th part.
        rank: rank of this process in the group.
        count: number of processes, at least two.
    """

    group: distributed.ProcessGroup
    rank: int
    count: int
    _agreed: bool = field(default=False, repr=False)

    def order(self, reverse: bool) -> list[int]:
        """Return the ranks in the order in which a state passes through them."""
        return list(range(self.count))[:: -1 if reverse else 1]

    def is_first(self, reverse: bool) -> bool:
        """Whether a state enters the sequence at this rank."""
        return self.rank == self.order(reverse)[0]

    def agree(self, message: Tensor) -> None:
        """Compare the message size on all ranks before the first exchange: a collective of unequal sizes would hang.

        Raises:
            InputError: on every rank, if messages differ in size or only some ranks compute gradients.
        """
        if self._agreed:
            return
        mine = torch.tensor([message.numel(), int(torch.is_grad_enabled())], device=message.device)
        everyone = mine.new_empty(self.count * mine.numel())
        distributed.all_gather_into_tensor(everyone, mine, group=self.group)
        sizes, wants_gradients = everyone.view(self.count, -1).T.tolist()
        if len(set(sizes)) > 1:
            raise InputError(
                f"the ranks exchange messages of {sizes} numbers, which must be equal; "
                "give every rank the same batch size and the same model"
            )
        if len(set(wants_gradients)) > 1:
            raise InputError(
                "some ranks compute gradients and others do not; use no_grad or inference_mode on every rank or on none"
            )
        self._agreed = True


def ranks_of(group: distributed.ProcessGroup | None = None) -> RankGroup | None:
    """Return the ranks of a process group; None if there is only one process, which needs no exchange.

    Args:
        group: the process group. None means that of the `context_parallel` block around the call or, outside of one,
            all processes, if torch.distributed is initialised.

    Raises:
        InputError: if this process is not a member of the group.
    """
    if group is None:
        active = active_ranks()
        if active is not None or not distributed.is_available() or not distributed.is_initialized():
            return active
        group = distributed.group.WORLD
    rank, count = distributed.get_rank(group), distributed.get_world_size(group)
    if rank < 0 or group is None:
        raise InputError("this process is not a member of the given group; give each process the group that it is in")
    return None if count == 1 else RankGroup(group, rank, count)


def active_ranks() -> RankGroup | None:
    """Return the ranks of the surrounding `context_parallel` block; None outside one, or with a single process."""
    return _active.get() if _open_blocks else None


@contextlib.contextmanager
def context_parallel(group: distributed.ProcessGroup | None = None) -> Iterator[None]:
    """Treat the sequences given to layers inside the block as this rank's part of longer ones.

    Rank r of the group holds the r-th stretch; lengths may differ and be zero, the batch may not. Outputs are those of
    the stretch; final states are those of the whole sequence, the same on every rank; pooled results cover the whole
    sequence, the same on every rank. An incoming state counts where the sequence is entered (on the first rank) and is
    ignored elsewhere, so what one call returns can go into the next on every rank.

    The state is transformed by a part through an affine map, so ranks exchange one such map per layer, forward and
    backward (`mambacore.parallel.exchange`). All exchanges are collective: every rank makes the same calls in the same
    order, and calls backward, inside or outside the block, on something that comes from its outputs, even from empty
    ones. Activation checkpointing recomputes in backward and therefore needs backward inside the block, on the CPU.

    Gradients are those of the sum over the ranks of what each calls backward on: see
    `mambacore.parallel.part_of_mean` for losses and `mambacore.parallel.sum_gradients` for parameters.

    With one process, initialised or not, the block changes nothing.

    Args:
        group: the process group; by default all processes.

    Raises:
        InputError: this process is not a member of the group; or, from a layer inside the block, one that cannot be
            computed over several ranks, or ranks that were given different batches.
    """
    global _open_blocks  # noqa: PLW0603
    ranks = ranks_of(group)
    token = _active.set(ranks)
    with _counting:
        _open_blocks += 1
    try:
        yield
    finally:
        with _counting:
            _open_blocks -= 1
        _active.reset(token)


def stretch_of(length: int, rank: int, count: int) -> slice:
    """Return the positions of rank `rank` of `count`: consecutive parts whose lengths differ by at most one.

    `sequence[:, stretch_of(sequence.shape[1], rank, count)]` is what that rank is given.

    Raises:
        ValueError: if the length is negative, or the rank is not in [0, count).
    """
    if length < 0 or not 0 <= rank < count:
        raise ValueError(
            f"rank {rank} of {count} has no stretch of {length} positions; ranks count from 0, lengths are not negative"
        )
    return slice(length * rank // count, length * (rank + 1) // count)
