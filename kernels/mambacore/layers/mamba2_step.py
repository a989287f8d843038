"""One position through a residual Mamba-2 block in a single operator, for generation.

`mambacore::mamba2_step` is to a Mamba-2 block what `mambacore::selective_step` (`mambacore.layers.step`) is to a
selective one: on a CPU one call of the native library (kernels/native/dual.h, also used by step programs), elsewhere
the mixer's own operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mambacore.backends import compute_dtype
from mambacore.layers.dual_blocks import Mamba2Parameters
from mambacore.layers.mamba2 import Mamba2Mixer, Mamba2State
from mambacore.layers.step_operator import (
    by_mixer,
    check_step,
    define_step,
    dual_library_for,
    dual_step,
    schema_of,
    with_parameters,
)
from mambacore.native_library import Library

_STATES = ("convolution_state", "scan_state")


class _Sizes(NamedTuple):
    inner_width: int
    mixed_width: int
    kernel_width: int
    heads: int
    state_size: int


def mamba2_step(
    sequence: Tensor,
    convolution_state: Tensor | None,
    scan_state: Tensor | None,
    groups: int,
    epsilon: float,
    gate_epsilon: float,
    step_limits: Sequence[float] | None,
    parameters: Mamba2Parameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one position of a residual Mamba-2 block, without gradients.

    Args:
        sequence: (batch, 1, model_width), of the parameters' dtype.
        convolution_state: (batch, kernel_width - 1, inner_width + 2 * groups * state_size), the inputs of the
            convolution before this position; zeros if absent.
        scan_state: (batch, heads, head_width, state_size), float32 or float64; zeros if absent.
        groups: number of input and output matrices.
        epsilon: epsilon of the norm before the mixer.
        gate_epsilon: epsilon of the norm after the gate.
        step_limits: smallest and largest step size; None for no limits.
        parameters: parameters of the block.

    Returns:
        The outputs, in the shape of `sequence`, and the two states after this position.

    Raises:
        ValueError: if shapes do not match, or tensors are on different devices.
        TypeError: if a dtype is not supported, or parameters have several dtypes.
        RuntimeError: if gradients are enabled and one of the tensors requires one.
    """
    return torch.ops.mambacore.mamba2_step.default(
        sequence, convolution_state, scan_state, groups, epsilon, gate_epsilon, step_limits, *parameters
    )


def _step(sequence, convolution_state, scan_state, groups, epsilon, gate_epsilon, step_limits, *given):
    parameters = Mamba2Parameters(*given)
    sizes = _check(sequence, (convolution_state, scan_state), groups, step_limits, parameters)
    library = dual_library_for(sequence)
    arguments = (sequence, convolution_state, scan_state, groups, epsilon, gate_epsilon, step_limits, parameters)
    return by_operators(*arguments) if library is None else _by_library(library, sizes, *arguments)


def _step_fake(sequence, convolution_state, scan_state, groups, epsilon, gate_epsilon, step_limits, *given):
    sizes = _check(sequence, (convolution_state, scan_state), groups, step_limits, Mamba2Parameters(*given))
    return _new_tensors(sequence, sizes)


_library = define_step(
    "mamba2_step",
    "(Tensor sequence, Tensor? convolution_state, Tensor? scan_state, int groups, float epsilon, float gate_epsilon, "
    f"float[]? step_limits, {schema_of(Mamba2Parameters, ('input_bias', 'convolution_bias', 'output_bias'))}) "
    "-> (Tensor, Tensor, Tensor)",
    _step,
    _step_fake,
)


