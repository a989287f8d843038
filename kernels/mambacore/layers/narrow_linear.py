"""A linear layer with few inputs, whose gradients a CPU computes faster the other way around."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.layers.plain_modules import are_plain_linear, is_plain_tensor, operators_are_watched


def narrow_linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Compute `layer(inputs)`, with gradients as products of the transposed matrices where that is faster.

    A product with few columns takes a CPU's library two to six times as long as its transpose, which has few rows: of
    the projection to the step size, half of the time of its gradients.

    Args:
        layer: a linear layer, of any kind.
        inputs: (..., layer.in_features).
    """
    plain = (
        torch.is_grad_enabled()
        and inputs.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and is_plain_tensor(inputs)
        and are_plain_linear(layer)
        and layer.bias is None
        and layer.weight.dtype == inputs.dtype
        and not operators_are_watched()
    )
    return _NarrowLinear.apply(inputs, layer.weight) if plain else layer(inputs)


class _NarrowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        rows, grad_inputs, grad_weight = grad.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            grad_inputs = (weight.t() @ rows.t()).t().reshape(inputs.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (inputs.flatten(0, -2).t() @ rows).t()
        return grad_inputs, grad_weight
