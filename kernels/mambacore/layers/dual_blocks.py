"""Mamba-2 and Mamba-3 blocks as arguments of their registered steps (`mamba2_step`, `mamba3_step`), and the calls.

The mixers import this file, so their types are not named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mambacore.layers.plain_modules import parameter_of
from mambacore.layers.step_operator import dual_library_for, steps_in_library

if TYPE_CHECKING:
    from mambacore.layers.norm import RootMeanSquareNorm


class Mamba2Parameters(NamedTuple):
    """The parameters of a block in the layout of its modules, all of one dtype."""

    norm_weight: Tensor  # (model_width,)
    input_weight: Tensor  # (inner_width + mixed_width + heads, model_width)
    input_bias: Tensor | None  # (inner_width + mixed_width + heads,)
    convolution_weight: Tensor  # (mixed_width, kernel_width), of inner_width + 2 * groups * state_size channels
    convolution_bias: Tensor | None  # (mixed_width,)
    step_bias: Tensor  # (heads,)
    log_decay_rate: Tensor  # (heads,)
    skip_weight: Tensor  # (heads,)
    gate_norm_weight: Tensor  # (inner_width,)
    output_weight: Tensor  # (model_width, inner_width)
    output_bias: Tensor | None  # (model_width,)

    def fitting_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shape that each must have, by the sizes of the first parameter that has each size."""
        model_width, heads, inner_width = (
            self.norm_weight.shape[0], self.step_bias.shape[0], self.gate_norm_weight.shape[0],
        )  # fmt: skip
        mixed_width, kernel_width = self.convolution_weight.shape
        projected = inner_width + mixed_width + heads
        return (
            (model_width,), (projected, model_width), (projected,), (mixed_width, kernel_width), (mixed_width,),
            (heads,), (heads,), (heads,), (inner_width,), (model_width, inner_width), (model_width,),
        )  # fmt: skip


class Mamba3Parameters(NamedTuple):
    """The parameters of a block in the layout of its modules, all of one dtype."""

    norm_weight: Tensor  # (model_width,)
    input_weight: Tensor  # (all that the mixer splits, model_width)
    step_bias: Tensor  # (heads,)
    input_matrix_norm_weight: Tensor  # (state_size,)
    output_matrix_norm_weight: Tensor  # (state_size,)
    input_matrix_bias: Tensor  # (heads, rank, state_size)
    output_matrix_bias: Tensor  # (heads, rank, state_size)
    rank_inputs: Tensor | None  # (heads, rank, head_width); these three are absent at rank 1
    rank_gates: Tensor | None
    rank_outputs: Tensor | None
    skip_weight: Tensor  # (heads,)
    output_norm_weight: Tensor | None  # (inner_width,)
    output_weight: Tensor  # (model_width, inner_width)


class Mamba3States(NamedTuple):
    """The state before or after a position, as in `mambacore.layers.mamba3.Mamba3State`; zeros where absent."""

    angle: Tensor | None  # (batch, heads, angles), float64
    scan: Tensor | None  # (batch, heads, head_width, state_size), float32 or float64
    key: Tensor | None  # (batch, rank, heads, state_size)
    value: Tensor | None  # (batch, heads, head_width)


class Mamba3Choices(NamedTuple):
    """What of a mixer is not a tensor."""

    groups: int
    angles: int
    trapezoidal: bool
    epsilon: float  # of the norm before the mixer
    matrix_epsilon: float  # of the norms of the two matrices
    output_epsilon: float  # of the norm of a head's outputs


def mamba2_parameters(norm: RootMeanSquareNorm, mixer: Any) -> Mamba2Parameters:
    """Return the parameters of a block with plain modules (`mambacore.layers.plain_modules`)."""
    come, go = mixer.input_projection, mixer.output_projection
    found = (
        parameter_of(norm, "weight"),
        parameter_of(come, "weight"),
        parameter_of(come, "bias"),
        parameter_of(mixer, "convolution_weight"),
        mixer.convolution_bias,
        parameter_of(mixer, "step_bias"),
        parameter_of(mixer, "log_decay_rate"),
        parameter_of(mixer, "skip_weight"),
        parameter_of(mixer.gate_norm, "weight"),
        parameter_of(go, "weight"),
        parameter_of(go, "bias"),
    )
    return Mamba2Parameters._make(found)  # the modules ensure which of them may be absent


def step_mamba2(
    norm: RootMeanSquareNorm, mixer: Any, sequence: Tensor, state: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute `sequence + mixer(norm(sequence), state)` for a plain block and a sequence (batch, 1, model_width).

    Returns:
        The outputs, and the states of the convolution and of the scan; None if the operators have to be called.
    """
    parameters = mamba2_parameters(norm, mixer)
    if not steps_in_library(sequence, parameters) or dual_library_for(sequence) is None:
        return None
    convolution_state, scan_state = (None, None) if state is None else state
    return torch.ops.mambacore.mamba2_step.default(
        sequence, convolution_state, scan_state, mixer.groups, norm.epsilon, mixer.gate_norm.epsilon,
        mixer.step_limits, *parameters,
    )  # fmt: skip


def mamba3_parameters(norm: RootMeanSquareNorm, mixer: Any) -> Mamba3Parameters:
    """Return the parameters of a block with plain modules (`mambacore.layers.plain_modules`)."""
    found = (
        parameter_of(norm, "weight"),
        parameter_of(mixer.input_projection, "weight"),
        parameter_of(mixer, "step_bias"),
        parameter_of(mixer.input_matrix_norm, "weight"),
        parameter_of(mixer.output_matrix_norm, "weight"),
        parameter_of(mixer, "input_matrix_bias"),
        parameter_of(mixer, "output_matrix_bias"),
        mixer.rank_inputs,
        mixer.rank_gates,
        mixer.rank_outputs,
        parameter_of(mixer, "skip_weight"),
        mixer.output_norm_weight,
        parameter_of(mixer.output_projection, "weight"),
    )
    return Mamba3Parameters._make(found)  # the modules ensure which of them may be absent


def mamba3_choices(norm: RootMeanSquareNorm, mixer: Any) -> Mamba3Choices:
    """Return what of a block is not a tensor."""
    return Mamba3Choices(
        mixer.groups, mixer.angles, mixer.trapezoidal, norm.epsilon, mixer.input_matrix_norm.epsilon,
        mixer.output_norm_epsilon,
    )  # fmt: skip


def step_mamba3(
    norm: RootMeanSquareNorm, mixer: Any, sequence: Tensor, states: Mamba3States
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Compute `sequence + mixer(norm(sequence), state)` for a plain block and a sequence (batch, 1, model_width).

    Returns:
        The outputs and the parts of the state; None if the operators have to be called.
    """
    parameters = mamba3_parameters(norm, mixer)
    if not steps_in_library(sequence, parameters) or dual_library_for(sequence) is None:
        return None
    return torch.ops.mambacore.mamba3_step.default(sequence, *states, *mamba3_choices(norm, mixer), *parameters)
