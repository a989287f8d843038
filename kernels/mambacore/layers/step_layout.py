"""How numbers lie in programs of native steps: channels are neighbours, and rows of them are padded."""

from __future__ import annotations

from typing import Final

from torch import Tensor

PADDING: Final = 16
"""Numbers that rows are padded to, as in the kernel."""


def padded(width: int) -> int:
    """The width with its padding."""
    return -(-width // PADDING) * PADDING


def channels_last(numbers: Tensor) -> Tensor:
    """(channels, ...) with padded channels as the last dimension."""
    filled = numbers.new_zeros(padded(numbers.shape[0]), *numbers.shape[1:])
    filled[: numbers.shape[0]] = numbers
    return filled.movedim(0, -1).contiguous()
