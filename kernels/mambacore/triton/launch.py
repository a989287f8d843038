"""Kernels that run compiled on a device, or in Triton's interpreter on CPU tensors, from the same source."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

# What a plan assumes when there is no device to ask: an H100's.
MULTIPROCESSORS_WITHOUT_DEVICE = 132


class Kernel(JITFunction):
    """A `triton.jit` function that can also be interpreted.

    `triton.jit` decides between the two once, when a module is imported, from an environment variable; here the
    tensors decide at each start, so that tests of the arithmetic and of the compilation share a process.
    """

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """One kernel function called by another inside of the interpreter, which has prepared the language for both."""
        return _rewritten(self.fn)(*arguments, **named)

    def start(self, grid: tuple[int, ...], *arguments: Any, num_warps: int = 1, **named: Any) -> None:
        """Run the grid of programs on the device where the first argument lies."""
        if 0 in grid:
            return
        if arguments[0].device.type == "cpu":
            _count_with_any_numpy()
            interpreter.InterpretedFunction(self.fn)[grid](*arguments, **named)
            return
        with torch.cuda.device(arguments[0].device):
            self[grid](*arguments, num_warps=num_warps, **named)


@functools.cache
def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    return interpreter.InterpretedFunction(function).rewrite()


@functools.cache
def _count_with_any_numpy() -> None:
    """Let the interpreter count to a number of the kernel's: it keeps scalars as arrays of one element (Triton 3.6),
    which NumPy from 2.4 on no longer takes for a number.
    """
    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # From Triton 3.6 on, a scope takes the change back afterwards.
        change = scope[0].set_attr if scope else setattr
        change(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_count


def kernel(function: Callable[..., Any]) -> Kernel:
    """Make a kernel, or a function that kernels call."""
    return Kernel(function)


def multiprocessors(tensor: Tensor) -> int:
    """How many multiprocessors the tensor's device has."""
    if tensor.device.type != "cuda":
        return MULTIPROCESSORS_WITHOUT_DEVICE
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def or_first(tensor: Tensor | None, first: Tensor) -> Tensor:
    """An absent argument's place is taken by one that the kernel does not touch."""
    return first if tensor is None else tensor
