"""One position through a residual selective block in a single operator, for generation.

    inputs, gate = projection(norm(sequence))
    outputs = sequence + output_projection(scan(silu(convolution(inputs))) * silu(gate))

For a single position, calling PyTorch's operators takes ten times longer than the arithmetic.
`mambacore::selective_step` does everything: on a CPU in one call of the native library (kernels/native/selective.h,
also used by step programs), elsewhere operator by operator. On a GPU, blocks bypass it: two kernels compute everything
between the projections, which stay in PyTorch, and states may be overwritten, so that a captured CUDA graph contains
the whole step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.backends import (
    ELEMENT_TYPES,
    compute_dtype,
    native_library_for,
    state_dtype,
    triton_computes,
    wanted_backend,
)
from mambacore.convolution import causal_convolution
from mambacore.layers.norm import root_mean_square_norm
from mambacore.layers.plain_modules import parameter_of
from mambacore.layers.step_operator import check_step, define_step, schema_of, steps_in_library
from mambacore.native_library import BlockStep, Library
from mambacore.scan import selective_scan

if TYPE_CHECKING:
    from mambacore.layers.norm import RootMeanSquareNorm


class StepParameters(NamedTuple):
    """The parameters of a block in the layout of its modules, all of one dtype."""

    norm_weight: Tensor  # (model_width,)
    input_weight: Tensor  # (2 * inner_width, model_width)
    input_bias: Tensor | None  # (2 * inner_width,)
    convolution_weight: Tensor  # (inner_width, kernel_width)
    convolution_bias: Tensor | None  # (inner_width,)
    selection_weight: Tensor  # (step_rank + 2 * numbers, inner_width), complex numbers being pairs
    step_weight: Tensor  # (inner_width, step_rank)
    step_bias: Tensor  # (inner_width,)
    log_decay_rate: Tensor  # (inner_width, state_size)
    frequency: Tensor | None  # (inner_width, state_size); None for a real state
    skip_weight: Tensor  # (inner_width,)
    output_weight: Tensor  # (model_width, inner_width)
    output_bias: Tensor | None  # (model_width,)

    def sizes(self) -> tuple[int, int, int, int]:
        """Return inner_width, state_size, kernel_width and step_rank."""
        inner_width, kernel_width = self.convolution_weight.shape
        return inner_width, self.log_decay_rate.shape[1], kernel_width, self.step_weight.shape[1]

    def fitting_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shape that each must have, by the sizes of the first parameter that has each size."""
        model_width, inner_width = self.norm_weight.shape[0], self.skip_weight.shape[0]
        state_size = self.log_decay_rate.shape[-1]
        numbers, rank = state_size * (1 if self.frequency is None else 2), self.step_weight.shape[-1]
        return (
            (model_width,), (2 * inner_width, model_width), (2 * inner_width,),
            (inner_width, self.convolution_weight.shape[-1]), (inner_width,), (rank + 2 * numbers, inner_width),
            (inner_width, rank), (inner_width,), (inner_width, state_size), (inner_width, state_size), (inner_width,),
            (model_width, inner_width), (model_width,),
        )  # fmt: skip


_STATES = ("convolution_state", "scan_state")
_OPTIONAL = ("input_bias", "convolution_bias", "frequency", "output_bias")


