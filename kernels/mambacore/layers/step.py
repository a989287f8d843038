"""One position through a residual selective block in few calls: what generation is made of.

Operator by operator, PyTorch takes ten times longer to call for a single position than the arithmetic does. On a CPU
the native library takes the whole block in one call. On a GPU two kernels take all that lies between the projections,
which stay with PyTorch; the states may be overwritten, so that a captured CUDA graph holds the whole step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mambacore.backends import ELEMENT_TYPES, native_library_for, state_dtype, triton_computes, wanted_backend
from mambacore.native_library import BlockStep, Library

if TYPE_CHECKING:
    from mambacore.layers.norm import RootMeanSquareNorm
    from mambacore.layers.selective import SelectiveMixer, SelectiveState

# From this many sequences on, matrix products of the whole batch are faster than one sequence after the other.
FEWEST_FOR_MATRIX_PRODUCTS = 8
STEP_DTYPES = (torch.float32, torch.float64)


class PreparedStep:
    """A block's parameters as the library wants them, good for as long as the block keeps its parameters in place."""

    def __init__(self, norm: RootMeanSquareNorm, mixer: SelectiveMixer) -> None:
        self.parameters = _parameters(norm, mixer)
        self.pointers = [parameter.data_ptr() for parameter in self.parameters.values()]
        self.inner_width, self.kernel_width = mixer.convolution_weight.shape
        self.state_size, self.dtype = mixer.state_size, mixer.convolution_weight.dtype
        self.state_dtype = self.dtype.to_complex() if mixer.complex_state else self.dtype
        self.fits = self.dtype in STEP_DTYPES and all(
            parameter.dtype == self.dtype and parameter.is_contiguous() and parameter.device.type == "cpu"
            for parameter in self.parameters.values()
        )
        self.structure = BlockStep(
            model_width=norm.weight.shape[0], inner_width=self.inner_width, state_size=self.state_size,
            kernel_width=self.kernel_width, step_rank=mixer.step_rank,
            element=ELEMENT_TYPES.get(self.dtype, 0), **dict(zip(self.parameters, self.pointers, strict=True)),
        )  # fmt: skip

    def still_holds(self, norm: RootMeanSquareNorm, mixer: SelectiveMixer) -> bool:
        """Whether the block's parameters are the same tensors, at the same place, as when this was prepared."""
        now = _parameters(norm, mixer)
        return now.keys() == self.parameters.keys() and self.pointers == [
            parameter.data_ptr() if parameter is known else None
            for parameter, known in zip(now.values(), self.parameters.values(), strict=True)
        ]


# Beside the mixers rather than in them, so that these can be copied and sent to other processes.
_prepared: WeakKeyDictionary[SelectiveMixer, PreparedStep] = WeakKeyDictionary()


def step_library(norm: RootMeanSquareNorm, mixer: SelectiveMixer, sequence: Tensor) -> Library | None:
    """The native library when it can take this (batch, 1, model_width) sequence through the block, else None."""
    if torch.is_grad_enabled() or sequence.shape[1] != 1 or not 0 < sequence.shape[0] < FEWEST_FOR_MATRIX_PRODUCTS:
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    prepared = _prepared.get(mixer)
    if prepared is None or not prepared.still_holds(norm, mixer):
        _prepared[mixer] = prepared = PreparedStep(norm, mixer)
    fits = prepared.fits and sequence.dtype == prepared.dtype and wanted_backend() != "triton"
    return native_library_for(sequence) if fits else None


def step_block(
    library: Library, norm: RootMeanSquareNorm, mixer: SelectiveMixer, sequence: Tensor, state: SelectiveState | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`sequence + mixer(norm(sequence), state)` for a sequence (batch, 1, model_width), without gradients.

    Returns:
        The outputs, and the states of the convolution and of the scan.
    """
    prepared, batch = _prepared[mixer], sequence.shape[0]
    sequence, outputs = sequence.contiguous(), torch.empty_like(sequence, memory_format=torch.contiguous_format)
    convolution_state = sequence.new_empty(batch, prepared.kernel_width - 1, prepared.inner_width)
    scan_state = sequence.new_empty(batch, prepared.inner_width, prepared.state_size, dtype=prepared.state_dtype)
    step = BlockStep.from_buffer_copy(prepared.structure)
    step.batch, step.threads, step.epsilon = batch, torch.get_num_threads(), norm.epsilon
    step.sequence, step.outputs = sequence.data_ptr(), outputs.data_ptr()
    step.new_convolution_state, step.new_scan_state = convolution_state.data_ptr(), scan_state.data_ptr()
    if state is not None:
        before = state.convolution.to(prepared.dtype).contiguous()
        held = state.scan.to(prepared.state_dtype).resolve_conj().contiguous()
        step.convolution_state, step.scan_state = before.data_ptr(), held.data_ptr()
    library.block_step(step)
    return outputs, convolution_state, scan_state


_in_place: ContextVar[bool] = ContextVar("mambacore_states_in_place", default=False)


@contextlib.contextmanager
def states_in_place() -> Iterator[None]:
    """Inside, a step on a GPU writes its new states over those that it is given, and hands the same tensors on.

    A graph captured like this goes on from where its last replay ended. Steps that go another way hand on new tensors,
    as always (`SelectiveState` says of which shape): compare with `is`.
    """
    token = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(token)


def steps_on_device(sequence: Tensor) -> bool:
    """Whether the GPU's kernels take this (batch, 1, model_width) sequence through the block."""
    if torch.is_grad_enabled() or sequence.shape[1] != 1 or sequence.shape[0] == 0:
        return False
    # Only plain tensors have memory to give to a kernel; a tracer's have none.
    if type(sequence) is not Tensor or torch.compiler.is_compiling():
        return False
    return triton_computes(sequence)


def step_on_device(
    norm: RootMeanSquareNorm, mixer: SelectiveMixer, sequence: Tensor, state: SelectiveState | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `step_block`, on a GPU."""
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
    """The old state as kernels read it, and where the new one goes."""
    if state is None:
        return None, torch.empty(shape, dtype=dtype, device=device)
    if tuple(state.shape) != shape:
        raise ValueError(
            f"the state must have shape {shape} to fit the block and the batch but has {tuple(state.shape)}"
        )
    before = state.to(dtype).resolve_conj().contiguous()
    return before, before if before is state and _in_place.get() else torch.empty_like(before)


def _parameters(norm: RootMeanSquareNorm, mixer: SelectiveMixer) -> dict[str, Tensor]:
    """The parameters that are there, under the library's names for them."""
    own, come, go = mixer._parameters, mixer.input_projection._parameters, mixer.output_projection._parameters
    named = {
        "norm_weight": norm.weight,
        "input_weight": come["weight"],
        "input_bias": come["bias"],
        "convolution_weight": own["convolution_weight"],
        "convolution_bias": mixer.convolution_bias,
        "selection_weight": mixer.selection_projection.weight,
        "step_weight": mixer.step_projection.weight,
        "step_bias": own["step_bias"],
        "log_decay_rate": own["log_decay_rate"],
        "frequency": mixer.frequency,
        "skip_weight": own["skip_weight"],
        "output_weight": go["weight"],
        "output_bias": go["bias"],
    }
    return {name: parameter for name, parameter in named.items() if parameter is not None}
