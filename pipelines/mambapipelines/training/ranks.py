"""Processes of a training run: their ranks, their parts of each step, and communication between them.

Processes are started by torchrun or by SLURM, one per device; Lightning's cluster environments say which is which. They
are numbered with the ranks of a context (those that share every sequence) next to each other:
`rank = data_rank * context_count + context_rank`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import Tensor, distributed

from mambacore.errors import InputError
from mambacore.parallel import context_parallel, stretch_of
from mambapipelines.heartbeat import Heartbeat, rank_timeout_seconds

STRATEGIES = ("single", "ddp", "fsdp")
# The first process validates and writes while the others wait, which must not look like a hanging process.
LONGEST_WAIT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process in a run.

    Attributes:
        rank: of this process among all.
        count: number of processes.
        context_count: number of processes per sequence.
        context_group: the processes that share the sequences of this one; `None` if sequences are not split.
        sharded: whether parameters, gradients and the optimiser's state are sharded.
        store: address and port of the store of `torchrun` or of the first process; `None` for other groups.
    """

    rank: int = 0
    count: int = 1
    context_count: int = 1
    context_group: distributed.ProcessGroup | None = None
    sharded: bool = False
    store: tuple[str, int] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def data_count(self) -> int:
        """Number of shares of the rows of a step."""
        return self.count // self.context_count

    def rows(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return this process's rows of a step's batch.

        Raises:
            InputError: if the rows cannot be divided equally.
        """
        if self.data_count == 1:
            return batch
        rows = len(batch[0])
        if rows % self.data_count:
            raise InputError(
                f"a step has {rows} rows, which {self.data_count} data ranks cannot share equally: change "
                "batch.minimum_windows_per_step or batch.bases_per_step, or the number of processes."
            )
        own = stretch_of(rows, self.rank // self.context_count, self.data_count)
        return tuple(tensor[own] for tensor in batch)

    def stretch(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return this process's part of the length of (rows, length, ...) tensors."""
        if self.context_count == 1:
            return batch
        own = stretch_of(batch[0].shape[1], self.rank % self.context_count, self.context_count)
        return tuple(tensor[:, own] for tensor in batch)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Make a failure inside the block in one process fail in all, so that none waits for it.

        Raises:
            OSError: if one was raised inside the block in any process.
        """
        failure: OSError | None = None
        try:
            yield
        except OSError as error:
            failure = error
        failed = self.largest([float(failure is not None)])[0] > 0
        if failure is not None:
            raise failure
        if failed:
            raise OSError("another process could not write")

    @contextlib.contextmanager
    def sharing_sequences(self) -> Iterator[None]:
        """Inside the block, layers process this process's part of sequences that are split over processes."""
        if self.context_group is None:
            yield
            return
        with context_parallel(self.context_group):
            yield

    def sums(self, numbers: list[float]) -> list[float]:
        """Sum each number over all processes."""
        return self._reduced(numbers, distributed.ReduceOp.SUM)

    def largest(self, numbers: list[float]) -> list[float]:
        """Return the maximum of each number over all processes."""
        return self._reduced(numbers, distributed.ReduceOp.MAX)

    def of_first(self, numbers: list[float]) -> list[float]:
        """Return the numbers of the first process, in all processes."""
        if self.count == 1:
            return numbers
        message = torch.tensor(numbers, dtype=torch.float64)
        distributed.broadcast(message, 0)
        return message.tolist()

    def _reduced(self, numbers: list[float], operation: distributed.ReduceOp.RedOpType) -> list[float]:
        if self.count == 1:
            return numbers
        message = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(message, operation)
        return message.tolist()


ONE_PROCESS = Ranks()


@contextlib.contextmanager
def lost_processes_named(ranks: Ranks) -> Iterator[None]:
    """Convert library errors about ended or hanging processes to a message for the user.

    Raises:
        InputError: if another process has ended, or has not responded for `LONGEST_WAIT`.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ranks.count == 1 or not any(word in text for word in ("gloo", "NCCL", "Connection", "imed out")):
            raise
        raise InputError(
            f"another of the {ranks.count} processes has ended, or has not answered for "
            f"{LONGEST_WAIT.total_seconds() / 60:g} minutes: the last good state is kept; start all again with "
            "--resume."
        ) from error


@contextlib.contextmanager
def silent_processes_named(ranks: Ranks) -> Iterator[None]:
    """One sentence and exit status 2, in every process, when one of them is stopped or hangs inside."""
    if ranks.store is None:
        yield
        return
    seconds = rank_timeout_seconds()
    address, port = ranks.store
    store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds))
    with Heartbeat(store, ranks.rank, ranks.count, seconds, leave=True):
        yield


def cluster_environment() -> ClusterEnvironment | None:
    """Return the environment of torchrun or SLURM, if one started this process, else `None`."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return SLURMEnvironment()
    return None


def check_strategy(strategy: str, context_ranks: int) -> None:
    """Check that a strategy matches how the process was started."""
    count = world_size()
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy is {strategy!r}: use one of {', '.join(STRATEGIES)}.")
    if context_ranks < 1:
        raise InputError(f"--context-ranks is {context_ranks}: use a number of 1 or more.")
    if strategy == "single" and count > 1:
        raise InputError(f"{count} processes were started: give --strategy ddp or --strategy fsdp, or start one.")
    if strategy == "single" and context_ranks > 1:
        raise InputError("--context-ranks needs several processes: start them with torchrun and give --strategy ddp.")
    if count % context_ranks:
        raise InputError(f"--context-ranks is {context_ranks}, which does not divide {count} processes: change one.")


def join_ranks(strategy: str, context_ranks: int, device: torch.device) -> Ranks:
    """Connect to the other processes of the run, if any.

    Scalars are exchanged between CPUs (gloo), gradients and states between devices (nccl).

    Raises:
        InputError: as `check_strategy`.
    """
    check_strategy(strategy, context_ranks)
    environment = cluster_environment()
    if strategy == "single" or environment is None:
        return ONE_PROCESS
    store = None
    if not distributed.is_initialized():
        rank_timeout_seconds()  # a wrong one is refused before anybody waits
        os.environ.setdefault("MASTER_ADDR", environment.main_address)
        os.environ.setdefault("MASTER_PORT", str(environment.main_port))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, count = environment.global_rank(), environment.world_size()
        try:
            distributed.init_process_group(backend, rank=rank, world_size=count, timeout=LONGEST_WAIT)
        except RuntimeError as error:
            raise InputError(
                f"the {count} processes have not met within {LONGEST_WAIT.total_seconds() / 60:g} minutes "
                f"({str(error).splitlines()[0]}): start all of them again."
            ) from error
        store = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    rank, count = distributed.get_rank(), distributed.get_world_size()
    group = None
    if context_ranks > 1:
        # Every process has to participate in creating every group.
        for first in range(0, count, context_ranks):
            made = distributed.new_group(list(range(first, first + context_ranks)))
            if first <= rank < first + context_ranks:
                group = made
    return Ranks(rank, count, context_ranks, group, sharded=strategy == "fsdp" and count > 1, store=store)


def world_size() -> int:
    """Return the number of processes that were started together."""
    environment = cluster_environment()
    return environment.world_size() if environment is not None else 1


def leave_ranks(ranks: Ranks) -> None:
    """Close the connections of `join_ranks`."""
    if ranks.count > 1 and distributed.is_initialized():
        distributed.destroy_process_group()
