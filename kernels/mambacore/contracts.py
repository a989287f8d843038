"""What every operator of the core asks of its tensors, checked in one place before anything computes.

Each message says the invariant, what came instead, and what to do. The kernels themselves check nothing: they read
through plain pointers, so whatever passes here must fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mambacore.backends import INPUT_DTYPES, compute_dtype


class Expected(NamedTuple):
    """What an argument has to look like."""

    tensor: Tensor | None  # None: absent, which is always allowed
    shape: tuple[int, ...]
    remedy: str


def check_sequence(name: str, sequence: Tensor, dimensions: int | None = 3) -> None:
    """Refuse what is not a (batch, length, channels) tensor of floating-point numbers.

    Args:
        name: of the argument, for the message.
        sequence: the argument.
        dimensions: how many it must have; None for any number from one on.

    Raises:
        ValueError: another number of dimensions.
        TypeError: an unsupported dtype.
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
    """Refuse the first argument whose shape does not fit.

    Raises:
        ValueError: with the argument's name, the shape that fits, the one that came, and the remedy.
    """
    for name, (tensor, shape, remedy) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to fit the {of} but has {tuple(tensor.shape)}; {remedy}")


def check_devices(inputs: Tensor, others: Mapping[str, Tensor | None], of: str = "inputs") -> None:
    """Refuse tensors on another device than the inputs'.

    Raises:
        ValueError: with the argument's name and both devices.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != inputs.device:
            raise ValueError(
                f"{name} must be on the device of the {of}, {inputs.device}, but is on {tensor.device}; "
                f"move it with .to({str(inputs.device)!r})"
            )


def check_boolean(name: str, tensor: Tensor | None) -> None:
    """Refuse a mask that is not boolean.

    Raises:
        TypeError: another dtype.
    """
    if tensor is not None and tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean but is {tensor.dtype}; compare it with zero first")


def check_real_beside_real(state_matrix: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Refuse complex numbers beside a real state, which would lose their imaginary parts.

    Raises:
        TypeError: with the argument's name.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.is_complex() and not state_matrix.is_complex():
            raise TypeError(f"{name} is complex but state_matrix is real; make both complex or both real")


def common_element_dtype(inputs: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that sequences which are read together are kept in, such that none is narrowed.

    It is the inputs' own, unless one of the others is finer, up to what is computed in anyway: a float32 step size
    beside bfloat16 inputs gives float32. (A step size rounded to bfloat16 is wrong by 0.4 %, and so is every decay.)
    """
    present = [tensor.dtype for tensor in others if tensor is not None and tensor.dtype.is_floating_point]
    finest = max(present, key=_digits, default=inputs.dtype)
    return inputs.dtype if _digits(finest) <= _digits(inputs.dtype) else compute_dtype(inputs.dtype)


def _digits(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps
