"""May weights be read directly, past the modules that hold them?

A fast path that takes a whole block in one call reads parameters and leaves the modules' `forward` out. That gives the
same result only where `forward` would do nothing else: no hook, no parametrisation, no adapter around a layer, no
subclass with a `forward` of its own, no tensor subclass, and nobody watching the operators (tracing, `torch.func`,
FakeTensorMode, `make_fx`). Everywhere else the modules are called.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_internals
from torch.utils._python_dispatch import _get_current_dispatch_mode

PLAIN_TENSORS = (Tensor, nn.Parameter)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Does calling this module do exactly what the `forward` of `kind` does with its parameters?

    Args:
        module: the module that is to be bypassed; its submodules are not looked at.
        kind: its exact class. A subclass, which adapters and parametrisations make, is not plain.
    """
    own = module.__dict__
    return (
        type(module) is kind
        and "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not module_internals._global_forward_hooks
        and not module_internals._global_forward_pre_hooks
        and all(tensor is None or type(tensor) in PLAIN_TENSORS for tensor in own["_parameters"].values())
    )


def are_plain_linear(*layers: nn.Module) -> bool:
    """Is every one of these a plain `nn.Linear`?"""
    return all(is_plain(layer, nn.Linear) for layer in layers)


def is_plain_tensor(tensor: Tensor) -> bool:
    """Is this a tensor with memory of its own that nothing has wrapped?"""
    return type(tensor) in PLAIN_TENSORS and tensor.device.type != "meta"


def operators_are_watched() -> bool:
    """Would an operator that runs now be seen by somebody: a tracer, a compiler, a transform or a mode?"""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
        or _get_current_dispatch_mode() is not None
    )
