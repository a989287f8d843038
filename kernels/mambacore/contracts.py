"""Checks of the arguments of all operators, done before any computation.

Each message states the invariant, the actual value and the remedy. The kernels themselves check nothing: they read
through raw pointers, so whatever passes here must be valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mambacore.backends import INPUT_DTYPES, compute_dtype


class Expected(NamedTuple):
    """The required shape of an argument."""

    tensor: Tensor | None  # None if absent, which is always allowed
    shape: tuple[int, ...]
    remedy: str


def check_sequence(name: str, sequence: Tensor, dimensions: int | None = 3) -> None:
    """Check that an argument is a (batch, length, channels) floating-point tensor.

    Args:
        name: name of the argument, for the message.
        sequence: the argument.
        dimensions: required number of dimensions; None for any number from one on.

    Raises:
        ValueError: if the number of dimensions differs.
        TypeError: if a dtype is not supported.
    """
    if dimensions is not None and sequence.dim() != dimensions:
        raise ValueError(
            f"{name} must be (batch, length, channels) but has shape {tuple(sequence.shape)}; "
            "add the missing dimensions with unsqueeze"
        )
    if sequence.dim() < 1:
        raise ValueError(f"{name} must have at least one dimension but is a scalar; give rows of channels")
    if sequence.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64 but is {sequence.dtype}; convert it first"
        )


def check_shapes(expected: Mapping[str, Expected], of: str = "inputs") -> None:
    """Check the shapes of arguments.

    Raises:
        ValueError: for the first that does not fit, with its name, the required and the actual shape, and the remedy.
    """
    for name, (tensor, shape, remedy) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to fit the {of} but has {tuple(tensor.shape)}; {remedy}")


def check_devices(inputs: Tensor, others: Mapping[str, Tensor | None], of: str = "inputs") -> None:
    """Check that tensors are on the device of the inputs.

    Raises:
        ValueError: if one is not, with its name and both devices.
        NotImplementedError: if one carries a forward-mode derivative.
    """
    refuse_tangents({"inputs": inputs, **others})
    for name, tensor in others.items():
        if tensor is not None and tensor.device != inputs.device:
            raise ValueError(
                f"{name} must be on the device of the {of}, {inputs.device}, but is on {tensor.device}; "
                f"move it with .to({str(inputs.device)!r})"
            )


def refuse_tangents(tensors: Mapping[str, Tensor | None]) -> None:
    """Refuse forward-mode derivatives, which registered operators would drop where gradients are disabled.

    Raises:
        NotImplementedError: if a tensor carries one, with its name.
    """
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a forward-mode derivative, which this operator does not compute; "
                "use reverse mode (torch.autograd.grad)"
            )


def check_boolean(name: str, tensor: Tensor | None) -> None:
    """Check that a mask is boolean.

    Raises:
        TypeError: if it is not.
    """
    if tensor is not None and tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean but is {tensor.dtype}; compare it with zero first")


def check_real_beside_real(state_matrix: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Check that no argument is complex if the state is real, which would drop imaginary parts.

    Raises:
        TypeError: if one is, with its name.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.is_complex() and not state_matrix.is_complex():
            raise TypeError(f"{name} is complex but state_matrix is real; make both complex or both real")


def common_element_dtype(inputs: Tensor, *others: Tensor | None) -> torch.dtype:
    """Return the dtype for sequences that are processed together, such that none is narrowed.

    It is that of the inputs, unless another is more precise, up to the compute dtype: a float32 step size with bfloat16
    inputs gives float32. (Rounding to bfloat16 has an error of 0.4 % in the step size, and so in every decay.)
    """
    present = [tensor.dtype for tensor in others if tensor is not None and tensor.dtype.is_floating_point]
    finest = max(present, key=_digits, default=inputs.dtype)
    return inputs.dtype if _digits(finest) <= _digits(inputs.dtype) else compute_dtype(inputs.dtype)


def _digits(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps
