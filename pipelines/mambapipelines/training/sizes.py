"""How much goes through the model at once on a device: measured in positions, and halved until it fits its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mambacore.errors import InputError
from mambapipelines.device import Placement
from mambapipelines.training.task import Pieces

POSITIONS_ON_A_DEVICE = 65_536
"""Rows times length that go through the model at once, with gradients: enough to fill a large GPU."""

SMALLEST_POSITIONS = 64
"""With less at once a CPU is faster. Of rows that cannot be cut, half as many positions change nothing either."""


@dataclass(frozen=True)
class Sizes:
    """What goes through the model at once.

    Attributes:
        positions: at most so many, rows times length; `None` leaves it to the recipe, which sizes for CPUs.
    """

    positions: int | None = None

    def rows(self, recipe_rows: int, length: int) -> int:
        """Rows of a micro-batch of this length, of which the recipe would take `recipe_rows`."""
        return recipe_rows if self.positions is None else max(1, self.positions // length)

    def pieces(self, pieces: Pieces) -> Pieces:
        """The same pieces with as many positions as fit."""
        if self.positions is None:
            return pieces
        return pieces._replace(piece_length=max(1, self.positions // len(pieces.sequence)))

    def halved(self) -> Sizes | None:
        """Half as much: fewer rows, and of a single row shorter pieces; `None` where nothing is left to halve."""
        return None if self.positions is None or self.positions <= SMALLEST_POSITIONS else Sizes(self.positions // 2)


def first_sizes(placement: Placement, divisible: bool) -> Sizes:
    """What is tried first.

    Args:
        placement: on a CPU the recipe decides.
        divisible: whether a batch may be cut into micro-batches at all.
    """
    return Sizes() if placement.is_cpu or not divisible else Sizes(POSITIONS_ON_A_DEVICE)


def fitted(
    sizes: Sizes, attempt: Callable[[Sizes], object], model: nn.Module, placement: Placement, say: Callable[[str], None]
) -> Sizes:
    """Halve the sizes until a forward and backward pass fits the device; no gradient and no random number is left.

    Args:
        sizes: tried first.
        attempt: runs one micro-batch of a size.
        model: its gradients are removed.
        placement: the device.
        say: called with a sentence whenever something did not fit.

    Raises:
        InputError: not even the smallest fits.
    """
    while True:
        try:
            with _random_numbers_kept(placement), _room_of_the_optimizer(model):
                attempt(sizes)
        except torch.OutOfMemoryError:
            smaller = sizes.halved()
            if smaller is None:
                raise out_of_memory(placement) from None
            tried, next_try = sizes.positions, smaller.positions
            say(f"{placement.device} lacks memory for {tried:,} positions at once: trying {next_try:,}")
            sizes = smaller
        else:
            return sizes
        finally:
            model.zero_grad(set_to_none=True)
            if placement.device.type == "cuda":
                torch.cuda.empty_cache()


def out_of_memory(placement: Placement) -> InputError:
    """What the user is told."""
    return InputError(
        f"the memory of {placement.describe()} is too small for this run: what was saved last is kept; give a smaller "
        "model or --length, or --device cpu, with --resume to go on from there."
    )


@contextlib.contextmanager
def memory_shortage_named(placement: Placement) -> Iterator[None]:
    """What PyTorch says of a full device becomes one sentence.

    Raises:
        InputError: the device is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(placement) from error


@contextlib.contextmanager
def _random_numbers_kept(placement: Placement) -> Iterator[None]:
    """Afterwards the same numbers follow as before."""
    devices = [placement.device.index or 0] if placement.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _room_of_the_optimizer(model: nn.Module) -> Iterator[None]:
    """Memory is taken that AdamW will need from its first step on: two numbers for each parameter."""
    held = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(2)]
    yield
    held.clear()
