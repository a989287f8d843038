"""Sequences with labels from a table, or from folders of classes, as fine-tuning takes them.

A table is TSV or CSV with a header, plain or gzipped (found by content). Its sequences are in a column `sequence`, or
are named by a column `record` beside a FASTA file, or placed by the columns `chrom`, `start`, `end` (0-based,
half-open) and perhaps `strand` beside a reference. A column `name` names the rows; a column `split` holds train, valid
or test. The other columns hold labels, in which NA or nothing stands for a missing one.
"""

import csv
import gzip
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from genomamba.io.fasta import STANDARD_INPUT, is_gzipped, read_records, source_label
from genomamba.io.reference import Reference
from genomamba.tokenizer import COMPLEMENT_IDS, CharacterTokenizer, Tokens
from mambacore.errors import InputError

MISSING: Final = frozenset({"", "NA", "na", "N/A", "NaN", "nan"})
SPLIT_NAMES: Final[Mapping[str, str]] = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
RESERVED_COLUMNS: Final = ("name", "sequence", "record", "chrom", "start", "end", "strand", "split")
CLASS_COLUMN: Final = "class"
"""The label column of folders of classes."""

_LONGEST_FIELD: Final = 2**31 - 1
_CLASS_FOLDERS: Final = ("train", "test")


@dataclass(frozen=True)
class SequenceTable:
    """Sequences in the order of the input; all lists have one entry for each.

    Attributes:
        source: what messages call the table.
        names: unique.
        tokens: uint8 (length,) each, at least one.
        places: where each comes from, for messages: `line 7`, or a file.
        labels: by column, as written; None where missing.
        splits: train, valid or test; None where the table does not say.
    """

    source: str
    names: list[str]
    tokens: list[Tokens]
    places: list[str]
    labels: dict[str, list[str | None]]
    splits: list[str | None]

    def __len__(self) -> int:
        return len(self.names)


def read_sequence_table(
    path: str | BinaryIO,
    label_columns: Sequence[str] | None = None,
    fasta: str | None = None,
    reference: str | None = None,
) -> SequenceTable:
    """Read a table of sequences.

    Args:
        path: the table; "-" is standard input, and a binary stream is as good.
        label_columns: which columns are labels; None takes all that have no other meaning.
        fasta: where the records named by the column `record` are.
        reference: FASTA that `chrom`, `start` and `end` place sequences in.

    Raises:
        InputError: one sentence with the line and what to do, for anything wrong in the table or beside it.
    """
    label = source_label(path)
    # Before the first row, so that a field of a chromosome's length is read.
    csv.field_size_limit(_LONGEST_FIELD)
    lines = _rows(path, label)
    header = next(lines, None)
    if header is None:
        raise InputError(f"{label} is empty: give a table with a header line and one line for each sequence.")
    columns = _checked_header(header[1], label)
    wanted = _label_columns(columns, label_columns, label)
    fetch = _sequence_source(columns, label, fasta, reference)
    table = SequenceTable(label, [], [], [], {name: [] for name in wanted}, [])
    seen: dict[str, int] = {}
    for number, cells in lines:
        if len(cells) != len(columns):
            raise InputError(
                f"{label} has {len(cells)} fields in line {number} and {len(columns)} columns in its header: fill "
                "missing values with NA."
            )
        row = dict(zip(columns, cells, strict=True))
        name = row.get("name") or row.get("record") or f"row_{len(table) + 1}"
        if name in seen:
            raise InputError(
                f"{label} has the name '{name}' in line {number} and in line {seen[name]}: give each row a name of "
                "its own."
            )
        seen[name] = number
        tokens = fetch(row, f"{label} line {number}")
        if not len(tokens):
            raise InputError(f"{label} has an empty sequence in line {number}: remove the row.")
        table.names.append(name)
        table.tokens.append(tokens)
        table.places.append(f"line {number}")
        table.splits.append(_split(row.get("split"), f"{label} line {number}"))
        for column in wanted:
            table.labels[column].append(None if row[column] in MISSING else row[column])
    if not len(table):
        raise InputError(f"{label} has a header and no rows: give one line for each sequence.")
    return table


