"""The selective mixer: the inside of a Mamba block (Gu & Dao, arXiv 2312.00752, figure 3)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mambacore.convolution import causal_convolution
from mambacore.scan import selective_scan

# Step sizes at the start of training (section 3.6 of the paper): log-uniform between these, never below the floor.
SMALLEST_STEP, LARGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4


class SelectiveState(NamedTuple):
    """What a selective mixer hands on: the last inputs of its convolution, and the state of its scan."""

    convolution: Tensor  # (batch, kernel_width - 1, inner_width)
    scan: Tensor  # (batch, inner_width, state_size), float32 or float64


def step_bias_for(step_size: Tensor) -> Tensor:
    """The bias whose softplus is the given step size: the inverse of softplus."""
    return step_size + torch.log(-torch.expm1(-step_size))


class SelectiveMixer(nn.Module):
    """Mix along the sequence with a selective state space model whose step, input and output depend on the input.

    Args:
        model_width: channels of the sequence that comes and goes.
        state_size: states per inner channel (the paper's N).
        kernel_width: taps of the causal convolution before the scan.
        expansion: inner channels per model channel.
        step_rank: width through which the step size is computed; ``ceil(model_width / 16)`` when None.
    """

    def __init__(
        self,
        model_width: int,
        state_size: int = 16,
        kernel_width: int = 4,
        expansion: int = 2,
        step_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.inner_width = expansion * model_width
        self.state_size = state_size
        self.step_rank = math.ceil(model_width / 16) if step_rank is None else step_rank
        self.input_projection = nn.Linear(model_width, 2 * self.inner_width, bias=False)
        self.convolution_weight = nn.Parameter(torch.empty(self.inner_width, kernel_width))
        self.convolution_bias = nn.Parameter(torch.empty(self.inner_width))
        self.selection_projection = nn.Linear(self.inner_width, self.step_rank + 2 * state_size, bias=False)
        self.step_projection = nn.Linear(self.step_rank, self.inner_width, bias=False)
        self.step_bias = nn.Parameter(torch.empty(self.inner_width))
        self.log_decay_rate = nn.Parameter(torch.empty(self.inner_width, state_size))
        self.skip_weight = nn.Parameter(torch.empty(self.inner_width))
        self.output_projection = nn.Linear(self.inner_width, model_width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise what the paper initialises specially; linear layers keep PyTorch's default."""
        bound = self.convolution_weight.shape[1] ** -0.5
        self.convolution_weight.uniform_(-bound, bound)
        self.convolution_bias.uniform_(-bound, bound)
        nn.init.uniform_(self.step_projection.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        log_range = math.log(LARGEST_STEP) - math.log(SMALLEST_STEP)
        step_size = torch.exp(torch.rand(self.inner_width) * log_range + math.log(SMALLEST_STEP))
        self.step_bias.copy_(step_bias_for(step_size.clamp(min=STEP_FLOOR)))
        self.log_decay_rate.copy_(torch.arange(1, self.state_size + 1).log().expand_as(self.log_decay_rate))  # S4D-Real
        self.skip_weight.fill_(1.0)

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """The parameters of the dynamics, which weight decay would pull to a meaningless place."""
        return [self.log_decay_rate, self.skip_weight, self.step_bias, self.convolution_bias]

    def forward(self, sequence: Tensor, state: SelectiveState | None = None) -> tuple[Tensor, SelectiveState]:
        """(batch, length, model_width) and the incoming state to the same shape and the outgoing state."""
        inputs, gate = self.input_projection(sequence).chunk(2, dim=-1)
        inputs, convolution_state = causal_convolution(
            inputs,
            self.convolution_weight,
            self.convolution_bias,
            silu=True,
            initial_state=None if state is None else state.convolution,
            return_final_state=True,
        )
        selection = self.selection_projection(inputs)
        low_rank_step, input_matrix, output_matrix = selection.split(
            [self.step_rank, self.state_size, self.state_size], dim=-1
        )
        outputs, scan_state = selective_scan(
            inputs,
            self.step_projection(low_rank_step),
            -torch.exp(self.log_decay_rate.to(torch.promote_types(self.log_decay_rate.dtype, torch.float32))),
            input_matrix,
            output_matrix,
            self.skip_weight,
            gate,
            self.step_bias,
            step_softplus=True,
            initial_state=None if state is None else state.scan,
            return_final_state=True,
        )
        return self.output_projection(outputs), SelectiveState(convolution_state, scan_state)
