"""The time mixing of RWKV-4 as a mixer."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mambacore.devices import widened
from mambacore.layers.mixer import Mixer, register_mixer
from mambacore.scan import selective_scan

# The smallest weight is exp of this, relative to the largest of a piece: float64 underflows a little below.
LOWEST_EXPONENT = -700.0


class RWKVState(NamedTuple):
    """State of time mixing.

    The weighted average and the logarithm of its weight are equivalent to the paper's numerator, denominator and
    running maximum, in two numbers that neither overflow nor underflow.
    """

    token: Tensor  # (batch, model_width), the last position's channels
    average: Tensor  # (batch, model_width), float64, of the values so far
    log_weight: Tensor  # (batch, model_width), float64, minus infinity at the start


@register_mixer
class RWKVMixer(Mixer):
    """The time mixing of RWKV-4 (Peng et al., arXiv 2305.13048, section 3).

    Every channel averages the values so far, weighted by the exponential of their keys and decaying at its own rate;
    the current one has a bonus. Keys, values and the receptance that gates the result are computed from a mixture of
    the current and the previous position (token shift). RWKV-4's other half, channel mixing, does not mix along the
    sequence and is not included.

    Args:
        model_width: channels of the sequence.
        relative_depth: position of the mixer in the stack, from 0 for the first to 1 for the last; determines the
            initial decay rates and token shift (the paper's appendix on initialisation).

    Raises:
        ValueError: if relative_depth is outside 0 to 1.
    """

    name = "rwkv"

    def __init__(self, model_width: int, relative_depth: float = 0.5) -> None:
        super().__init__()
        self.model_width = model_width
        if not 0 <= relative_depth <= 1:
            raise ValueError(f"relative_depth must lie between 0 and 1 but is {relative_depth}")
        self.relative_depth = relative_depth
        self.key_share, self.value_share, self.receptance_share, self.log_decay_rate, self.bonus = (
            nn.Parameter(torch.empty(model_width)) for _ in range(5)
        )
        self.key_projection, self.value_projection, self.receptance_projection, self.output_projection = (
            nn.Linear(model_width, model_width, bias=False) for _ in range(4)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise parameters as in the paper; linear layers keep PyTorch's default."""
        width = self.bonus.shape[0]
        channel = torch.arange(width, dtype=torch.float32)
        share = (channel / width) ** (1 - self.relative_depth)
        self.key_share.copy_(share)
        self.value_share.copy_(share + 0.3 * self.relative_depth)
        self.receptance_share.copy_(0.5 * share)
        self.log_decay_rate.copy_(-5 + 8 * (channel / max(width - 1, 1)) ** (0.7 + 1.3 * self.relative_depth))
        self.bonus.copy_(torch.tensor(0.3).log() + 0.5 * ((channel + 1) % 3 - 1))

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics, which weight decay must not pull towards zero."""
        return [self.key_share, self.value_share, self.receptance_share, self.log_decay_rate, self.bonus]

    def forward(
        self, sequence: Tensor, state: RWKVState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, RWKVState]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state."""
        if state is None:
            nothing = sequence.new_zeros(sequence.shape[0], sequence.shape[2])
            average = widened(nothing)
            state = RWKVState(nothing, average, torch.full_like(average, -torch.inf))
        if sequence.shape[1] == 0:
            return sequence, state
        previous = _previous(sequence, state.token, sequence_starts)
        keys, values, receptance = (
            projection(previous + share * (sequence - previous))
            for projection, share in (
                (self.key_projection, self.key_share),
                (self.value_projection, self.value_share),
                (self.receptance_projection, self.receptance_share),
            )
        )
        averages, average, log_weight = weighted_averages(
            keys, values, self.log_decay_rate, self.bonus, state.average, state.log_weight, sequence_starts
        )
        outputs = self.output_projection(torch.sigmoid(receptance) * averages.to(sequence.dtype))
        return outputs, RWKVState(sequence[:, -1], average, log_weight)


def weighted_averages(
    keys: Tensor,
    values: Tensor,
    log_decay_rate: Tensor,
    bonus: Tensor,
    average: Tensor,
    log_weight: Tensor,
    sequence_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the paper's wkv: weighted averages of the values up to each position, with a bonus for the current one.

    Numerator and denominator are linear recurrences with a constant decay, so that they are two channels of a scan. The
    weights are taken relative to the largest of the piece, in float64, which holds exp(-700): nothing overflows, and
    nothing is lost that dominates again once larger terms have faded. Keys further below are raised to that.

    Args:
        keys: (batch, length, channels), of at least one position.
        values: (batch, length, channels).
        log_decay_rate: (channels,), whose exponential is the paper's w.
        bonus: (channels,), the paper's u.
        average: (batch, channels), average of the values before the first position.
        log_weight: (batch, channels), logarithm of the denominator before the first position.
        sequence_starts: (batch, length), boolean, True where a new record begins.

    Returns:
        The averages (batch, length, channels) and the state, two numbers per channel, all float64.
    """
    keys, values, average, log_weight = (widened(tensor) for tensor in (keys, values, average, log_weight))
    # Maximum of the finite keys: relative to an infinite one, all earlier positions would have equal weight.
    lowest = torch.finfo(keys.dtype).min
    finite = keys.detach().nan_to_num(nan=lowest, posinf=lowest, neginf=lowest)
    largest = torch.maximum(finite.amax(1), log_weight.detach().nan_to_num(nan=lowest, posinf=lowest, neginf=lowest))
    weight = torch.exp((keys - largest.unsqueeze(1)).clamp(min=LOWEST_EXPONENT))
    weight_before = torch.exp(log_weight - largest)
    drives = torch.cat([weight * values, weight], dim=-1)
    before = torch.cat([weight_before * average, weight_before], dim=-1)
    decay_rate = torch.exp(widened(log_decay_rate)).repeat(2).unsqueeze(-1)
    one = torch.ones_like(decay_rate)
    sums, final = selective_scan(
        drives,
        torch.ones_like(drives),
        -decay_rate,
        one,
        one,
        initial_state=before.unsqueeze(-1),
        return_final_state=True,
        sequence_starts=sequence_starts,
    )
    past = _previous(sums, before, sequence_starts)
    numerator, denominator = (past + torch.exp(widened(bonus)).repeat(2) * drives).chunk(2, dim=-1)
    final_numerator, final_denominator = final.squeeze(-1).chunk(2, dim=-1)
    return numerator / denominator, final_numerator / final_denominator, largest + final_denominator.log()


def _previous(sequence: Tensor, before: Tensor, sequence_starts: Tensor | None) -> Tensor:
    """Return every position's predecessor: `before` (batch, channels) for the first, zeros where a record begins."""
    previous = torch.cat([before.unsqueeze(1), sequence[:, :-1]], dim=1)
    if sequence_starts is None:
        return previous
    return torch.where(sequence_starts.unsqueeze(-1), torch.zeros_like(previous), previous)
