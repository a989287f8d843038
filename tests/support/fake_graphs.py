"""CUDA graphs without CUDA: a captured graph is a list of operators, and a replay runs them on the same memory."""

from __future__ import annotations

from types import TracebackType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class FakeGraph:
    """In place of `torch.cuda.CUDAGraph`.

    Attributes:
        calls: the operators with their arguments and results.
        replays: how often it was replayed.
    """

    made: ClassVar[list[FakeGraph]] = []

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        FakeGraph.made.append(self)

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.replays += 1
        for operator, arguments, options, results in self.calls:
            again = operator(*arguments, **options)
            for place, value in zip(_tensors(results), _tensors(again), strict=True):
                if place is not value:
                    place.copy_(value)


class FakeCapture(TorchDispatchMode):
    """In place of `torch.cuda.graph`: notes operators and, as a capture computes nothing, spoils what they wrote."""

    def __init__(self, graph: FakeGraph, pool: object = None, *, stream: object = None) -> None:
        super().__init__()
        self.graph, self.overwritten, self.fresh = graph, [], []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if operator._schema.is_mutable:
            self.overwritten += [(tensor, tensor.clone()) for tensor in _tensors((arguments, options))]
        results = operator(*arguments, **options)
        if not operator._schema.is_mutable and not any(value.alias_info for value in operator._schema.returns):
            self.fresh += _tensors(results)
        self.graph.calls.append((operator, arguments, options, results))
        return results

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        for tensor, before in reversed(self.overwritten):
            tensor.copy_(before)
        for tensor in self.fresh:
            tensor.fill_(float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def use_fake_graphs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[FakeGraph]:
    """Let steps on a device be captured; the graphs that are made."""
    monkeypatch.setattr(FakeGraph, "made", [])
    monkeypatch.setattr("mambacore.models.captured_step.CAPTURING_DEVICES", {device.type})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return FakeGraph.made
