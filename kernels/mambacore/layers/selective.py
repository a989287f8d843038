"""The selective mixer of a Mamba block (Gu & Dao, arXiv 2312.00752, figure 3)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambacore.layers import step
from mambacore.layers.mixer import Mixer, register_mixer
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.plain_modules import are_plain_linear, is_plain_tensor
from mambacore.layers.state_matrices import initial_state_matrix
from mambacore.parallel import convolution_over_ranks, scan_over_ranks

# Initial step sizes (section 3.6 of the paper): log-uniform between these, never below the floor.
SMALLEST_STEP, LARGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4


class SelectiveState(NamedTuple):
    """The state of a selective mixer: the last inputs of its convolution, and the state of its scan."""

    convolution: Tensor  # (batch, kernel_width - 1, inner_width)
    scan: Tensor  # (batch, inner_width, state_size), float32 or float64


def step_bias_for(step_size: Tensor) -> Tensor:
    """Return the bias whose softplus is the given step size: the inverse of softplus."""
    return step_size + torch.log(-torch.expm1(-step_size))


@torch.no_grad()
def initial_step_bias(channels: int) -> Tensor:
    """Sample biases (channels,) whose softplus is log-uniform between the smallest and the largest step size."""
    log_range = math.log(LARGEST_STEP) - math.log(SMALLEST_STEP)
    step_size = torch.exp(torch.rand(channels) * log_range + math.log(SMALLEST_STEP))
    return step_bias_for(step_size.clamp(min=STEP_FLOOR))


@register_mixer
class SelectiveMixer(Mixer):
    """Mix along the sequence with a selective state space model whose step, input and output depend on the input.

    Args:
        model_width: channels of the sequence.
        state_size: states per inner channel (the paper's N); complex ones count once.
        kernel_width: taps of the causal convolution before the scan.
        expansion: inner channels per model channel.
        step_rank: rank of the projection to the step size; by default `ceil(model_width / 16)`.
        complex_state: states are complex numbers.
        state_matrix: initialisation of the state matrix (`mambacore.layers.state_matrices`); by default S4D-Real, or
            S4D-Lin for a complex state.
        linear_bias: the input and output projections have biases.
        convolution_bias: the convolution has a bias.
    """

    name = "selective"
    supports_context_parallel = True
    begins_with_linear = True

    def __init__(
        self,
        model_width: int,
        state_size: int = 16,
        kernel_width: int = 4,
        expansion: int = 2,
        step_rank: int | None = None,
        complex_state: bool = False,
        state_matrix: str | None = None,
        linear_bias: bool = False,
        convolution_bias: bool = True,
    ) -> None:
        super().__init__()
        self.model_width = model_width
        self.inner_width = expansion * model_width
        self.state_size = state_size
        self.complex_state = complex_state
        self.state_matrix_start = state_matrix or ("s4d-lin" if complex_state else "s4d-real")
        self.step_rank = math.ceil(model_width / 16) if step_rank is None else step_rank
        self.matrix_width = 2 * state_size if complex_state else state_size
        self.input_projection = nn.Linear(model_width, 2 * self.inner_width, bias=linear_bias)
        self.convolution_weight = nn.Parameter(torch.empty(self.inner_width, kernel_width))
        self.convolution_bias = nn.Parameter(torch.empty(self.inner_width)) if convolution_bias else None
        self.selection_projection = nn.Linear(self.inner_width, self.step_rank + 2 * self.matrix_width, bias=False)
        self.step_projection = nn.Linear(self.step_rank, self.inner_width, bias=False)
        self.step_bias = nn.Parameter(torch.empty(self.inner_width))
        self.log_decay_rate = nn.Parameter(torch.empty(self.inner_width, state_size))
        self.frequency = nn.Parameter(torch.empty(self.inner_width, state_size)) if complex_state else None
        self.skip_weight = nn.Parameter(torch.empty(self.inner_width))
        self.output_projection = nn.Linear(self.inner_width, model_width, bias=linear_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise parameters as in the paper; linear layers keep PyTorch's default."""
        bound = self.convolution_weight.shape[1] ** -0.5
        self.convolution_weight.uniform_(-bound, bound)
        if self.convolution_bias is not None:
            self.convolution_bias.uniform_(-bound, bound)
        nn.init.uniform_(self.step_projection.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        self.step_bias.copy_(initial_step_bias(self.inner_width))
        start = initial_state_matrix(self.state_matrix_start, self.inner_width, self.state_size, self.complex_state)
        self.log_decay_rate.copy_((-start.real).log())
        if self.frequency is not None:
            self.frequency.copy_(start.imag)
        self.skip_weight.fill_(1.0)

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics, which weight decay must not pull towards zero."""
        dynamics = [self.log_decay_rate, self.frequency, self.skip_weight, self.step_bias, self.convolution_bias]
        return [parameter for parameter in dynamics if parameter is not None]

    @property
    def state_matrix(self) -> Tensor:
        """A (inner_width, state_size): negative decay rates, with the frequency as imaginary part if complex."""
        rate = self.log_decay_rate
        decay_rate = -torch.exp(rate.to(torch.promote_types(rate.dtype, torch.float32)))
        return decay_rate if self.frequency is None else torch.complex(decay_rate, self.frequency.to(decay_rate.dtype))

    def forward(
        self,
        sequence: Tensor,
        state: SelectiveState | None = None,
        sequence_starts: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, SelectiveState]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state.

        `reverse` scans from the last position to the first, without copies.
        """
        inputs, gate = self.input_projection(sequence).chunk(2, dim=-1)
        outputs, state = self.mix(inputs, gate, state, sequence_starts, reverse)
        return self.output_projection(outputs), state

    def step(self, norm: RootMeanSquareNorm, sequence: Tensor, state: Any) -> tuple[Tensor, SelectiveState] | None:
        """Compute one position with the native library or the GPU kernels (see `Mixer.step`)."""
        if not self._takes(state, sequence) or not are_plain_linear(
            self.input_projection, self.selection_projection, self.step_projection, self.output_projection
        ):
            return None
        stepped = step.step_block(norm, self, sequence, state)
        return None if stepped is None else (stepped[0], SelectiveState(*stepped[1:]))

    def _takes(self, state: Any, sequence: Tensor) -> bool:
        """Return whether a state fits a sequence and this mixer, so that a kernel may read it."""
        if state is None:
            return True
        history, batch = self.convolution_weight.shape[1] - 1, sequence.shape[0]
        return (
            isinstance(state, SelectiveState)
            and state.convolution.shape == (batch, history, self.inner_width)
            and state.scan.shape == (batch, self.inner_width, self.state_size)
            and all(is_plain_tensor(tensor) and tensor.device == sequence.device for tensor in state)
            and state.scan.is_complex() <= self.complex_state
        )

    def mix(
        self, inputs: Tensor, gate: Tensor, state: SelectiveState | None, sequence_starts: Tensor | None, reverse: bool
    ) -> tuple[Tensor, SelectiveState]:
        """Compute convolution, selection and scan between the two projections, (batch, length, inner_width)."""
        inputs, convolution_state = convolution_over_ranks(
            inputs,
            self.convolution_weight,
            self.convolution_bias,
            silu=True,
            initial_state=None if state is None else state.convolution,
            reverse=reverse,
            sequence_starts=sequence_starts,
        )
        low_rank_step, input_matrix, output_matrix = self.selection_projection(inputs).split(
            [self.step_rank, self.matrix_width, self.matrix_width], dim=-1
        )
        if self.complex_state:
            input_matrix, output_matrix = (as_complex(matrix) for matrix in (input_matrix, output_matrix))
        outputs, scan_state = scan_over_ranks(
            inputs,
            self.step_projection(low_rank_step),
            self.state_matrix,
            input_matrix,
            output_matrix,
            self.skip_weight,
            gate,
            self.step_bias,
            step_softplus=True,
            initial_state=None if state is None else state.scan,
            reverse=reverse,
            sequence_starts=sequence_starts,
        )
        return outputs, SelectiveState(convolution_state, scan_state)


def as_complex(pairs: Tensor) -> Tensor:
    """View (..., 2 * count) real numbers as (..., count) complex ones, with adjacent real and imaginary parts."""
    pairs = pairs.to(torch.promote_types(pairs.dtype, torch.float32))
    return torch.complex(*pairs.unflatten(-1, (-1, 2)).unbind(-1))