def _check(
    sequence: Tensor,
    states: tuple[Tensor | None, Tensor | None],
    groups: int,
    step_limits: Sequence[float] | None,
    parameters: Mamba2Parameters,
) -> _Sizes:
    """Check the arguments and return the sizes that follow from them."""
    shapes = parameters.fitting_shapes()
    (mixed, kernel_width), (heads,), (inner,) = shapes[3], shapes[5], shapes[8]
    if groups < 1 or heads < 1 or heads % groups or inner % heads or (mixed - inner) % (2 * groups) or mixed <= inner:
        raise ValueError(
            f"{groups} groups, {heads} heads, {inner} inner channels and {mixed} channels of the convolution must be "
            "those of one block: groups divide heads, heads the inner channels, and two matrices per group the rest; "
            "take the parameters and the groups of one block"
        )
    if step_limits is not None and (len(step_limits) != 2 or not 0 <= step_limits[0] < step_limits[1]):
        raise ValueError(f"step_limits must be two increasing non-negative numbers but are {step_limits}; give None")
    sizes = _Sizes(inner, mixed, kernel_width, heads, (mixed - inner) // (2 * groups))
    batch = sequence.shape[0]
    of_states = ((batch, kernel_width - 1, mixed), (batch, heads, inner // heads, sizes.state_size))
    check_step(sequence, parameters, shapes, states, of_states, _STATES)
    return sizes


def _new_tensors(sequence: Tensor, sizes: _Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the outputs and the two states."""
    batch, inner, heads = sequence.shape[0], sizes.inner_width, sizes.heads
    return (
        sequence.new_empty(sequence.shape),
        sequence.new_empty(batch, sizes.kernel_width - 1, sizes.mixed_width),
        sequence.new_empty(batch, heads, inner // heads, sizes.state_size, dtype=compute_dtype(sequence.dtype)),
    )


def _by_library(
    library: Library,
    sizes: _Sizes,
    sequence: Tensor,
    convolution_state: Tensor | None,
    scan_state: Tensor | None,
    groups: int,
    epsilon: float,
    gate_epsilon: float,
    step_limits: Sequence[float] | None,
    parameters: Mamba2Parameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step in one call of the native library."""
    found = _new_tensors(sequence, sizes)
    smallest, largest = (0.0, math.inf) if step_limits is None else step_limits
    dual_step(
        library, sequence, parameters._asdict(),
        {"convolution_state": convolution_state, "scan_state": scan_state}, found,
        projected_width=parameters.input_weight.shape[0], inner_width=sizes.inner_width, state_size=sizes.state_size,
        heads=sizes.heads, groups=groups, kernel_width=sizes.kernel_width, rank=1, epsilon=epsilon,
        inner_epsilon=gate_epsilon, smallest_step=smallest, largest_step=largest,
    )  # fmt: skip
    return found


def by_operators(
    sequence: Tensor,
    convolution_state: Tensor | None,
    scan_state: Tensor | None,
    groups: int,
    epsilon: float,
    gate_epsilon: float,
    step_limits: Sequence[float] | None,
    parameters: Mamba2Parameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step by the mixer's own operators: the definition, and the fallback."""
    of = parameters
    (mixed, kernel_width), heads, inner = of.convolution_weight.shape, len(of.step_bias), len(of.gate_norm_weight)
    with torch.device("meta"):
        # Its projections, which are computed here, have no part in `mix`.
        mixer = Mamba2Mixer(
            1, (mixed - inner) // (2 * groups), inner // heads, kernel_width, expansion=inner, groups=groups,
            norm_epsilon=gate_epsilon, step_limits=step_limits,
        )  # fmt: skip
    with_parameters(
        mixer,
        {
            "convolution_weight": of.convolution_weight,
            "convolution_bias": of.convolution_bias,
            "step_bias": of.step_bias,
            "log_decay_rate": of.log_decay_rate,
            "skip_weight": of.skip_weight,
            "gate_norm.weight": of.gate_norm_weight,
        },
    )
    empty = _new_tensors(sequence, _Sizes(inner, mixed, kernel_width, heads, mixer.state_size))
    states = (convolution_state, scan_state)
    outputs, *after = by_mixer(mixer, Mamba2State, sequence, of, epsilon, states, empty)
    return outputs, after[0], after[1]
