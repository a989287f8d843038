"""The causal depthwise convolution, one short function per equation; any real dtype, and any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.packing import resets_before


def with_history(inputs: Tensor, initial_state: Tensor | None, kernel_width: int) -> Tensor:
    """Prepend the last `kernel_width - 1` earlier inputs (zeros if absent) to the inputs, in scan order."""
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], kernel_width - 1, inputs.shape[2])
    return torch.cat([initial_state.to(inputs.dtype), inputs], dim=1)


def tap_mask(sequence_starts: Tensor, kernel_width: int, reverse: bool) -> Tensor:
    """Return whether a tap applies to an input of the same record: (batch, kernel_width, length), in scan order."""
    resets = resets_before(sequence_starts, reverse)
    if reverse:
        resets = resets.flip(1)
    batch, length = resets.shape
    mask = resets.new_ones(batch, kernel_width, length)
    # A tap that reaches `back` positions back is masked by a start at any of the last `back` positions.
    for back in range(1, kernel_width):
        cut = torch.zeros_like(resets)
        cut[:, back - 1 :] = resets[:, : max(length - back + 1, 0)]
        mask[:, kernel_width - 1 - back] = mask[:, kernel_width - back] & ~cut
    return mask


def weighted_sum(extended: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Return bias + sum over unmasked taps of weight[tap] * input[t - (kernel_width - 1) + tap]."""
    kernel_width = weight.shape[1]
    length = extended.shape[1] - (kernel_width - 1)
    total = torch.zeros((), dtype=extended.dtype, device=extended.device)
    for tap in range(kernel_width):
        met = extended[:, tap : tap + length]
        if mask is not None:
            met = torch.where(mask[:, tap].unsqueeze(-1), met, torch.zeros_like(met))
        total = total + weight[:, tap] * met
    return total if bias is None else total + bias


def causal_convolution_reference(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    silu: bool = False,
    reverse: bool = False,
    sequence_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return outputs (batch, length, channels) and the state for the next piece.

    `weight` is (channels, kernel_width); states are (batch, kernel_width - 1, channels), the last inputs in scan order,
    oldest first, zero where they belong to an earlier record.
    """
    kernel_width = weight.shape[1]
    extended = with_history(inputs.flip(1) if reverse else inputs, initial_state, kernel_width)
    mask = None if sequence_starts is None else tap_mask(sequence_starts, kernel_width, reverse)
    outputs = weighted_sum(extended, weight, bias, mask)
    final_state = state_after(extended, mask, kernel_width)
    if silu:
        outputs = F.silu(outputs)
    return outputs.flip(1) if reverse else outputs, final_state


def state_after(extended: Tensor, mask: Tensor | None, kernel_width: int) -> Tensor:
    """Return the last `kernel_width - 1` inputs, zero where they belong to another record than the last position."""
    last = extended[:, extended.shape[1] - (kernel_width - 1) :]
    if mask is None or mask.shape[2] == 0 or kernel_width == 1:
        return last
    return torch.where(mask[:, 1:, -1].unsqueeze(-1), last, torch.zeros_like(last))
