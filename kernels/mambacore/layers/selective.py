"""The selective mixer of a Mamba block (Gu & Dao, arXiv 2312.00752, figure 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambacore.layers import step
from mambacore.layers.mixer import Mixer, register_mixer
from mambacore.layers.narrow_linear import narrow_linear
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.plain_modules import are_plain_linear, is_plain_tensor
from mambacore.layers.selective_block import run_block
from mambacore.layers.state_matrices import initial_state_matrix
from mambacore.parallel import convolution_over_ranks, scan_over_ranks

# Initial step sizes (section 3.6 of the paper): log-uniform between these, never below the floor.
SMALLEST_STEP, LARGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4
# What may depend on the input (table 7 of the paper): the step size, the input matrix B and the output matrix C.
STEP, INPUT, OUTPUT = SELECTED = ("step", "input", "output")


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
        selective: which of `step`, `input` and `output` depend on the input; by default all. The others are parameters
            that are the same at every position, initialised as in S4D. With none, the mixer is time-invariant.

    Raises:
        ValueError: if `selective` holds anything else, or the same twice.
    """

    name = "selective"
    supports_context_parallel = True
    begins_with_linear = True
    steps_many = True

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
        selective: Sequence[str] = SELECTED,
    ) -> None:
        super().__init__()
        if isinstance(selective, str) or len(set(selective)) < len(selective) or not set(selective) <= set(SELECTED):
            raise ValueError(f"selective must be a list of {', '.join(SELECTED)}, each at most once, not {selective!r}")
        self.selective = tuple(name for name in SELECTED if name in selective)
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
        widths = {STEP: self.step_rank, INPUT: self.matrix_width, OUTPUT: self.matrix_width}
        self.selected_widths = [widths[name] for name in self.selective]
        # Modules and parameters are None where others take their place.
        self.selection_projection = optional_linear(self.inner_width, sum(self.selected_widths))
        self.step_projection = optional_linear(self.step_rank, self.inner_width if STEP in self.selective else 0)
        fixed = (self.inner_width, self.matrix_width)
        self.input_matrix = None if INPUT in self.selective else nn.Parameter(torch.empty(fixed))
        self.output_matrix = None if OUTPUT in self.selective else nn.Parameter(torch.empty(fixed))
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
        if self.step_projection is not None:
            nn.init.uniform_(self.step_projection.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        if self.input_matrix is not None:
            self.input_matrix.fill_(1.0)
            if self.complex_state:
                self.input_matrix[:, 1::2] = 0.0  # imaginary parts
        if self.output_matrix is not None:
            self.output_matrix.normal_(std=0.5**0.5 if self.complex_state else 1.0)
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
        """Compute the block with the native library, or one position with the GPU kernels (see `Mixer.step`)."""
        if self.selective != SELECTED or not self._takes(state, sequence):
            return None
        if not are_plain_linear(
            self.input_projection, self.selection_projection, self.step_projection, self.output_projection
        ):
            return None
        compute = step.step_block if sequence.shape[1] == 1 else run_block
        stepped = compute(norm, self, sequence, state)
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
        step_size, input_matrix, output_matrix = self._selection(inputs)
        outputs, scan_state = scan_over_ranks(
            inputs,
            step_size,
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

    def _selection(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute step sizes before their bias and softplus, and the input and output matrices of the scan.

        A matrix is (batch, length, state_size), or (inner_width, state_size) if it is the same at every position.
        """
        selected: dict[str, Tensor] = {}
        if self.selection_projection is not None:
            parts = self.selection_projection(inputs).split(self.selected_widths, dim=-1)
            selected = dict(zip(self.selective, parts, strict=True))
        if self.step_projection is None:
            step_size = inputs.new_zeros(self.inner_width).expand(inputs.shape)  # the bias is all there is
        else:
            step_size = narrow_linear(self.step_projection, selected[STEP])
        input_matrix = selected[INPUT] if self.input_matrix is None else self.input_matrix
        output_matrix = selected[OUTPUT] if self.output_matrix is None else self.output_matrix
        if self.complex_state:
            return step_size, as_complex(input_matrix), as_complex(output_matrix)
        return step_size, input_matrix, output_matrix


def optional_linear(inputs: int, outputs: int) -> nn.Linear | None:
    """Return a linear layer without a bias, or None if it had no outputs."""
    return nn.Linear(inputs, outputs, bias=False) if outputs else None


def as_complex(pairs: Tensor) -> Tensor:
    """View (..., 2 * count) real numbers as (..., count) complex ones, with adjacent real and imaginary parts."""
    pairs = pairs.to(torch.promote_types(pairs.dtype, torch.float32))
    return torch.complex(*pairs.unflatten(-1, (-1, 2)).unbind(-1))
