"""One position through a residual selective block in one native call: what generation is made of.

Operator by operator, PyTorch takes ten times longer to call for a single position than the arithmetic does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mambacore.backends import ELEMENT_TYPES, native_library_for
from mambacore.layers.selective import SelectiveMixer, SelectiveState
from mambacore.native.library import BlockStep, Library

if TYPE_CHECKING:
    from mambacore.layers.stack import ResidualBlock

# From this many sequences on, matrix products of the whole batch are faster than one sequence after the other.
FEWEST_FOR_MATRIX_PRODUCTS = 8
STEP_DTYPES = (torch.float32, torch.float64)


class PreparedStep:
    """A block's parameters as the library wants them, good for as long as the block keeps its parameters in place."""

    def __init__(self, block: ResidualBlock) -> None:
        self.parameters = _parameters(block)
        self.pointers = [parameter.data_ptr() for parameter in self.parameters.values()]
        mixer = block.mixer
        assert isinstance(mixer, SelectiveMixer)
        self.inner_width, self.kernel_width = mixer.convolution_weight.shape
        self.state_size, self.dtype = mixer.state_size, mixer.convolution_weight.dtype
        self.state_dtype = self.dtype.to_complex() if mixer.complex_state else self.dtype
        self.fits = self.dtype in STEP_DTYPES and all(
            parameter.dtype == self.dtype and parameter.is_contiguous() and parameter.device.type == "cpu"
            for parameter in self.parameters.values()
        )
        self.structure = BlockStep(
            model_width=block.norm.weight.shape[0], inner_width=self.inner_width, state_size=self.state_size,
            kernel_width=self.kernel_width, step_rank=mixer.step_rank, epsilon=block.norm.epsilon,
            element=ELEMENT_TYPES.get(self.dtype, 0), **dict(zip(self.parameters, self.pointers, strict=True)),
        )  # fmt: skip

    def still_holds(self, block: ResidualBlock) -> bool:
        """Whether the block's parameters are the same tensors, at the same place, as when this was prepared."""
        now = _parameters(block)
        return now.keys() == self.parameters.keys() and self.pointers == [
            parameter.data_ptr() if parameter is known else None
            for parameter, known in zip(now.values(), self.parameters.values(), strict=True)
        ]


# Beside the blocks rather than in them, so that blocks can be copied and sent to other processes.
_prepared: WeakKeyDictionary[ResidualBlock, PreparedStep] = WeakKeyDictionary()


def step_library(block: ResidualBlock, sequence: Tensor) -> Library | None:
    """The native library when it can take this (batch, 1, model_width) sequence through the block, else None."""
    if torch.is_grad_enabled() or sequence.shape[1] != 1 or not 0 < sequence.shape[0] < FEWEST_FOR_MATRIX_PRODUCTS:
        return None
    if torch.compiler.is_compiling() or type(block.mixer) is not SelectiveMixer or torch.is_autocast_enabled("cpu"):
        return None
    prepared = _prepared.get(block)
    if prepared is None or not prepared.still_holds(block):
        _prepared[block] = prepared = PreparedStep(block)
    fits = prepared.fits and sequence.dtype == prepared.dtype
    return native_library_for(sequence) if fits else None


def step_block(
    library: Library, block: ResidualBlock, sequence: Tensor, state: SelectiveState | None
) -> tuple[Tensor, SelectiveState]:
    """As ``block(sequence, state)`` for a sequence (batch, 1, model_width), without gradients."""
    prepared, batch = _prepared[block], sequence.shape[0]
    sequence, outputs = sequence.contiguous(), torch.empty_like(sequence, memory_format=torch.contiguous_format)
    convolution_state = sequence.new_empty(batch, prepared.kernel_width - 1, prepared.inner_width)
    scan_state = sequence.new_empty(batch, prepared.inner_width, prepared.state_size, dtype=prepared.state_dtype)
    step = BlockStep.from_buffer_copy(prepared.structure)
    step.batch, step.threads = batch, torch.get_num_threads()
    step.sequence, step.outputs = sequence.data_ptr(), outputs.data_ptr()
    step.new_convolution_state, step.new_scan_state = convolution_state.data_ptr(), scan_state.data_ptr()
    if state is not None:
        before = state.convolution.to(prepared.dtype).contiguous()
        held = state.scan.to(prepared.state_dtype).resolve_conj().contiguous()
        step.convolution_state, step.scan_state = before.data_ptr(), held.data_ptr()
    library.block_step(step)
    return outputs, SelectiveState(convolution_state, scan_state)


def _parameters(block: ResidualBlock) -> dict[str, Tensor]:
    """The parameters that are there, under the library's names for them."""
    mixer = block.mixer
    assert isinstance(mixer, SelectiveMixer)
    own, come, go = mixer._parameters, mixer.input_projection._parameters, mixer.output_projection._parameters
    named = {
        "norm_weight": block.norm.weight,
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
