"""Gradients of several micro-batches in parallel: one thread per micro-batch instead of many per operation.

The operations of a small model are short, and threads that meet at the end of each of them mostly wait. Replicas that
share the parameters' memory, each with gradients of its own, meet once per step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

Report = dict[str, Tensor]


class Replicas:
    """A model and copies of it that share its parameters and differ in their gradients.

    Args:
        model: the model; its parameters get the summed gradients.
        count: number of micro-batches in parallel, including the model itself.
        threads: total number of CPU threads.
    """

    def __init__(self, model: nn.Module, count: int, threads: int) -> None:
        self.models = [model, *(copy.deepcopy(model) for _ in range(count - 1))]
        self._threads = threads
        for replica in self.models[1:]:
            for shared, parameter in zip(model.parameters(), replica.parameters(), strict=True):
                parameter.data = shared.data
        self._pool = ThreadPoolExecutor(count)

    def accumulate(
        self,
        micro_batches: Sequence[tuple[Tensor, ...]],
        backward: Callable[..., Report],
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> list[Report]:
        """Call `backward(replica, *micro_batch)` on every micro-batch and sum all gradients in the model's.

        Replica r takes the micro-batches r, r + count, ... and sums are in the order of the replicas, so the result is
        a function of the micro-batches and the number of replicas.

        Args:
            micro_batches: their tensors.
            backward: computes the gradients of one.
            around: makes the context of all micro-batches of a replica, in its thread.
        """
        for replica in self.models:
            replica.zero_grad(set_to_none=True)

        def work(number: int) -> list[Report]:
            torch.set_num_threads(max(1, self._threads // len(self.models)))
            replica = self.models[number]
            with around():
                return [backward(replica, *micro_batch) for micro_batch in micro_batches[number :: len(self.models)]]

        with _restored_thread_count():
            reports = list(self._pool.map(work, range(len(self.models))))
        for replica in self.models[1:]:
            for shared, parameter in zip(self.models[0].parameters(), replica.parameters(), strict=True):
                if parameter.grad is not None:
                    shared.grad = parameter.grad if shared.grad is None else shared.grad.add_(parameter.grad)
                    parameter.grad = None
        return [report for part in reports for report in part]

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


@contextmanager
def _restored_thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
