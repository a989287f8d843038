"""One position through a residual Mamba-3 block in a single operator, for generation.

`mambacore::mamba3_step` is to a Mamba-3 block what `mambacore::selective_step` (`mambacore.layers.step`) is to a
selective one: on a CPU one call of the native library (kernels/native/dual.h, also used by step programs), elsewhere
the mixer's own operators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambacore.backends import compute_dtype
from mambacore.devices import wide_dtype
from mambacore.layers.dual_blocks import Mamba3Choices, Mamba3Parameters, Mamba3States
from mambacore.layers.mamba3 import Mamba3Mixer, Mamba3State
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


class _Sizes(NamedTuple):
    inner_width: int
    heads: int
    rank: int
    state_size: int

    @property
    def head_width(self) -> int:
        return self.inner_width // self.heads


_STATES = tuple(f"{name}_state" for name in Mamba3States._fields)
_OPTIONAL = ("rank_inputs", "rank_gates", "rank_outputs", "output_norm_weight")


def mamba3_step(
    sequence: Tensor, states: Mamba3States, choices: Mamba3Choices, parameters: Mamba3Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute one position of a residual Mamba-3 block, without gradients.

    Args:
        sequence: (batch, 1, model_width), of the parameters' dtype.
        states: the state before this position.
        choices: sizes and epsilons of the block.
        parameters: parameters of the block.

    Returns:
        The outputs, in the shape of `sequence`, and the four parts of the state after this position.

    Raises:
        ValueError: if shapes do not match, or tensors are on different devices.
        TypeError: if a dtype is not supported, or parameters have several dtypes.
        RuntimeError: if gradients are enabled and one of the tensors requires one.
    """
    return torch.ops.mambacore.mamba3_step.default(sequence, *states, *choices, *parameters)


def _arguments(given):
    """Return the operator's arguments after the sequence in their three groups."""
    states, choices = given[:4], given[4:10]
    return Mamba3States(*states), Mamba3Choices(*choices), Mamba3Parameters(*given[10:])


def _step(sequence, *given):
    states, choices, parameters = _arguments(given)
    sizes = _check(sequence, states, choices, parameters)
    library = dual_library_for(sequence)
    if library is None:
        return by_operators(sequence, states, choices, parameters)
    return _by_library(library, sizes, sequence, states, choices, parameters)


def _step_fake(sequence, *given):
    states, choices, parameters = _arguments(given)
    return _new_tensors(sequence, choices, _check(sequence, states, choices, parameters))


_library = define_step(
    "mamba3_step",
    "(Tensor sequence, Tensor? angle_state, Tensor? scan_state, Tensor? key_state, Tensor? value_state, int groups, "
    "int angles, bool trapezoidal, float epsilon, float matrix_epsilon, float output_epsilon, "
    f"{schema_of(Mamba3Parameters, _OPTIONAL)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _step,
    _step_fake,
)


def _check(sequence: Tensor, states: Mamba3States, choices: Mamba3Choices, parameters: Mamba3Parameters) -> _Sizes:
    """Check the arguments and return the sizes that follow from them."""
    of, (groups, angles, trapezoidal, *_) = parameters, choices
    (heads, rank, state_size), inner = of.input_matrix_bias.shape, of.output_weight.shape[-1]
    if (
        heads < 1 or rank < 1 or groups < 1 or heads % groups or inner % heads or inner < 1
        or not 0 <= 2 * angles <= state_size or (angles > 0 and state_size % 2)
    ):  # fmt: skip
        raise ValueError(
            f"{groups} groups, {heads} heads, {inner} inner channels, rank {rank}, {angles} angles and {state_size} "
            "states must be those of one block: groups divide heads, heads the inner channels, and each angle turns a "
            "pair of states; take the parameters and the sizes of one block"
        )
    several = bool(rank > 1)  # also of a size that is not known yet
    if any((weight is not None) != several for weight in (of.rank_inputs, of.rank_gates, of.rank_outputs)):
        raise ValueError(
            f"rank_inputs, rank_gates and rank_outputs must all be absent at rank 1, and all be there above, but the "
            f"rank is {rank}; take the parameters of one block"
        )
    sizes = _Sizes(inner, heads, rank, state_size)
    width, of_rank, biases = of.norm_weight.shape[0], (heads, rank, sizes.head_width), (heads, rank, state_size)
    projected = 2 * inner + 2 * rank * groups * state_size + (3 if trapezoidal else 2) * heads + angles
    shapes = (
        (width,), (projected, width), (heads,), (state_size,), (state_size,), biases, biases, of_rank, of_rank,
        of_rank, (heads,), (inner,), (width, inner),
    )  # fmt: skip
    batch = sequence.shape[0]
    of_states = (
        (batch, heads, angles), (batch, heads, sizes.head_width, state_size), (batch, rank, heads, state_size),
        (batch, heads, sizes.head_width),
    )  # fmt: skip
    check_step(sequence, parameters, shapes, states, of_states, _STATES)
    return sizes


