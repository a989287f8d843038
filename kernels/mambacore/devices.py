"""What a device asks of the code that feeds it: where a model lies, the widest number, the way to NumPy and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mambacore.errors import InputError

WITHOUT_FLOAT64 = {"mps"}
"""Types of devices that have no float64."""


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters."""
    return next(module.parameters()).device


def available_device(device: torch.device | str) -> torch.device:
    """Return a device that can be computed on.

    Args:
        device: such as "cpu" or "cuda:1".

    Raises:
        InputError: this machine, or this PyTorch, lacks it.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"the device '{device}' is not available here: use 'cpu'.") from error
    return place


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """The widest floating-point type of a device, for sums and angles: float64, or float32 where there is none."""
    kind = device.type if isinstance(device, torch.device) else device.partition(":")[0]
    return torch.float32 if kind in WITHOUT_FLOAT64 else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the widest type of its device, real or complex as it is."""
    dtype = wide_dtype(tensor.device)
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


def to_numpy(tensor: Tensor, dtype: torch.dtype | None = None) -> npt.NDArray[Any]:
    """The numbers of a tensor on any device, without its graph.

    Args:
        tensor: of any shape.
        dtype: what it is converted to, after it has left the device, which may lack the type.
    """
    held = tensor.detach().cpu()
    return np.asarray((held if dtype is None else held.to(dtype)).numpy())


def from_numpy(array: npt.NDArray[Any], device: torch.device | None = None) -> Tensor:
    """An array as a tensor on a device.

    Args:
        array: of any strides, also negative ones, and read-only ones; the tensor may share memory with it. Float64
            becomes float32 on a device without it.
        device: the CPU if absent.
    """
    array = np.ascontiguousarray(array)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device is None:
        return tensor
    return (tensor.to(wide_dtype(device)) if tensor.dtype == torch.float64 else tensor).to(device)
