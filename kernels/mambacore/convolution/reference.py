"""The causal depthwise convolution, one short function per equation; any real dtype, and any device."""

import torch
from torch import Tensor
from torch.nn import functional as F


def with_history(inputs: Tensor, initial_state: Tensor | None, kernel_width: int) -> Tensor:
    """Put the last ``kernel_width - 1`` earlier inputs (zeros when absent) before the inputs, in scan order."""
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], kernel_width - 1, inputs.shape[2])
    return torch.cat([initial_state.to(inputs.dtype), inputs], dim=1)


def weighted_sum(extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """bias + sum over taps of weight[tap] * input[t - (kernel_width - 1) + tap]."""
    kernel_width = weight.shape[1]
    length = extended.shape[1] - (kernel_width - 1)
    total = weight[:, 0] * extended[:, :length]
    for tap in range(1, kernel_width):
        total = total + weight[:, tap] * extended[:, tap : tap + length]
    return total if bias is None else total + bias


def causal_convolution_reference(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    silu: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The whole operator: outputs (batch, length, channels) and the state for what follows.

    ``weight`` is (channels, kernel_width); states are (batch, kernel_width - 1, channels), the last inputs in the
    direction of the walk, oldest first.
    """
    kernel_width = weight.shape[1]
    extended = with_history(inputs.flip(1) if reverse else inputs, initial_state, kernel_width)
    outputs = weighted_sum(extended, weight, bias)
    final_state = extended[:, extended.shape[1] - (kernel_width - 1) :]
    if silu:
        outputs = F.silu(outputs)
    return outputs.flip(1) if reverse else outputs, final_state
