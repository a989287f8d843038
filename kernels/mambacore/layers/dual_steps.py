"""Mamba-2 and Mamba-3 mixers as operations of a program of steps (`step_program`, kernels/native/dual.h)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambacore.layers.mamba2 import Mamba2Mixer, Mamba2State
from mambacore.layers.mamba3 import Mamba3Mixer, Mamba3State
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.step_layout import channels_last, padded

DualMixer = Mamba2Mixer | Mamba3Mixer
DualState = Mamba2State | Mamba3State


class DualOperation(NamedTuple):
    """What a program adds for a mixer: weights by number, sizes by name, and the numbers of its state."""

    weights: list[Tensor | None]
    sizes: dict[str, float]
    state_size: int


def mamba2_operation(norm: RootMeanSquareNorm, mixer: Mamba2Mixer) -> DualOperation:
    """The operation of a Mamba-2 mixer behind a norm."""
    come, go, limits = mixer.input_projection, mixer.output_projection, mixer.step_limits
    mixed, kernel_width = mixer.convolution_weight.shape
    weights = [
        norm.weight, come.weight, come.bias, channels_last(mixer.convolution_weight), mixer.convolution_bias,
        mixer.step_bias, -torch.exp(mixer.log_decay_rate.double()), mixer.skip_weight, mixer.gate_norm.weight,
        None if limits is None else torch.tensor(limits, dtype=torch.float64), go.weight, go.bias,
    ]  # fmt: skip
    sizes = _sizes(norm, mixer) | {"kernel_width": kernel_width, "inner_epsilon": mixer.gate_norm.epsilon}
    return DualOperation(weights, sizes, (kernel_width - 1) * padded(mixed) + mixer.inner_width * mixer.state_size)


def mamba3_operation(norm: RootMeanSquareNorm, mixer: Mamba3Mixer) -> DualOperation:
    """The operation of a Mamba-3 mixer behind a norm."""
    weights = [
        norm.weight, mixer.input_projection.weight, mixer.step_bias, mixer.input_matrix_norm.weight,
        mixer.output_matrix_norm.weight, mixer.input_matrix_bias, mixer.output_matrix_bias, mixer.rank_inputs,
        mixer.rank_gates, mixer.rank_outputs, mixer.skip_weight, mixer.output_projection.weight,
        mixer.output_norm_weight,
    ]  # fmt: skip
    sizes = _sizes(norm, mixer) | {
        "rank": mixer.rank,
        "angles": mixer.angles,
        "is_trapezoidal": mixer.trapezoidal,
        "inner_epsilon": mixer.input_matrix_norm.epsilon,
        "output_epsilon": mixer.output_norm_epsilon,
    }
    return DualOperation(weights, sizes, sum(_sizes_of_state(mixer)))


def state_numbers(state: DualState) -> Tensor:
    """A state as it lies in the memory of a sequence, (batch, numbers)."""
    if isinstance(state, Mamba2State):
        convolution = channels_last(state.convolution.movedim(-1, 0))
        parts = [convolution, state.scan]
        return torch.cat([part.flatten(1).to(state.scan.dtype) for part in parts], dim=1)
    angle = state.angle.to(state.scan.dtype)  # as a sum of two numbers: float32 alone would lose the phase
    parts = [angle, (state.angle - angle.double()), state.scan, state.key.transpose(1, 2), state.value]
    return torch.cat([part.flatten(1).to(state.scan.dtype) for part in parts], dim=1)


def state_from(rows: Tensor, mixer: DualMixer) -> DualState:
    """The opposite of `state_numbers`, of (batch, at least as many numbers)."""
    of_scan = (mixer.heads, mixer.head_width, mixer.state_size)
    if isinstance(mixer, Mamba2Mixer):
        mixed, kernel_width = mixer.convolution_weight.shape
        history = (kernel_width - 1) * padded(mixed)
        convolution = rows[:, :history].unflatten(1, (kernel_width - 1, padded(mixed)))[:, :, :mixed]
        scan = rows[:, history : history + mixer.inner_width * mixer.state_size]
        return Mamba2State(convolution.clone(), scan.reshape(-1, *of_scan).clone())
    sizes = _sizes_of_state(mixer)
    high, low, scan, key, value = rows[:, : sum(sizes)].split(sizes, dim=1)
    angle = (high.double() + low.double()).unflatten(1, (mixer.heads, mixer.angles))
    key = key.unflatten(1, (mixer.heads, mixer.rank, mixer.state_size)).transpose(1, 2)
    return Mamba3State(
        angle, scan.unflatten(1, of_scan).clone(), key.contiguous(), value.unflatten(1, of_scan[:2]).clone()
    )


def _sizes(norm: RootMeanSquareNorm, mixer: DualMixer) -> dict[str, float]:
    return {
        "width": mixer.output_projection.out_features,
        "inner_width": mixer.input_projection.out_features,
        "outputs": mixer.inner_width,
        "state_size": mixer.state_size,
        "heads": mixer.heads,
        "groups": mixer.groups,
        "epsilon": norm.epsilon,
    }


def _sizes_of_state(mixer: Mamba3Mixer) -> list[int]:
    """Numbers of the angles and of what they lack, of the scan, of the keys and of the values."""
    angles = mixer.heads * mixer.angles
    inner = mixer.inner_width
    return [angles, angles, inner * mixer.state_size, mixer.heads * mixer.rank * mixer.state_size, inner]
