"""The Mamba-2 mixer: the inside of a Mamba-2 block (Dao & Gu, arXiv 2405.21060, section 7.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.backends import compute_dtype
from mambacore.layers.dual_blocks import step_mamba2
from mambacore.layers.gated_norm import gated_norm, is_plain_norm_after_gate, norm_after_gate
from mambacore.layers.mixer import Mixer, register_mixer
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.plain_modules import are_plain_linear, is_plain_state
from mambacore.layers.selective import initial_step_bias
from mambacore.parallel import convolution_over_ranks, ssd_over_ranks

# Initial decay rates: uniform between these, one per head.
SLOWEST_DECAY, FASTEST_DECAY = 1.0, 16.0

# Default width of a head if it divides the inner channels; else the largest common divisor.
HEAD_WIDTH = 64


class Mamba2State(NamedTuple):
    """State of a Mamba-2 mixer: the last inputs of its convolution, and the state of its scan."""

    convolution: Tensor  # (batch, kernel_width - 1, inner_width + 2 * groups * state_size)
    scan: Tensor  # (batch, heads, head_width, state_size), float32 or float64


def head_width_for(inner_width: int, head_width: int | None) -> int:
    """Return the given width of a head, or the default.

    Raises:
        ValueError: if the width does not divide the inner channels.
    """
    if head_width is None:
        return math.gcd(HEAD_WIDTH, inner_width)
    if head_width < 1 or inner_width % head_width:
        raise ValueError(f"heads of width {head_width} do not divide {inner_width} inner channels; choose a divisor")
    return head_width


def check_groups(heads: int, groups: int) -> None:
    """Check that the heads divide evenly into groups.

    Raises:
        ValueError: if `groups` does not divide `heads`.
    """
    if groups < 1 or heads % groups:
        raise ValueError(f"{groups} groups do not divide {heads} heads; choose a divisor")


@register_mixer
class Mamba2Mixer(Mixer):
    """Mix along the sequence with a selective state space model that has one decay per head.

    One projection gives the gate, the inputs, both matrices and the step size. Because all states of a head decay
    equally, the scan consists of matrix products (`mambacore.ssd`), so states are cheap: 64 of them cost less than 16
    in the selective mixer.

    Args:
        model_width: channels of the sequence.
        state_size: states per inner channel (the paper's N).
        head_width: inner channels of a head (the paper's P); by default 64, or a divisor of the inner channels.
        kernel_width: taps of the causal convolution before the scan.
        expansion: inner channels per model channel.
        groups: number of input and output matrices, shared by the heads (the paper's G).
        linear_bias: the input and output projections have biases.
        convolution_bias: the convolution has a bias.
        norm_epsilon: keeps positions of zeros finite in the norm after the gate.
        step_limits: smallest and largest step size, after softplus; None for no limits.

    Raises:
        ValueError: if the heads do not divide the inner channels, the groups do not divide the heads, or the limits are
            not two increasing non-negative numbers.
    """

    name = "mamba2"
    supports_context_parallel = True

    def __init__(
        self,
        model_width: int,
        state_size: int = 64,
        head_width: int | None = None,
        kernel_width: int = 4,
        expansion: int = 2,
        groups: int = 1,
        linear_bias: bool = False,
        convolution_bias: bool = True,
        norm_epsilon: float = 1e-5,
        step_limits: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if step_limits is not None and (len(step_limits) != 2 or not 0 <= step_limits[0] < step_limits[1]):
            raise ValueError(f"step_limits must be two increasing non-negative numbers but are {step_limits}")
        self.model_width = model_width
        self.inner_width = expansion * model_width
        self.head_width = head_width_for(self.inner_width, head_width)
        self.heads = self.inner_width // self.head_width
        check_groups(self.heads, groups)
        self.state_size = state_size
        self.groups = groups
        self.step_limits = None if step_limits is None else (float(step_limits[0]), float(step_limits[1]))
        self.matrix_width = groups * state_size
        mixed = self.inner_width + 2 * self.matrix_width
        self.input_projection = nn.Linear(model_width, self.inner_width + mixed + self.heads, bias=linear_bias)
        self.convolution_weight = nn.Parameter(torch.empty(mixed, kernel_width))
        self.convolution_bias = nn.Parameter(torch.empty(mixed)) if convolution_bias else None
        self.step_bias = nn.Parameter(torch.empty(self.heads))
        self.log_decay_rate = nn.Parameter(torch.empty(self.heads))
        self.skip_weight = nn.Parameter(torch.empty(self.heads))
        self.gate_norm = norm_after_gate(self.inner_width, groups, norm_epsilon)
        self.output_projection = nn.Linear(self.inner_width, model_width, bias=linear_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise parameters as in the paper; linear layers keep PyTorch's default."""
        bound = self.convolution_weight.shape[1] ** -0.5
        self.convolution_weight.uniform_(-bound, bound)
        if self.convolution_bias is not None:
            self.convolution_bias.uniform_(-bound, bound)
        self.step_bias.copy_(initial_step_bias(self.heads))
        self.log_decay_rate.uniform_(SLOWEST_DECAY, FASTEST_DECAY).log_()
        self.skip_weight.fill_(1.0)

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics, which weight decay must not pull towards zero."""
        dynamics = [self.log_decay_rate, self.skip_weight, self.step_bias, self.convolution_bias]
        return [parameter for parameter in dynamics if parameter is not None]

    @property
    def state_matrix(self) -> Tensor:
        """A (inner_width, 1): the negative decay rate of each channel, the same for all its states."""
        rate = self.log_decay_rate
        decay_rate = -torch.exp(rate.to(torch.promote_types(rate.dtype, torch.float32)))
        return decay_rate.repeat_interleave(self.head_width).unsqueeze(-1)

    def forward(
        self,
        sequence: Tensor,
        state: Mamba2State | None = None,
        sequence_starts: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, Mamba2State]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state.

        `reverse` scans from the last position to the first.
        """
        outputs, state = self.mix(self.input_projection(sequence), state, sequence_starts, reverse)
        return self.output_projection(outputs), state

    def step(self, norm: RootMeanSquareNorm, sequence: Tensor, state: Any) -> tuple[Tensor, Mamba2State] | None:
        """Compute one position with the native library (see `Mixer.step`)."""
        if not (
            are_plain_linear(self.input_projection, self.output_projection)
            and is_plain_norm_after_gate(self.gate_norm, self.groups)
            and (state is None or is_plain_state(state, Mamba2State, self._state_shapes(sequence), sequence.device))
        ):
            return None
        stepped = step_mamba2(norm, self, sequence, state)
        return None if stepped is None else (stepped[0], Mamba2State(*stepped[1:]))

    def _state_shapes(self, sequence: Tensor) -> tuple[tuple[int, ...], ...]:
        batch, (mixed, kernel_width) = sequence.shape[0], self.convolution_weight.shape
        return (batch, kernel_width - 1, mixed), (batch, self.heads, self.head_width, self.state_size)

    def mix(
        self, projected: Tensor, state: Mamba2State | None, sequence_starts: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Mamba2State]:
        """Compute convolution, scan, gate and norm between the two projections, to (batch, length, inner_width)."""
        gate, mixed, raw_step = projected.split(
            [self.inner_width, self.inner_width + 2 * self.matrix_width, self.heads], dim=-1
        )
        mixed, convolution_state = convolution_over_ranks(
            mixed,
            self.convolution_weight,
            self.convolution_bias,
            silu=True,
            initial_state=None if state is None else state.convolution,
            reverse=reverse,
            sequence_starts=sequence_starts,
        )
        inputs, input_matrix, output_matrix = mixed.split(
            [self.inner_width, self.matrix_width, self.matrix_width], dim=-1
        )
        dtype = compute_dtype(projected.dtype)
        step_size = F.softplus(raw_step.to(dtype) + self.step_bias.to(dtype))
        if self.step_limits is not None:
            step_size = step_size.clamp(*self.step_limits)
        outputs, scan_state = ssd_over_ranks(
            inputs.unflatten(-1, (self.heads, self.head_width)),
            -torch.exp(self.log_decay_rate.to(dtype)) * step_size,
            input_matrix.unflatten(-1, (self.groups, self.state_size)),
            output_matrix.unflatten(-1, (self.groups, self.state_size)),
            input_weight=step_size,
            skip_weight=self.skip_weight,
            initial_state=None if state is None else state.scan,
            reverse=reverse,
            sequence_starts=sequence_starts,
        )
        normalised = gated_norm(outputs.flatten(-2), gate, self.gate_norm)
        return normalised, Mamba2State(convolution_state, scan_state)
