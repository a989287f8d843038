"""States of causal modules: nested tuples of tensors, with integers and None among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def map_state(function: Callable[[Tensor], Any], state: Any) -> Any:
    """The same nesting with `function` applied to every tensor; everything that is not a tensor stays as it is."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple):
        members = [map_state(function, member) for member in state]
        return type(state)(*members) if hasattr(state, "_fields") else tuple(members)
    return state


def state_tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor of a state, in a fixed order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for member in state:
            yield from state_tensors(member)


def detached(state: Any) -> Any:
    """The state, detached from the graph: gradients end here."""
    return map_state(lambda tensor: tensor.detach(), state)