def _new_tensors(
    sequence: Tensor, choices: Mamba3Choices, sizes: _Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return room for the outputs and the state."""
    batch, heads, width = sequence.shape[0], sizes.heads, sizes.head_width
    return (
        sequence.new_empty(sequence.shape),
        sequence.new_empty(batch, heads, choices.angles, dtype=wide_dtype(sequence.device)),
        sequence.new_empty(batch, heads, width, sizes.state_size, dtype=compute_dtype(sequence.dtype)),
        sequence.new_empty(batch, sizes.rank, heads, sizes.state_size),
        sequence.new_empty(batch, heads, width),
    )


def _by_library(
    library: Library,
    sizes: _Sizes,
    sequence: Tensor,
    states: Mamba3States,
    choices: Mamba3Choices,
    parameters: Mamba3Parameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the step in one call of the native library."""
    found = _new_tensors(sequence, choices, sizes)
    named: dict[str, Tensor | None] = parameters._asdict()
    # The structure's names: of the matrices' norms, and of the norm of a head's outputs.
    named["head_norm_weight"] = named.pop("output_norm_weight")
    named["input_norm_weight"] = named.pop("input_matrix_norm_weight")
    named["output_norm_weight"] = named.pop("output_matrix_norm_weight")
    dual_step(
        library, sequence, named, dict(zip(_STATES, states, strict=True)), found,
        projected_width=parameters.input_weight.shape[0], inner_width=sizes.inner_width, state_size=sizes.state_size,
        heads=sizes.heads, groups=choices.groups, rank=sizes.rank, angles=choices.angles, is_mamba3=True,
        is_trapezoidal=choices.trapezoidal, epsilon=choices.epsilon, inner_epsilon=choices.matrix_epsilon,
        output_epsilon=choices.output_epsilon,
    )  # fmt: skip
    return found


def by_operators(
    sequence: Tensor, states: Mamba3States, choices: Mamba3Choices, parameters: Mamba3Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the step by the mixer's own operators: the definition, and the fallback."""
    of = parameters
    (heads, rank, state_size), inner = of.input_matrix_bias.shape, of.output_weight.shape[1]
    with torch.device("meta"):
        # Its projections, which are computed here, have no part in `mix`. The half state is against rounding.
        mixer = Mamba3Mixer(
            1, state_size, inner // heads, expansion=inner, groups=choices.groups,
            rotated_share=min(1.0, (2 * choices.angles + 0.5) / state_size) if choices.angles else 0.0,
            trapezoidal=choices.trapezoidal, rank=rank, output_norm=of.output_norm_weight is not None,
        )  # fmt: skip
    with_parameters(
        mixer,
        {
            "step_bias": of.step_bias,
            "input_matrix_norm.weight": of.input_matrix_norm_weight,
            "output_matrix_norm.weight": of.output_matrix_norm_weight,
            "input_matrix_bias": of.input_matrix_bias,
            "output_matrix_bias": of.output_matrix_bias,
            "rank_inputs": of.rank_inputs,
            "rank_gates": of.rank_gates,
            "rank_outputs": of.rank_outputs,
            "skip_weight": of.skip_weight,
            "output_norm_weight": of.output_norm_weight,
        },
    )
    mixer.input_matrix_norm.epsilon = mixer.output_matrix_norm.epsilon = choices.matrix_epsilon
    mixer.output_norm_epsilon = choices.output_epsilon
    empty = _new_tensors(sequence, choices, _Sizes(inner, heads, rank, state_size))
    outputs, *after = by_mixer(mixer, Mamba3State, sequence, of, choices.epsilon, states, empty)
    return outputs, after[0], after[1], after[2], after[3]
