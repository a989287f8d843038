"""What the numbers of a run depend on: a resumed run must depend on the same, and a difference is named in words."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambacore.errors import InputError

# Long sequences of the same name and length but other bases are told apart by the checksum of both ends.
CHECKSUM_POSITIONS = 4096


def ends_checksum(read: Callable[[int, int], Any], length: int) -> int:
    """CRC-32 of the first and the last `CHECKSUM_POSITIONS` of a sequence; `read(start, end)` gives its bytes."""
    head = read(0, min(CHECKSUM_POSITIONS, length))
    tail = read(max(0, length - CHECKSUM_POSITIONS), length)
    return zlib.crc32(bytes(tail), zlib.crc32(bytes(head)))


def refuse_other_run(recorded: dict[str, Any], given: dict[str, Any], output: Path) -> None:
    """Raise `InputError` that names the first difference between two fingerprints."""
    difference = _first_difference(recorded, given)
    if difference is not None:
        raise InputError(
            f"cannot resume the run in {output}: {difference}; give the same as before or choose another --output."
        )


def _first_difference(recorded: dict[str, Any], given: dict[str, Any], prefix: str = "") -> str | None:
    for key in {**recorded, **given}:
        before, now = recorded.get(key), given.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _first_difference(before, now, f"{prefix}{key}.")
        if prefix == "sequences.":
            return f"the sequences of class '{key}' are not the ones it was started with"
        if prefix == "" and key == "reference":
            return "the sequences of --reference are not the ones it was started with"
        return f"{prefix}{key} was {_shown(before)} and is now {_shown(now)}"
    return None


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    return "not given" if value is None else str(value)
