"""Device-dependent helpers: a model's device, the widest floating-point dtype, and conversion from and to NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mambacore.errors import InputError

WITHOUT_FLOAT64 = {"mps"}
"""Device types without float64."""

POSITIONS_WITHOUT_GRADIENTS: Final = 262_144
"""Rows times length that go through a model at once without gradients, on any device but a CPU."""

SMALLEST_POSITIONS: Final = 1024
"""With fewer at once a CPU is faster."""

Result = TypeVar("Result")
State = TypeVar("State")
_fitting: dict[torch.device, int] = {}  # of devices that were found to lack memory for more


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters."""
    return next(module.parameters()).device


def available_device(device: torch.device | str) -> torch.device:
    """Return a device after checking that it is available.

    Args:
        device: such as "cpu" or "cuda:1".

    Raises:
        InputError: if this machine, or this build of PyTorch, lacks it.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"the device '{device}' is not available here: use 'cpu'.") from error
    return place


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """Return the widest floating-point dtype of a device, for sums and angles: float64, or float32 if unsupported."""
    kind = device.type if isinstance(device, torch.device) else device.partition(":")[0]
    return torch.float32 if kind in WITHOUT_FLOAT64 else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """Convert a real or complex tensor to the widest dtype of its device."""
    dtype = wide_dtype(tensor.device)
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


def to_numpy(tensor: Tensor, dtype: torch.dtype | None = None) -> npt.NDArray[Any]:
    """Convert a tensor on any device to NumPy, detached from its graph.

    Args:
        tensor: a tensor of any shape.
        dtype: the resulting dtype; conversion is on the CPU, as the device may lack it.
    """
    held = tensor.detach().cpu()
    return np.asarray((held if dtype is None else held.to(dtype)).numpy())


def from_numpy(array: npt.NDArray[Any], device: torch.device | None = None) -> Tensor:
    """Convert an array to a tensor on a device.

    Args:
        array: an array with any strides, including negative ones, possibly read-only; the tensor may share its memory.
            Float64 becomes float32 on a device without it.
        device: the device; by default the CPU.
    """
    array = np.ascontiguousarray(array)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device is None:
        return tensor
    return (tensor.to(wide_dtype(device)) if tensor.dtype == torch.float64 else tensor).to(device)


def positions_at_once(device: torch.device, on_cpu: int) -> int:
    """Return how many positions, rows times length, go through a model at once without gradients.

    Args:
        device: where the model is.
        on_cpu: as many as a CPU takes.
    """
    return on_cpu if device.type == "cpu" else _fitting.get(device, POSITIONS_WITHOUT_GRADIENTS)


def halve_positions(device: torch.device, at_least: int = SMALLEST_POSITIONS) -> None:
    """Take half as many positions at once from now on, after a device ran out of memory.

    Args:
        device: the device.
        at_least: the positions of what cannot be divided: fewer would change nothing.

    Raises:
        InputError: if there is nothing left to halve.
    """
    positions = positions_at_once(device, 0)
    if positions <= max(SMALLEST_POSITIONS, at_least):
        raise InputError(
            f"the memory of {device} is too small for {max(positions, at_least):,} positions at once: give "
            "shorter sequences or fewer at once, or use the device cpu."
        )
    _fitting[device] = positions // 2
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_fitting_batches(
    compute: Callable[[slice], Result], count: int, positions: int, device: torch.device, on_cpu: int
) -> list[Result]:
    """Compute rows in batches that fit the device, the same batches halved where they do not.

    Args:
        compute: called with the numbers of the rows of a batch.
        count: rows.
        positions: of a row.
        device, on_cpu: see `positions_at_once`.

    Returns:
        The results of the batches, in order.

    Raises:
        InputError: if not even one row fits.
    """
    results: list[Result] = []
    begin = 0
    while begin < count:
        rows = max(1, positions_at_once(device, on_cpu) // max(1, positions))
        try:
            results.append(compute(slice(begin, min(count, begin + rows))))
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
            begin += rows
        if not fits:  # outside of the handler, which holds on to the memory of what failed
            halve_positions(device, at_least=positions)
    return results


def in_fitting_pieces(
    advance: Callable[[slice, State], State], state: State, length: int, rows: int, device: torch.device, on_cpu: int
) -> State:
    """Walk along rows of equal length in pieces that fit the device, handing a state on.

    Args:
        advance: called with the positions of a piece and the state before it; returns the state after it.
        state: before the first piece.
        length: positions of a row.
        rows: side by side.
        device: see `positions_at_once`.
        on_cpu: positions of a row that a CPU takes.

    Returns:
        The state after the last piece.

    Raises:
        InputError: if not even short pieces fit.
    """
    begin = 0
    while begin < length:
        end = min(length, begin + max(1, positions_at_once(device, on_cpu * rows) // rows))
        try:
            state = advance(slice(begin, end), state)
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits, begin = True, end
        if not fits:  # outside of the handler, which holds on to the memory of what failed
            halve_positions(device, at_least=rows)
    return state
