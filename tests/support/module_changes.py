"""What users hang on modules: hooks, subclasses, parametrisations, weights in place of parameters.

Each change makes one module of a model give other outputs, as a user of PyTorch may at any time. Whatever bypasses the
modules' `forward` has to notice.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

FACTOR = 1.5


def louder(outputs: Any) -> Any:
    """Scale the outputs of a module, each channel differently so that no norm takes it back, but not its state."""
    if isinstance(outputs, tuple):
        return (louder(outputs[0]), *outputs[1:])
    return outputs * torch.linspace(0.5, 2.0, outputs.shape[-1], dtype=outputs.dtype)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, __, outputs: louder(outputs))


def hook_before(module: nn.Module) -> None:
    def louder_inputs(_module, inputs):
        first, *others = inputs
        return (louder(first) if first.is_floating_point() else (first + 1) % 2, *others)

    module.register_forward_pre_hook(louder_inputs)


def subclass(module: nn.Module) -> None:
    kind = type(module)

    class Other(kind):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            return louder(super().forward(*arguments, **options))

    module.__class__ = Other


def replace_forward(module: nn.Module) -> None:
    kind = type(module)
    module.forward = types.MethodType(
        lambda self, *arguments, **options: louder(kind.forward(self, *arguments, **options)), module
    )


class Louder(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        """Scale it."""
        return FACTOR * weight


def own_weight(module: nn.Module) -> str | None:
    return next((name for name, tensor in module.named_parameters(recurse=False) if tensor.dim() > 0), None)


def parametrise(module: nn.Module) -> None:
    parametrize.register_parametrization(module, own_weight(module), Louder())


def weight_norm(module: nn.Module) -> None:
    nn.utils.weight_norm(module, own_weight(module))
    with torch.no_grad():
        getattr(module, own_weight(module)).mul_(FACTOR)


def tensor_for_parameter(module: nn.Module) -> None:
    """As a hypernetwork does it."""
    name = own_weight(module)
    weight = FACTOR * getattr(module, name).detach()
    delattr(module, name)
    setattr(module, name, weight)


def buffer_for_parameter(module: nn.Module) -> None:
    name = own_weight(module)
    weight = FACTOR * getattr(module, name).detach()
    delattr(module, name)
    module.register_buffer(name, weight)


ON_CALLS: dict[str, Callable[[nn.Module], None]] = {
    "hook": hook,
    "hook before": hook_before,
    "subclass": subclass,
    "forward of the instance": replace_forward,
}
"""Changes of modules whose `forward` is called."""

ON_WEIGHTS: dict[str, Callable[[nn.Module], None]] = {
    "parametrised": parametrise,
    "weight_norm": weight_norm,
    "tensor for a parameter": tensor_for_parameter,
    "buffer for a parameter": buffer_for_parameter,
}
"""Changes of modules that have parameters of their own."""

CHANGES = ON_CALLS | ON_WEIGHTS


def places(model: nn.Module, change: str) -> Iterator[str]:
    """Paths of the modules in a model that a change is possible for, but for the model itself."""
    for path, module in model.named_modules():
        if not path or isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        if change in ON_CALLS or own_weight(module) is not None:
            yield path
