"""Device-dependent helpers: a model's device, the widest floating-point dtype, and conversion from and to NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mambacore.errors import InputError

WITHOUT_FLOAT64 = {"mps"}
"""Device types without float64."""


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
