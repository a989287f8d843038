"""Checks of whether weights may be used directly, bypassing the modules that hold them.

A fast path that computes a whole block in one call reads parameters and bypasses the modules' `forward`. That gives the
same result only if `forward` does nothing else: no hooks, parametrisations, adapters around layers, subclasses with
their own `forward`, sparse weights, tensor subclasses, or interception of operators (tracing, `torch.func`,
forward-mode derivatives, FakeTensorMode, `make_fx`). Otherwise the modules are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_internals
from torch.utils._python_dispatch import _get_current_dispatch_mode

PLAIN_TENSORS = (Tensor, nn.Parameter)
_STRIDED = torch.strided


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling this module does exactly what the `forward` of `kind` does with its parameters.

    Args:
        module: the module to bypass; its submodules are not checked.
        kind: its exact class. A subclass, as created by adapters and parametrisations, is not plain.
    """
    own = module.__dict__
    return (
        type(module) is kind
        and "forward" not in own
        and "mix" not in own  # the part of a mixer's `forward` between its projections
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and not module_internals._has_any_global_hook()
        and all(
            tensor is None or (type(tensor) in PLAIN_TENSORS and tensor.layout is _STRIDED)
            for tensor in own["_parameters"].values()
        )
    )


def calls_are_watched(module: nn.Module) -> bool:
    """Return whether there are hooks on this module or one in it, which is then to be called once, with everything."""
    return module_internals._has_any_global_hook() or any(
        part._forward_hooks or part._forward_pre_hooks for part in module.modules()
    )


def parameter_of(module: Any, name: str) -> Any:
    """Return a parameter of a plain module, or the tensor that was set in its place, as its `forward` reads it.

    Several times faster than the attribute.
    """
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def are_plain_linear(*layers: nn.Module | None) -> bool:
    """Return whether all of these are plain `nn.Linear` layers."""
    return all(layer is not None and is_plain(layer, nn.Linear) for layer in layers)


def is_plain_tensor(tensor: Tensor) -> bool:
    """Return whether this is an ordinary tensor whose memory holds its numbers, not a wrapper or a negated view.

    A compiler cannot trace the question for the negation; it calls operators only, which resolve negated views.
    """
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout is _STRIDED
        and tensor.device.type != "meta"
        and (torch.compiler.is_compiling() or not tensor.is_neg())
    )


def is_plain_state(state: object, kind: type, shapes: Sequence[tuple[int, ...]], device: torch.device) -> bool:
    """Return whether a mixer's state has the shapes and the device that a kernel may read, in ordinary real tensors.

    Args:
        state: what a block was given.
        kind: the named tuple of tensors that it must be.
        shapes: the shape of each.
        device: where they must be.
    """
    return (
        isinstance(state, tuple)
        and type(state) is kind
        and all(
            is_plain_tensor(tensor) and tensor.shape == shape and tensor.device == device and not tensor.is_complex()
            for tensor, shape in zip(state, shapes, strict=True)
        )
    )


def operators_are_watched() -> bool:
    """Return whether operators are currently intercepted by a tracer, a compiler, a transform or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
    )
