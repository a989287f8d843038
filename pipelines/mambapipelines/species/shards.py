"""Classification in parts by independent jobs (`--shard K/N`), and their merging in the order of the input."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from genomamba.classification.evidence import RecordEvidence
from genomamba.classification.records import Share
from genomamba.io.compression import STANDARD_INPUT
from mambacore.errors import InputError
from mambacore.hub import find_model_folder
from mambacore.model_folder import CONFIG_NAME, TENSORS_NAME
from mambapipelines.files import written_whole
from mambapipelines.species.processes import EvidenceOfShare, merged_parts, write_part

_FOLDER = re.compile(r"of_(\d+)$")
_MOST_SHARDS = 100_000


def parse_shard(text: str) -> Share:
    """Read `K/N`, the K-th of N shards, counted from 1.

    Raises:
        InputError: it is something else.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= _MOST_SHARDS:
        raise InputError(f"--shard is '{text}': write K/N, such as 2/8, with K from 1 to N.")
    return Share(int(match[1]) - 1, int(match[2]))


def write_shard(evidence: EvidenceOfShare, share: Share, parts: Path, settings: dict[str, Any]) -> None:
    """Write the evidence of a shard below `parts`; its file appears when it is whole.

    Args:
        evidence: yields what a share of the records says.
        share: which one.
        parts: folder of all shards of one input.
        settings: what the evidence depends on (see `shard_settings`); merging compares it.

    Raises:
        InputError: the folder cannot be written to, or the input is wrong.
    """
    folder = parts / f"of_{share.count}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / f"{share.rank}.error", folder / f"{share.rank}.part"):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--parts {parts} cannot be written to ({error.strerror}): choose another folder.") from error
    with written_whole(folder / f"{share.rank}.json") as stream:
        stream.write(json.dumps(settings, sort_keys=True).encode())
    write_part(evidence, share, folder)


def merged_shards(parts: Path, settings: dict[str, Any]) -> Iterator[RecordEvidence]:
    """The evidence of all records, in the order of the input.

    Raises:
        InputError: shards are missing, were made from other input or another model, or are of several divisions.
    """
    try:
        found = [(int(match[1]), path) for path in parts.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    except OSError as error:
        raise InputError(f"--parts {parts} cannot be read ({error.strerror}): run the shards first.") from error
    if len(found) != 1:
        raise InputError(
            f"--parts {parts} has {len(found)} divisions into shards: keep one folder of_N, and run its shards first."
        )
    count, folder = found[0]
    missing = [rank for rank in range(count) if not (folder / f"{rank}.part").is_file()]
    if missing:
        raise InputError(f"--parts {parts} has no shard {missing[0] + 1}/{count}: run it first.")
    for rank in range(count):
        try:
            stated = json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}/{rank}.json cannot be read: run shard {rank + 1}/{count} again.") from error
        for key, value in settings.items():
            if stated.get(key) != value:
                raise InputError(
                    f"shard {rank + 1}/{count} in {parts} was made with another {key}: run the shards again."
                )
    return merged_parts(folder, count)


def shard_settings(model: Path, sources: Sequence[str], piece_length: int, paired: bool) -> dict[str, Any]:
    """What the evidence of a shard depends on, comparable.

    Raises:
        InputError: a source can be read only once.
    """
    for source in sources:
        if source == STANDARD_INPUT or not Path(source).is_file():
            raise InputError(f"--parts reads all input in every job, and {source} is not a file: write it to a file.")
    digest = hashlib.sha256()
    folder = find_model_folder(str(model))
    for name in (CONFIG_NAME, TENSORS_NAME):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return {
        "model": digest.hexdigest(),
        "input": [[Path(source).name, Path(source).stat().st_size] for source in sources],
        "piece length": piece_length,
        "pairing": paired,
    }
