"""The norm after Mamba-2's gate (Dao & Gu, arXiv 2405.21060, section 7.1) as an operator: norm(inputs * silu(gate)).

PyTorch's SiLU and product write two tensors in between, and their gradients three more; the native operator none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.backends import compute_dtype, native_library_for
from mambacore.contracts import refuse_tangents
from mambacore.layers.norm import RootMeanSquareNorm, norm_arguments, root_mean_square_norm
from mambacore.layers.plain_modules import is_plain
from mambacore.layout import channels_contiguous, sum_of_parts
from mambacore.native_library import Norm
from mambacore.vmap import vmap_by_loop


class GroupedRootMeanSquareNorm(RootMeanSquareNorm):
    """Divide every position by the root mean square of its channels, within each of several equal groups of them.

    Args:
        width: channels.
        groups: must divide the width.
        epsilon: keeps positions of zeros finite.
    """

    def __init__(self, width: int, groups: int, epsilon: float = 1e-5) -> None:
        super().__init__(width, epsilon)
        self.groups = groups

    def forward(self, sequence: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        parts = sequence.unflatten(-1, (self.groups, -1))
        normalised = root_mean_square_norm(parts, self.weight.new_ones(parts.shape[-1]), self.epsilon)
        return normalised.flatten(-2) * self.weight.to(sequence.dtype)


def norm_after_gate(width: int, groups: int, epsilon: float) -> RootMeanSquareNorm:
    """Return the norm of Mamba-2: over all channels, or within each of several groups."""
    if groups == 1:
        return RootMeanSquareNorm(width, epsilon)
    return GroupedRootMeanSquareNorm(width, groups, epsilon)


def is_plain_norm_after_gate(norm: nn.Module, groups: int) -> bool:
    """Return whether kernels may compute this norm within so many groups, bypassing its `forward`."""
    if groups == 1:
        return is_plain(norm, RootMeanSquareNorm)
    return is_plain(norm, GroupedRootMeanSquareNorm) and bool(norm.groups == groups)


def gated_norm(inputs: Tensor, gate: Tensor, norm: RootMeanSquareNorm) -> Tensor:
    """Return `norm(inputs * silu(gate))`, in one call of the native library where it can be.

    Args:
        inputs: (batch, length, width).
        gate: like `inputs`.
        norm: `norm_after_gate`, or what has taken its place.
    """
    if is_plain_norm_after_gate(norm, 1) and inputs.dtype == gate.dtype and native_library_for(inputs) is not None:
        refuse_tangents({"inputs": inputs, "gate": gate, "weight": norm.weight})
        weight = norm.weight.to(compute_dtype(inputs.dtype))
        return _forward(inputs, gate, weight, norm.epsilon)[0]
    return norm(inputs * F.silu(gate))


def _arguments(inputs: Tensor, gate: Tensor, weight: Tensor, inverse: Tensor, epsilon: float) -> Norm:
    norm = norm_arguments(inputs, weight, inverse, epsilon)
    norm.gate, norm.gate_stride = gate.data_ptr(), gate.stride(-2)
    return norm


def _rows(gate: Tensor) -> Tensor:
    """The gate as rows with one stride between all of them: a part of a projection is used as it lies in memory."""
    gate = channels_contiguous(gate)
    regular = gate.shape[0] == 1 or gate.stride(0) == gate.shape[1] * gate.stride(1)
    return gate if regular else gate.contiguous()


@torch.library.custom_op("mambacore::gated_norm_forward", mutates_args=())
def _forward(inputs: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    library = native_library_for(inputs)
    if library is None:
        gated = inputs.to(weight.dtype) * F.silu(gate.to(weight.dtype))
        inverse = gated.square().mean(-1).add(epsilon).rsqrt()
        return (gated * inverse.unsqueeze(-1) * weight).to(inputs.dtype), inverse
    inputs, gate, weight = inputs.contiguous(), _rows(gate), weight.contiguous()
    outputs, inverse = torch.empty_like(inputs), inputs.new_empty(inputs.shape[:-1], dtype=weight.dtype)
    norm = _arguments(inputs, gate, weight, inverse, epsilon)
    norm.outputs = outputs.data_ptr()
    library.norm_forward(norm)
    return outputs, inverse


@_forward.register_fake
def _(inputs, gate, weight, epsilon):
    return inputs.new_empty(inputs.shape), inputs.new_empty(inputs.shape[:-1], dtype=weight.dtype)


@torch.library.custom_op("mambacore::gated_norm_backward", mutates_args=())
def _backward(
    grad_outputs: Tensor, inputs: Tensor, gate: Tensor, weight: Tensor, inverse: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    library = native_library_for(inputs)
    if library is None:
        wide, closed = inputs.to(weight.dtype), gate.to(weight.dtype)
        opened = closed.sigmoid()
        silu = closed * opened
        along = grad_outputs.to(weight.dtype) * wide * silu
        pull = (along * weight).mean(-1, keepdim=True) * inverse.unsqueeze(-1).square()
        grad = (grad_outputs * weight - wide * silu * pull) * inverse.unsqueeze(-1)
        grad_gate = grad * wide * (opened + silu * (1 - opened))
        grad_weight = (along * inverse.unsqueeze(-1)).flatten(0, -2).sum(0)
        return (grad * silu).to(inputs.dtype), grad_gate.to(gate.dtype), grad_weight
    inputs, gate, weight, inverse = inputs.contiguous(), _rows(gate), weight.contiguous(), inverse.contiguous()
    grad_outputs = grad_outputs.to(inputs.dtype).contiguous()
    norm = _arguments(inputs, gate, weight, inverse, epsilon)
    grad_inputs, grad_gate = torch.empty_like(inputs), torch.empty_like(inputs)
    grad_weight = weight.new_empty(norm.segments, weight.numel())
    norm.grad_outputs, norm.grad_inputs = grad_outputs.data_ptr(), grad_inputs.data_ptr()
    norm.grad_gate, norm.grad_weight = grad_gate.data_ptr(), grad_weight.data_ptr()
    library.norm_backward(norm)
    return grad_inputs, grad_gate, sum_of_parts(grad_weight)


@_backward.register_fake
def _(grad_outputs, inputs, gate, weight, inverse, epsilon):
    return inputs.new_empty(inputs.shape), inputs.new_empty(inputs.shape), weight.new_empty(weight.shape)


def _keep_for_backward(ctx, inputs, output) -> None:
    sequence, gate, weight, ctx.epsilon = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sequence, gate, weight, output[1])


def _gradient(ctx, grad_outputs, _grad_inverse):
    if grad_outputs is None:
        return None, None, None, None
    return (*_backward(grad_outputs, *ctx.saved_tensors, ctx.epsilon), None)


_forward.register_autograd(_gradient, setup_context=_keep_for_backward)
vmap_by_loop(_forward)
vmap_by_loop(_backward)