def read_class_folders(folder: Path) -> SequenceTable:
    """Read the layout of Genomic Benchmarks: `FOLDER/train/CLASS/*.txt` and `FOLDER/test/CLASS/*.txt`.

    Each file is one sequence (Grešová et al. 2023, BMC Genomic Data 24:25). The class is the label column `class`.

    Raises:
        InputError: other contents, no classes, or an empty or foreign file.
    """
    table = SequenceTable(str(folder), [], [], [], {CLASS_COLUMN: []}, [])
    if not (folder / "train").is_dir():
        raise InputError(f"{folder} has no folder train: give a folder with train/CLASS/*.txt and test/CLASS/*.txt.")
    for split in _CLASS_FOLDERS:
        for class_folder in sorted(path for path in (folder / split).glob("*") if path.is_dir()):
            for path in sorted(class_folder.glob("*.txt"), key=_natural_order):
                tokens = _encoded("".join(path.read_text(encoding="ascii", errors="replace").split()), str(path))
                if not len(tokens):
                    raise InputError(f"{path} is empty: remove the file.")
                table.names.append(str(path.relative_to(folder)))
                table.tokens.append(tokens)
                table.places.append(str(path.relative_to(folder)))
                table.labels[CLASS_COLUMN].append(class_folder.name)
                table.splits.append(split)
    if not len(table):
        raise InputError(f"{folder} has no files train/CLASS/*.txt: give a folder of classes.")
    return table


