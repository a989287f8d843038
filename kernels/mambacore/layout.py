"""Memory layout of the operators' tensors, shared by the fallback, the native library and Triton.

**Intervals.** A scan processes a sequence in intervals and keeps for backward only the state before each of them, the
boundary states, from which backward recomputes an interval.

**Numbers.** Kernels read states as real numbers with contiguous channels: (..., numbers, channels), where the numbers
of a complex state alternate between real and imaginary parts.

**Segments.** To parallelise over one sequence, a scan is cut into segments (native library) or chunks (Triton). Each is
an affine map of the incoming state, h -> exp(A * sum of Delta) h + s, where s is the final state from a zero initial
state. The summary of a segment is s and the sum of Delta; a record that begins inside drops the first term. For a
complex state the sum is kept in double precision, because its phase goes through thousands of full turns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Positions from one boundary state to the next on a CPU: they take state_size / 64 of the inputs' memory, and what one
# interval needs for backward stays in a processor's cache.
INTERVAL = 64
# The same in the GPU's kernels, where backward keeps an interval's states in registers.
DEVICE_INTERVAL = 16


def interval_bounds(length: int) -> list[tuple[int, int]]:
    """Return start and end, in scan order, of every interval on a CPU."""
    return [(begin, min(begin + INTERVAL, length)) for begin in range(0, length, INTERVAL)]


def boundary_shape(
    batch: int, length: int, channels: int, state_size: int, is_complex: bool, interval: int = INTERVAL
) -> tuple[int, int, int, int]:
    """Return the shape of the boundary states: (batch, intervals, numbers, channels)."""
    intervals = (length + interval - 1) // interval
    return batch, intervals, (2 if is_complex else 1) * state_size, channels


def as_numbers(states: Tensor) -> Tensor:
    """Convert real or complex (..., channels, state_size) to (..., numbers, channels)."""
    states = states.resolve_conj()
    pairs = torch.view_as_real(states).flatten(-2) if states.is_complex() else states
    return pairs.transpose(-1, -2).contiguous()


def as_states(numbers: Tensor, is_complex: bool) -> Tensor:
    """Inverse of `as_numbers`."""
    pairs = numbers.transpose(-1, -2).contiguous()
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2))) if is_complex else pairs


def channels_contiguous(sequence: Tensor) -> Tensor:
    """Return the tensor if its last dimension is contiguous, else a copy, as required by all kernels."""
    return sequence if sequence.stride(-1) == 1 or sequence.shape[-1] == 1 else sequence.contiguous()


def states_contiguous(matrix: Tensor) -> Tensor:
    """An input or output matrix with contiguous states; one that does not depend on time is contiguous altogether."""
    matrix = matrix.resolve_conj()
    return matrix.contiguous() if matrix.dim() == 2 else channels_contiguous(matrix)


def optional_contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor of real numbers, or None."""
    return None if tensor is None else tensor.resolve_conj().contiguous()


def sequence_strides(sequence: Tensor | None) -> tuple[int, int]:
    """Return strides (batch, row) of a (batch, length, channels) tensor, in elements; zeros if absent."""
    return (0, 0) if sequence is None else (sequence.stride(0), sequence.stride(1))


def matrix_strides(matrix: Tensor) -> tuple[int, int, int]:
    """Strides (batch, row, group) of a (batch, length, groups, state_size) tensor in real numbers; zeros when fixed."""
    if matrix.dim() == 2:
        return 0, 0, 0
    numbers = 2 if matrix.is_complex() else 1
    batch, row, group = matrix.stride()[:3]
    return numbers * batch, numbers * row, numbers * group


def group_count(*matrices: Tensor) -> int:
    """Return the number of groups of channels that share a row of the matrices; 1 if none depends on time."""
    return max(matrix.shape[2] if matrix.dim() == 4 else 1 for matrix in matrices)


def segments_without_reset(resets: Tensor, segments: int, segment_length: int, reverse: bool) -> Tensor:
    """Return (batch, segments), uint8, 1 if no record begins in a segment, so the incoming state reaches its end.

    Args:
        resets: (batch, length), uint8, nonzero where the state that arrives counts as zero.
        segments: number of segments.
        segment_length: positions in each but the last.
        reverse: segments are ordered from the last position to the first.
    """
    ordered = resets.flip(1) if reverse else resets
    filled = F.pad(ordered, (0, segments * segment_length - resets.shape[1]))
    return (filled.unflatten(1, (segments, segment_length)).amax(2) == 0).to(torch.uint8)


def sum_of_parts(parts: Tensor) -> Tensor:
    """Sum the partial results of tasks in a fixed order; a single part is returned unchanged."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
