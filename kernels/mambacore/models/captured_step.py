"""A step of generation, captured in CUDA graphs and replayed: one launch in place of hundreds of small operators.

A graph repeats the same kernels on the same memory. A step qualifies where its state returns to the same shapes: after
every token in a stack, or after as many tokens as the poolings multiply to in a U-Net, of which then every step of the
cycle has a graph. Where it does not (the keys of attention grow), or a step cannot be captured, it runs as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from mambacore.layers.step import states_in_place
from mambacore.state import map_state, state_tensors

CAPTURING_DEVICES: Final = {"cuda"}
"""Device types whose operators can be captured."""

LONGEST_CYCLE: Final = 64
"""Steps until the state has the same shapes again, above which nothing is captured: every step takes a graph."""

Step = Callable[[Tensor, Any], tuple[tuple[Tensor, ...], Any]]
"""A tensor and a state to results and the next state."""


class _Graph(NamedTuple):
    """A captured step: what `replay` repeats, its results, and the state after it."""

    graph: torch.cuda.CUDAGraph
    results: tuple[Tensor, ...]
    state: Any


class CapturedStep:
    """Run a step again and again, each time from the state that the last one left; equal to calling the function.

    Args:
        function: the step. It must be a function of its arguments alone, and of inputs of one shape.
        state: nested tuples of tensors (`mambacore.state`) before the first step; they are not changed.
        device: where it computes.
        capture: whether capturing may pay off; else, and on other devices than CUDA's, the function is called as it is.
    """

    def __init__(self, function: Step, state: Any, device: torch.device, capture: bool = True) -> None:
        self._function, self._state = function, state
        self._watching = capture and device.type in CAPTURING_DEVICES
        self._device = device
        self._seen: dict[Any, int] = {}
        self._cycle: list[_Graph] = []
        self._length = self._next = 0
        self._input: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._first: Any = None

    @property
    def state(self) -> Any:
        """The state after the last step, in memory of its own."""
        return map_state(Tensor.clone, self._state) if self._cycle else self._state

    def __call__(self, given: Tensor) -> tuple[Tensor, ...]:
        """Run one step; the results stay as they are when the next one runs."""
        if self._watching:
            self._watch()
        if not self._length:
            results, self._state = self._function(given, self._state)
            return results
        if len(self._cycle) < self._length and not self._capture(given):
            return self(given)
        assert self._input is not None  # from the first capture on
        captured = self._cycle[self._next]
        self._input.copy_(given)
        captured.graph.replay()
        self._state, self._next = captured.state, (self._next + 1) % self._length
        return tuple(result.clone() for result in captured.results)

    def _watch(self) -> None:
        """Look for a state of the same shapes as an earlier one: from there on, steps repeat."""
        kind, count = _kind_of(self._state), len(self._seen)
        if kind in self._seen:
            self._length = count - self._seen[kind]
        self._seen[kind] = count
        if self._length or count > LONGEST_CYCLE:
            self._watching, self._seen = False, {}

    def _capture(self, given: Tensor) -> bool:
        """Capture the next step of the cycle; nothing is computed.

        Returns:
            False if it cannot be captured; steps then go on uncaptured from the same state.
        """
        if self._input is None:
            self._input, self._stream = given.clone(), torch.cuda.Stream(self._device)
            self._first = self._state = map_state(Tensor.clone, self._state)
        graph = torch.cuda.CUDAGraph()
        pool = self._cycle[0].graph.pool() if self._cycle else None
        kind = self._device.type
        # Weights that autocast has cast would outlive their cache in the graph, so it casts them in every replay.
        precision = (
            torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
            if torch.is_autocast_enabled(kind)
            else contextlib.nullcontext()
        )
        try:
            with torch.cuda.graph(graph, pool, stream=self._stream), states_in_place(), precision:
                results, state = self._function(self._input, self._state)
                if len(self._cycle) + 1 == self._length:
                    state = self._handed_to_the_first(state)
        except RuntimeError:
            self._state = map_state(Tensor.clone, self._state)
            self._cycle, self._length = [], 0
            return False
        self._cycle.append(_Graph(graph, results, state))
        return True

    def _handed_to_the_first(self, state: Any) -> Any:
        """Copy the state to where the first graph of the cycle reads it, unless it is there."""
        pairs = zip(state_tensors(self._first), state_tensors(state), strict=True)
        # Copies first: one tensor may be a view of another's old values.
        moved = [(place, value.clone()) for place, value in pairs if place is not value]
        for place, value in moved:
            place.copy_(value)
        return self._first


def _kind_of(state: Any) -> Any:
    """What determines which kernels a step runs: the shapes and dtypes of a state, and its integers."""
    if isinstance(state, Tensor):
        return tuple(state.shape), state.dtype
    return tuple(_kind_of(member) for member in state) if isinstance(state, tuple) else state