def selective_step(
    sequence: Tensor,
    convolution_state: Tensor | None,
    scan_state: Tensor | None,
    epsilon: float,
    parameters: StepParameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one position of a residual selective block, without gradients.

    Args:
        sequence: (batch, 1, model_width), of the parameters' dtype.
        convolution_state: (batch, kernel_width - 1, inner_width), the inputs of the convolution before this position;
            zeros if absent.
        scan_state: (batch, inner_width, state_size), float32 or float64, or complex numbers of these; zeros if absent.
        epsilon: epsilon of the norm.
        parameters: parameters of the block.

    Returns:
        The outputs, in the shape of `sequence`, and the two states after this position.

    Raises:
        ValueError: if shapes do not match, or tensors are on different devices.
        TypeError: if a dtype is not supported, or parameters have several dtypes.
        RuntimeError: if gradients are enabled and one of the tensors requires one.
    """
    return torch.ops.mambacore.selective_step.default(sequence, convolution_state, scan_state, epsilon, *parameters)


def _step(sequence, convolution_state, scan_state, epsilon, *given):
    parameters = StepParameters(*given)
    _check(sequence, convolution_state, scan_state, parameters)
    library = None if wanted_backend() == "triton" else native_library_for(sequence)
    arguments = (sequence, convolution_state, scan_state, epsilon, parameters)
    return by_operators(*arguments) if library is None else _by_library(library, *arguments)


def _step_fake(sequence, convolution_state, scan_state, epsilon, *given):
    parameters = StepParameters(*given)
    _check(sequence, convolution_state, scan_state, parameters)
    return _new_tensors(sequence, parameters)


_library = define_step(
    "selective_step",
    "(Tensor sequence, Tensor? convolution_state, Tensor? scan_state, float epsilon, "
    f"{schema_of(StepParameters, _OPTIONAL)}) -> (Tensor, Tensor, Tensor)",
    _step,
    _step_fake,
)


def _check(
    sequence: Tensor, convolution_state: Tensor | None, scan_state: Tensor | None, parameters: StepParameters
) -> None:
    """Check the arguments."""
    wanted = parameters.fitting_shapes()
    batch, (inner_width, state_size) = sequence.shape[0], wanted[8]
    check_step(
        sequence, parameters, wanted, (convolution_state, scan_state),
        ((batch, wanted[3][1] - 1, inner_width), (batch, inner_width, state_size)), _STATES,
    )  # fmt: skip
    if scan_state is not None and scan_state.is_complex() and parameters.frequency is None:
        raise TypeError("scan_state is complex but the block has no frequency; pass the state of the same block")


def _new_tensors(sequence: Tensor, parameters: StepParameters) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the outputs and the two states."""
    inner_width, kernel_width = parameters.convolution_weight.shape
    batch, of_state = sequence.shape[0], state_dtype(sequence.dtype, parameters.frequency is not None)
    return (
        sequence.new_empty(sequence.shape),
        sequence.new_empty(batch, kernel_width - 1, inner_width),
        sequence.new_empty(batch, *parameters.log_decay_rate.shape, dtype=of_state),
    )


def laid_out(
    sequence: Tensor, convolution_state: Tensor | None, scan_state: Tensor | None, parameters: StepParameters
) -> tuple[list[Tensor | None], tuple[Tensor, Tensor, Tensor]]:
    """Return all tensors of a call of the native library in its order, for one position or many, and those it writes.

    They are the parameters, the sequence as it is, the states before it, and, new, the outputs and the states after it.
    """
    found = _new_tensors(sequence, parameters)
    kept = [None if parameter is None else parameter.contiguous() for parameter in parameters]
    before = None if convolution_state is None else convolution_state.to(sequence.dtype).contiguous()
    held = None if scan_state is None else scan_state.to(found[2].dtype).resolve_conj().contiguous()
    return [*kept, sequence, before, held, *found], found


def _by_library(
    library: Library,
    sequence: Tensor,
    convolution_state: Tensor | None,
    scan_state: Tensor | None,
    epsilon: float,
    parameters: StepParameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step in one call of the native library."""
    tensors, found = laid_out(sequence.contiguous(), convolution_state, scan_state, parameters)
    library.block_step(
        BlockStep(
            *sequence.shape[::2], *parameters.sizes(), ELEMENT_TYPES[sequence.dtype], torch.get_num_threads(), epsilon,
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        )
    )  # fmt: skip
    return found


def by_operators(
    sequence: Tensor,
    convolution_state: Tensor | None,
    scan_state: Tensor | None,
    epsilon: float,
    parameters: StepParameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step operator by operator: the definition, and the fallback."""
    of = parameters
    normalised = root_mean_square_norm(sequence, of.norm_weight, epsilon)
    inputs, gate = F.linear(normalised, of.input_weight, of.input_bias).chunk(2, dim=-1)
    inputs, new_convolution_state = causal_convolution(
        inputs, of.convolution_weight, of.convolution_bias, silu=True, initial_state=convolution_state,
        return_final_state=True,
    )  # fmt: skip
    dtype, rank = compute_dtype(sequence.dtype), of.step_weight.shape[1]
    state_matrix = -torch.exp(of.log_decay_rate.to(dtype))
    selected = F.linear(inputs, of.selection_weight)
    input_matrix, output_matrix = selected[..., rank:].to(dtype).chunk(2, dim=-1)
    if of.frequency is not None:
        state_matrix = torch.complex(state_matrix, of.frequency.to(dtype))
        input_matrix, output_matrix = (
            torch.view_as_complex(matrix.unflatten(-1, (-1, 2)).contiguous())
            for matrix in (input_matrix, output_matrix)
        )
    outputs, new_scan_state = selective_scan(
        inputs, F.linear(selected[..., :rank], of.step_weight), state_matrix, input_matrix, output_matrix,
        of.skip_weight, gate, of.step_bias, step_softplus=True, initial_state=scan_state, return_final_state=True,
    )  # fmt: skip
    return sequence + F.linear(outputs, of.output_weight, of.output_bias), new_convolution_state, new_scan_state


class SelectiveParts(Protocol):
    """The attributes of a `mambacore.layers.SelectiveMixer` that a step uses; it has the same state."""

    input_projection: Any
    convolution_weight: Any
    convolution_bias: Any
    selection_projection: Any
    step_projection: Any
    output_projection: Any
    log_decay_rate: Any
    frequency: Any
    skip_weight: Any
    step_bias: Any
    inner_width: int
    step_rank: int
    state_size: int
    complex_state: bool
    _parameters: Any


def parameters_of(norm: RootMeanSquareNorm, mixer: SelectiveParts) -> StepParameters:
    """Return the parameters of a block with plain modules (`mambacore.layers.plain_modules`)."""
    come, go = mixer.input_projection, mixer.output_projection
    found = (
        parameter_of(norm, "weight"),
        parameter_of(come, "weight"),
        parameter_of(come, "bias"),
        parameter_of(mixer, "convolution_weight"),
        mixer.convolution_bias,
        parameter_of(mixer.selection_projection, "weight"),
        parameter_of(mixer.step_projection, "weight"),
        parameter_of(mixer, "step_bias"),
        parameter_of(mixer, "log_decay_rate"),
        mixer.frequency,
        parameter_of(mixer, "skip_weight"),
        parameter_of(go, "weight"),
        parameter_of(go, "bias"),
    )
    return StepParameters._make(found)  # the modules ensure which of them may be absent


def step_block(
    norm: RootMeanSquareNorm, mixer: SelectiveParts, sequence: Tensor, state: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute `sequence + mixer(norm(sequence), state)` for a plain block and a sequence (batch, 1, model_width).

    Returns:
        The outputs, and the states of the convolution and of the scan; None if the operators have to be called.
    """
    if steps_on_device(sequence):
        return step_on_device(norm, mixer, sequence, state)
    parameters = parameters_of(norm, mixer)
    if not steps_in_library(sequence, parameters):
        return None
    convolution_state, scan_state = (None, None) if state is None else state
    return selective_step(sequence, convolution_state, scan_state, norm.epsilon, parameters)


_in_place: ContextVar[bool] = ContextVar("mambacore_states_in_place", default=False)


@contextlib.contextmanager
def states_in_place() -> Iterator[None]:
    """Inside the block, a step on a GPU overwrites the given states and returns the same tensors.

    A graph captured this way continues from where its last replay ended. Steps that take another path return new
    tensors as usual (of the shapes in `SelectiveState`): compare with `is`.
    """
    token = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(token)


def steps_on_device(sequence: Tensor) -> bool:
    """Return whether the GPU kernels support this (batch, 1, model_width) sequence."""
    if torch.is_grad_enabled() or sequence.shape[1] != 1 or sequence.shape[0] == 0:
        return False
    # Only plain tensors have memory for a kernel; those of a tracer do not.
    if type(sequence) is not Tensor or torch.compiler.is_compiling():
        return False
    return triton_computes(sequence)


def step_on_device(
    norm: RootMeanSquareNorm, mixer: SelectiveParts, sequence: Tensor, state: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `step_block` on a GPU."""
    from mambacore.layers import triton_step as step  # noqa: PLC0415  only where there is Triton

    inputs, gate = mixer.input_projection(norm(sequence)).squeeze(1).chunk(2, dim=-1)
    batch, kernel_width = inputs.shape[0], mixer.convolution_weight.shape[1]
    shape = (batch, kernel_width - 1, mixer.inner_width)
    before, after = _states(None if state is None else state.convolution, shape, inputs.dtype, inputs.device)
    inputs = step.convolve(inputs, mixer.convolution_weight.contiguous(), mixer.convolution_bias, before, after)
    selected = mixer.selection_projection(inputs)
    step_size = mixer.step_projection(selected[:, : mixer.step_rank])
    dtype = state_dtype(inputs.dtype, mixer.complex_state)
    shape = (batch, mixer.inner_width, mixer.state_size)
    held, new = _states(None if state is None else state.scan, shape, dtype, inputs.device)
    frequency = None if mixer.frequency is None else mixer.frequency.contiguous()
    outputs = step.advance(
        inputs, gate, step_size.contiguous(), selected[:, mixer.step_rank :], mixer.log_decay_rate.contiguous(),
        frequency, mixer.skip_weight, mixer.step_bias, held, new,
    )  # fmt: skip
    return sequence + mixer.output_projection(outputs).unsqueeze(1), after, new


def _states(
    state: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Return the old state in the kernels' layout, and a buffer for the new one."""
    if state is None:
        return None, torch.empty(shape, dtype=dtype, device=device)
    if tuple(state.shape) != shape:
        raise ValueError(
            f"the state must have shape {shape} to fit the block and the batch but has {tuple(state.shape)}"
        )
    before = state.to(dtype).resolve_conj().contiguous()
    return before, before if before is state and _in_place.get() else torch.empty_like(before)
