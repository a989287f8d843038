"""Packing of several records in one row, described by the boolean `sequence_starts` of operators and layers.

`sequence_starts` is (batch, length), True at the first position of every record. A state does not cross such a
position, in either direction of a scan. Padding counts as a separate record: mark its first position too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def starts_from_lengths(
    record_lengths: Sequence[Sequence[int]], length: int, device: torch.device | None = None
) -> Tensor:
    """Return the starts of records that fill rows from the left.

    Args:
        record_lengths: for every row the lengths of its records; the rest of the row is padding.
        length: positions in a row.
        device: device of the result.

    Returns:
        (batch, length), boolean.

    Raises:
        ValueError: if records do not fit into their row.
    """
    starts = torch.zeros(len(record_lengths), length, dtype=torch.bool)
    for row, lengths in enumerate(record_lengths):
        begin = 0
        for record_length in lengths:
            if record_length < 0 or begin + record_length > length:
                raise ValueError(
                    f"row {row} has records of {list(lengths)} positions, which do not fit into {length}; "
                    "use longer rows"
                )
            if record_length > 0:
                starts[row, begin] = True
            begin += record_length
        if begin < length:
            starts[row, begin] = True
    return starts.to(device)


def starts_from_cumulative_lengths(
    cumulative_lengths: Tensor, length: int, device: torch.device | None = None
) -> Tensor:
    """Return the starts of the records of one row, (1, length), from 0 followed by the ends of all records."""
    bounds = cumulative_lengths.tolist()
    if not bounds or bounds[0] != 0:
        raise ValueError(f"cumulative_lengths must begin with 0 but is {bounds}")
    return starts_from_lengths([[end - begin for begin, end in itertools.pairwise(bounds)]], length, device)


def record_numbers(sequence_starts: Tensor) -> Tensor:
    """Return the record number of each position in its row, (batch, length); 0 before the first start."""
    return sequence_starts.cumsum(1)


def resets_before(sequence_starts: Tensor, reverse: bool) -> Tensor:
    """Return where the incoming state is reset, in scan order: (batch, length), boolean.

    In reverse, a record is entered at its last position, the one before the first of the next record.
    """
    if not reverse:
        return sequence_starts
    entered = torch.zeros_like(sequence_starts)
    entered[:, :-1] = sequence_starts[:, 1:]
    return entered
