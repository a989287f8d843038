"""Many positions through a residual selective block in one call of the native library, without gradients.

    inputs, gate = projection(norm(sequence))
    outputs = sequence + output_projection(scan(silu(convolution(inputs))) * silu(gate))

Operator by operator every intermediate tensor goes through memory, and the calls cost as much as some hundred
positions. The native library takes a few positions at a time through the whole block instead
(kernels/native/block_kernel.cpp). Under autocast, products take bfloat16 numbers, as those of the operators do;
everything between them stays in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambacore.backends import native_library_for, wanted_backend
from mambacore.layers.plain_modules import is_plain_tensor
from mambacore.layers.step import SelectiveParts, StepParameters, laid_out, parameters_of
from mambacore.native_library import Block, Library

if TYPE_CHECKING:
    from mambacore.layers.norm import RootMeanSquareNorm

# Threads take whole sequences of the batch, so some may wait. Operators share out one sequence; this makes up for less.
_LARGEST_SHARE_WAITING = 0.5


def run_block(
    norm: RootMeanSquareNorm, mixer: SelectiveParts, sequence: Tensor, state: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute `sequence + mixer(norm(sequence), state)` for a plain block.

    Args:
        norm: the norm before the mixer.
        mixer: a mixer with plain layers.
        sequence: (batch, length, model_width).
        state: that of the mixer, of fitting shapes, or None.

    Returns:
        The outputs, and the states of the convolution and of the scan, float32; None to call the operators.
    """
    library = _library_for(mixer, sequence)
    if library is None:
        return None
    parameters = parameters_of(norm, mixer)
    if any(
        parameter is not None
        and (parameter.dtype != torch.float32 or parameter.device != sequence.device or not is_plain_tensor(parameter))
        for parameter in parameters
    ):
        return None
    convolution_state, scan_state = (None, None) if state is None else state
    return _run(library, sequence, convolution_state, scan_state, norm.epsilon, parameters)


def _library_for(mixer: SelectiveParts, sequence: Tensor) -> Library | None:
    """Return the native library if it is to compute a block of this mixer, else None."""
    if torch.is_grad_enabled() or mixer.complex_state or sequence.dtype != torch.float32 or sequence.numel() == 0:
        return None
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return None
    batch, threads = sequence.shape[0], torch.get_num_threads()
    if batch < (1 - _LARGEST_SHARE_WAITING) * threads * -(-batch // threads):
        return None
    library = None if wanted_backend() == "triton" else native_library_for(sequence)
    return library if library is not None and library.has_block_forward else None


def _run(
    library: Library,
    sequence: Tensor,
    convolution_state: Tensor | None,
    scan_state: Tensor | None,
    epsilon: float,
    parameters: StepParameters,
) -> tuple[Tensor, Tensor, Tensor]:
    sequence = sequence if sequence.stride(2) == 1 else sequence.contiguous()
    tensors, found = laid_out(sequence, convolution_state, scan_state, parameters)
    del tensors[StepParameters._fields.index("frequency")]  # of a real state there is none
    library.block_forward(
        Block(
            *sequence.shape, *parameters.sizes(), *sequence.stride()[:2], torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(), epsilon, *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        )
    )  # fmt: skip
    return found
