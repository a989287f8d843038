"""Fingerprints of runs: a resumed run must have the same, and differences are reported to the user."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mambacore.errors import InputError
from mambacore.files import replaced_when_whole

CONTENTS_NAME: Final = "contents.json"

# States of earlier versions have only this checksum, of both ends of a sequence.
CHECKSUM_POSITIONS = 4096
_POSITIONS_AT_ONCE: Final = 1 << 22
_OLD_IDENTITY: Final = 3
MOST_NAMED = 3
STARTED_WITH: Final = "which are not what it was started with"


def sequence_identity(name: str, length: int, read: Callable[[int, int], Any]) -> list[Any]:
    """Return the identity of a sequence: name, length, and CRC-32 of both ends and of the whole.

    Args:
        name: of the sequence.
        length: in bases.
        read: `read(start, end)` gives the bytes of a part; the whole is read in pieces.
    """
    head = read(0, min(CHECKSUM_POSITIONS, length))
    tail = read(max(0, length - CHECKSUM_POSITIONS), length)
    whole = 0
    for start in range(0, length, _POSITIONS_AT_ONCE):
        whole = zlib.crc32(bytes(read(start, min(start + _POSITIONS_AT_ONCE, length))), whole)
    return [name, length, zlib.crc32(bytes(tail), zlib.crc32(bytes(head))), whole]


def write_contents(folder: Path, contents: Mapping[str, str]) -> None:
    """Write down what the data of a run consist of: files (or rows), each with a checksum.

    Raises:
        OSError: it cannot be written.
    """
    with replaced_when_whole(folder / CONTENTS_NAME) as stream:
        stream.write(json.dumps(contents).encode("utf-8", "surrogatepass"))


def changed_contents(folder: Path, now: Mapping[str, str]) -> str | None:
    """Which files (or rows) are other ones than when the run began, by name; `None` where that is not known."""
    try:
        before = json.loads((folder / CONTENTS_NAME).read_bytes().decode("utf-8", "surrogatepass"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(before, dict):
        return None
    kinds = {
        "changed": [name for name in before if name in now and before[name] != now[name]],
        "missing": [name for name in before if name not in now],
        "new": [name for name in now if name not in before],
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in kinds.items() if names) or None


def _some(names: Sequence[str]) -> str:
    left = len(names) - MOST_NAMED
    others = "" if left < 1 else " and 1 other" if left == 1 else f" and {left:,} others"
    return ", ".join(names[:MOST_NAMED]) + others


def refuse_other_run(
    recorded: dict[str, Any], given: dict[str, Any], output: Path, changed: Callable[[], str | None] = lambda: None
) -> None:
    """Refuse to go on with a run that depended on something else.

    Args:
        recorded: fingerprint of the run.
        given: fingerprint of what is asked for now.
        output: folder of the run.
        changed: says which files are other ones.

    Raises:
        InputError: names the first difference.
    """
    difference = _first_difference(recorded, _as_recorded(recorded, given))
    if difference is not None:
        if difference.endswith(STARTED_WITH) and (names := changed()) is not None:
            difference = f"{difference} ({names})"
        raise InputError(
            f"cannot resume the run in {output}: {difference}; give the same as before or choose another --output."
        )


def _as_recorded(recorded: Any, given: Any) -> Any:
    """What is given, without checksums of whole sequences where a state of an earlier version has none."""
    if isinstance(recorded, dict) and isinstance(given, dict):
        return {key: _as_recorded(recorded.get(key), value) for key, value in given.items()}
    if isinstance(recorded, list) and isinstance(given, list) and all(map(_is_old_identity, recorded)):
        return [one[:_OLD_IDENTITY] if isinstance(one, list) else one for one in given]
    return given


def _is_old_identity(one: object) -> bool:
    return isinstance(one, list) and len(one) == _OLD_IDENTITY and isinstance(one[0], str)


def _first_difference(recorded: dict[str, Any], given: dict[str, Any], prefix: str = "") -> str | None:
    for key in {**recorded, **given}:
        before, now = recorded.get(key), given.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _first_difference(before, now, f"{prefix}{key}.")
        return _in_words(prefix, key, before, now) or f"{prefix}{key} was {_shown(before)} and is now {_shown(now)}"
    return None


def _in_words(prefix: str, key: str, before: object, now: object) -> str | None:
    """Describe a difference of data, whose checksums are not informative; `None` for other differences."""
    what = None
    if prefix == "sequences.":
        what = f"{_changed_sequences(before, now)} of class '{key}', {STARTED_WITH}"
    elif prefix == "" and key == "reference":
        what = f"{_changed_sequences(before, now)} of --reference, {STARTED_WITH}"
    elif prefix == "" and key == "--table":
        what = f"the rows of --table (sequences, labels or splits), {STARTED_WITH}"
    elif prefix == "clips." or key in ("training clips", "validation clips"):
        what = f"the {key.removesuffix(' clips')} clips of the data, {STARTED_WITH}"
    return what


def _changed_sequences(before: object, now: object) -> str:
    """Describe the first sequence that is missing, added or changed; identities are (name, length, checksum)."""
    was, is_now = ({name: rest for name, *rest in identities or ()} for identities in (before, now))  # type: ignore[attr-defined]
    for name in {**was, **is_now}:
        if name not in is_now:
            return f"sequence {name!r} is missing"
        if name not in was:
            return f"sequence {name!r} has been added to those"
        if was[name] != is_now[name]:
            lengths = f"{was[name][0]:,} and is now {is_now[name][0]:,} long"
            what = f"was {lengths}" if was[name][0] != is_now[name][0] else "has other letters"
            return f"sequence {name!r} {what}, one"
    return "the order of the sequences"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    return "not given" if value is None else str(value)