def assign_splits(table: SequenceTable, strata: Sequence[str | None], seed: int) -> list[str]:
    """The split of every sequence: as the table says, or else chosen by the seed.

    A table that names no split has 80 % of each stratum (class) for training, 10 % for validation and 10 % for testing;
    one without validation rows gives up 10 % of its training rows for it.

    Raises:
        InputError: some rows have a split and others have none, or none are for training.
    """
    known = [split for split in table.splits if split is not None]
    if known and len(known) < len(table):
        place = table.places[table.splits.index(None)]
        raise InputError(f"{table.source} has no split in {place} but in others: write train, valid or test in each.")
    if known and "train" not in known:
        raise InputError(f"{table.source} has no rows of the split train: give some to train on.")
    splits = [split or "train" for split in table.splits]
    shares = {} if "valid" in known else {"valid": 0.1} if known else {"valid": 0.1, "test": 0.1}
    random = np.random.Generator(np.random.PCG64(seed))
    free: dict[str | None, list[int]] = {}
    for index, split in enumerate(splits):
        if split == "train":
            free.setdefault(strata[index], []).append(index)
    for stratum in sorted(free, key=str):
        order = random.permutation(free[stratum]).tolist()
        for name, share in shares.items():
            # A stratum of a few rows keeps at least half of them for training.
            count = min(round(share * len(free[stratum])), len(order) // 2)
            for index in order[:count]:
                splits[index] = name
            order = order[count:]
    return splits


def repeated_in_training(table: SequenceTable, splits: Sequence[str]) -> int:
    """How many validation and test sequences also occur in training, on either strand."""
    training = {_either_strand(tokens) for tokens, split in zip(table.tokens, splits, strict=True) if split == "train"}
    return sum(
        split != "train" and _either_strand(tokens) in training
        for tokens, split in zip(table.tokens, splits, strict=True)
    )


def _either_strand(tokens: Tokens) -> bytes:
    return min(tokens.tobytes(), COMPLEMENT_IDS[tokens[::-1]].tobytes())


def _natural_order(path: Path) -> tuple[int, str]:
    """`2.txt` before `10.txt`."""
    return len(path.name), path.name


def _rows(path: str | BinaryIO, label: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not blank, the header first."""
    try:
        if path == STANDARD_INPUT:
            raw = sys.stdin.buffer.read()
        elif not isinstance(path, str):
            raw = path.read()
        else:
            with gzip.open(path, "rb") if is_gzipped(path) else open(path, "rb") as stream:
                raw = stream.read()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{label} is no UTF-8 text: give a table as TSV or CSV, plain or gzipped.") from error
    except (OSError, EOFError) as error:
        raise InputError(
            f"{label} cannot be read ({getattr(error, 'strerror', None) or error}): copy it again."
        ) from error
    first_line = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in first_line else ",", strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise InputError(f"{label} is no table at line {reader.line_num} ({error}): quote fields properly.") from error


def _checked_header(columns: list[str], label: str) -> list[str]:
    for number, name in enumerate(columns, start=1):
        if not name:
            raise InputError(f"{label} has no name for column {number} in its header: name every column.")
        if columns.index(name) != number - 1:
            raise InputError(f"{label} has two columns '{name}': give each a name of its own.")
    return columns


def _label_columns(columns: Sequence[str], asked: Sequence[str] | None, label: str) -> list[str]:
    others = [name for name in columns if name not in RESERVED_COLUMNS]
    for name in asked or ():
        if name not in columns:
            raise InputError(f"{label} has no column '{name}': its columns are {', '.join(columns)}.")
        if name in RESERVED_COLUMNS:
            raise InputError(f"the column '{name}' of {label} has a meaning of its own: name a column of labels.")
    return list(dict.fromkeys(asked)) if asked is not None else others


def _sequence_source(
    columns: Sequence[str], label: str, fasta: str | None, reference: str | None
) -> Callable[[dict[str, str], str], Tokens]:
    """What gives the tokens of a row; the second argument is its place, for messages."""
    if fasta is not None and reference is not None:
        raise InputError("--fasta and --reference are both given: leave one of them out.")
    if fasta is not None:
        _require(columns, ("record",), label, "--fasta")
        records: dict[str, Tokens] = {}
        for record in read_records(fasta):
            if record.name in records:
                raise InputError(f"{fasta} has more than one record named '{record.name}': rename them.")
            records[record.name] = record.tokens
        return lambda row, place: _record(records, row["record"], fasta, place)
    if reference is not None:
        _require(columns, ("chrom", "start", "end"), label, "--reference")
        genome = Reference(reference)
        return lambda row, place: _interval(genome, row, place)
    if "sequence" not in columns:
        raise InputError(
            f"{label} has no column 'sequence': add it, or name records in a column 'record' and give --fasta, or "
            f"intervals in 'chrom', 'start' and 'end' and give --reference; its columns are {', '.join(columns)}."
        )
    return lambda row, place: _encoded(row["sequence"], place)


def _require(columns: Sequence[str], needed: Sequence[str], label: str, option: str) -> None:
    for name in needed:
        if name not in columns:
            raise InputError(f"{label} has no column '{name}', which {option} needs: add it.")


def _record(records: Mapping[str, Tokens], name: str, fasta: str, place: str) -> Tokens:
    if name not in records:
        raise InputError(f"{place} names the record '{name}', which {fasta} does not have: correct one of them.")
    return records[name]


def _interval(genome: Reference, row: Mapping[str, str], place: str) -> Tokens:
    try:
        start, end = int(row["start"]), int(row["end"])
    except ValueError:
        raise InputError(f"{place} has the interval '{row['start']}' to '{row['end']}': write whole numbers.") from None
    length = genome.lengths.get(row["chrom"])
    if length is None:
        raise InputError(f"{place} names '{row['chrom']}', which {genome.path} does not have: correct the name.")
    if not 0 <= start < end <= length:
        raise InputError(
            f"{place} has the interval {start} to {end}, which does not lie in the {length} bp of {row['chrom']}: "
            "write 0-based, half-open intervals."
        )
    strand = row.get("strand", "+")
    if strand not in ("+", "-", "."):
        raise InputError(f"{place} has the strand '{strand}': write + or -.")
    tokens = genome.tokens(row["chrom"], start, end)
    return COMPLEMENT_IDS[tokens[::-1]] if strand == "-" else tokens


def _encoded(letters: str, place: str) -> Tokens:
    try:
        return CharacterTokenizer().encode(letters)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _split(text: str | None, place: str) -> str | None:
    if text is None or text in MISSING:
        return None
    if text.lower() not in SPLIT_NAMES:
        raise InputError(f"{place} has the split '{text}': write train, valid or test.")
    return SPLIT_NAMES[text.lower()]
