"""How the tensors of the operators lie in memory: one description for the fallback, the native library and Triton.

**Intervals.** A scan walks a sequence in intervals and keeps nothing for backward but the state before each of them,
the boundary states, from which backward computes an interval again.

**Numbers.** Kernels read states as real numbers with neighbouring channels side by side: (..., numbers, channels),
where the numbers of a complex state are its real and imaginary parts in turn.

**Segments.** To share one sequence out, a scan is cut into segments (of the native library) or chunks (of Triton). Each
is an affine map of the state that comes in, h -> exp(A * sum of Delta) h + s, where s is the state that it makes out of
zero. The summary of a segment is s and the sum of Delta; a record that begins inside drops the first term. Of a complex
state the sum is kept in double precision, because it turns by thousands of whole turns, which do not count.
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
    """Begin and end, in scan order, of every interval on a CPU."""
    return [(begin, min(begin + INTERVAL, length)) for begin in range(0, length, INTERVAL)]


def boundary_shape(
    batch: int, length: int, channels: int, state_size: int, is_complex: bool, interval: int = INTERVAL
) -> tuple[int, int, int, int]:
    """Shape of the boundary states: (batch, intervals, numbers, channels)."""
    intervals = (length + interval - 1) // interval
    return batch, intervals, (2 if is_complex else 1) * state_size, channels


def as_numbers(states: Tensor) -> Tensor:
    """(..., channels, state_size), real or complex, as (..., numbers, channels)."""
    states = states.resolve_conj()
    pairs = torch.view_as_real(states).flatten(-2) if states.is_complex() else states
    return pairs.transpose(-1, -2).contiguous()


def as_states(numbers: Tensor, is_complex: bool) -> Tensor:
    """The inverse of `as_numbers`."""
    pairs = numbers.transpose(-1, -2).contiguous()
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2))) if is_complex else pairs


def channels_contiguous(sequence: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else a copy: every kernel relies on it."""
    return sequence if sequence.stride(-1) == 1 or sequence.shape[-1] == 1 else sequence.contiguous()


def states_contiguous(matrix: Tensor) -> Tensor:
    """An input or output matrix with contiguous states; one that does not depend on time is contiguous altogether."""
    matrix = matrix.resolve_conj()
    return matrix.contiguous() if matrix.dim() == 2 else channels_contiguous(matrix)


def optional_contiguous(tensor: Tensor | None) -> Tensor | None:
    """A contiguous tensor of plain numbers, or None."""
    return None if tensor is None else tensor.resolve_conj().contiguous()


def sequence_strides(sequence: Tensor | None) -> tuple[int, int]:
    """Strides (batch, row) of a (batch, length, channels) tensor, in elements; zeros when it is absent."""
    return (0, 0) if sequence is None else (sequence.stride(0), sequence.stride(1))


def matrix_strides(matrix: Tensor) -> tuple[int, int, int]:
    """Strides (batch, row, group) of a (batch, length, groups, state_size) tensor in real numbers; zeros when fixed."""
    if matrix.dim() == 2:
        return 0, 0, 0
    numbers = 2 if matrix.is_complex() else 1
    batch, row, group = matrix.stride()[:3]
    return numbers * batch, numbers * row, numbers * group


def group_count(*matrices: Tensor) -> int:
    """Groups of channels that share a row of the matrices; 1 when none depends on time."""
    return max(matrix.shape[2] if matrix.dim() == 4 else 1 for matrix in matrices)


def segments_without_reset(resets: Tensor, segments: int, segment_length: int, reverse: bool) -> Tensor:
    """(batch, segments), uint8, 1 where no record begins: where the incoming state reaches the end.

    Args:
        resets: (batch, length), uint8, nonzero where the state that arrives counts as zero.
        segments: how many.
        segment_length: positions in each but the last.
        reverse: segments follow each other from the last position to the first.
    """
    ordered = resets.flip(1) if reverse else resets
    filled = F.pad(ordered, (0, segments * segment_length - resets.shape[1]))
    return (filled.unflatten(1, (segments, segment_length)).amax(2) == 0).to(torch.uint8)


def sum_of_parts(parts: Tensor) -> Tensor:
    """Add up what tasks left side by side, in their order; a single part is taken as it is."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
