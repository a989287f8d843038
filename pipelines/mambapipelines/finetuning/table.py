"""Reading, splitting and encoding of the table that a model is fine-tuned on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genomamba.data.targets import (
    TargetDescription,
    Targets,
    checked_kind,
    describe_targets,
    encode_targets,
    guess_kind,
)
from genomamba.io.tables import SequenceTable, assign_splits, read_class_folders, read_sequence_table
from mambacore.errors import InputError
from mambapipelines.finetuning.task import LabelledSequences

AUTOMATIC_KIND = "auto"
MOST_ROWS_WITH_CHECKSUMS = 100_000


@dataclass(frozen=True)
class EncodedTable:
    """A table of sequences with the split and the encoded targets of every row; targets are (rows, columns)."""

    table: SequenceTable
    splits: list[str]
    description: TargetDescription
    targets: Targets

    def part(self, split: str) -> LabelledSequences:
        """The rows of a split that have a label."""
        rows = self.rows(split)
        return LabelledSequences([self.table.tokens[row] for row in rows], self.targets[rows])

    def rows(self, split: str) -> list[int]:
        """Indices of a split's rows that have a label."""
        labelled = np.any(~np.isnan(self.targets), axis=1)
        return [row for row, name in enumerate(self.splits) if name == split and labelled[row]]

    def checksums(self) -> dict[str, str]:
        """Where each row is in the table, or its file, with its checksum; nothing of tables with very many rows."""
        if len(self.splits) > MOST_ROWS_WITH_CHECKSUMS:
            return {}
        checksums = {}
        for place, tokens, split, target in zip(
            self.table.places, self.table.tokens, self.splits, self.targets, strict=True
        ):
            checksum = zlib.crc32(target.tobytes(), zlib.crc32(tokens.tobytes(), zlib.crc32(split.encode())))
            checksums[f"{place} of {self.table.source}"] = f"{checksum:08x}"
        return checksums

    def checksum(self) -> str:
        """CRC-32 of sequences, splits and targets, in hexadecimal."""
        checksum = 0
        for tokens, split in zip(self.table.tokens, self.splits, strict=True):
            checksum = zlib.crc32(split.encode(), zlib.crc32(tokens.tobytes(), checksum))
        return f"{zlib.crc32(self.targets.tobytes(), checksum):08x}"


def read_encoded_table(
    table: str, labels: Sequence[str], kind: str, seed: int, fasta: str | None = None, reference: str | None = None
) -> EncodedTable:
    """Read, split and encode a table of sequences, or a folder of classes.

    Args:
        table: path of the table (`genomamba.io.tables`), or of a folder of classes.
        labels: label columns; empty for all without another meaning.
        kind: kind of targets, or `auto`.
        seed: seed of the splits, if the table has none.
        fasta, reference: FASTA files with the table's records or intervals.

    Raises:
        InputError: see `genomamba.io.tables` and `genomamba.data.targets`.
    """
    if Path(table).is_dir():
        if labels or fasta or reference:
            raise InputError(f"{table} is a folder of classes: remove --label, --fasta and --reference.")
        rows = read_class_folders(Path(table))
    else:
        rows = read_sequence_table(table, list(labels) or None, fasta, reference)
    kind = guess_kind(rows) if kind == AUTOMATIC_KIND else checked_kind(kind)
    strata = next(iter(rows.labels.values()), [None] * len(rows)) if kind == "classes" else [None] * len(rows)
    splits = assign_splits(rows, strata, seed)
    description = describe_targets(rows, splits, kind)
    return EncodedTable(rows, splits, description, encode_targets(rows, description))
