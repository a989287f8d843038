"""Labelled sequences for fine-tuning, from a table or from folders of classes.

A table has a header and columns separated by tabs, commas or semicolons; it is plain or compressed. Its sequences are
in a column `sequence` (or `seq`, in any case), or are records of a FASTA file named in a column `record`, or intervals
of a reference given by the columns `chrom`, `start`, `end` (0-based, half-open) and optionally `strand`. A column
`name` names the rows; a column `split` has train, valid or test. Names of these columns are understood in any case. A
first column without a name is the index that pandas writes, and is ignored, as are row names that R writes without a
name for their column, and the line `sep=;` that Excel reads. The other columns are labels, in which an empty field, NA,
N/A, nan and null, in any case, are missing values.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from genomamba.alphabet import UNKNOWN_SYMBOLS
from genomamba.io.compression import LOGGER, read_blocks, read_lines, source_label
from genomamba.io.fasta import FastaHeader, LetterReader, read_records
from genomamba.io.reference import Reference
from genomamba.tokenizer import COMPLEMENT_IDS, CharacterTokenizer, Tokens
from mambacore.errors import InputError
from mambacore.safe_text import safe_field

MISSING: Final = frozenset({"", "na", "n/a", "nan", "null"})
"""Representations of a missing value, in any case."""
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
"""Name of the label column for folders of classes."""

_SEQUENCE_NAMES: Final = ("sequence", "seq")
_LONGEST_FIELD: Final = 2**31 - 1
_POSITION: Final = re.compile(r"[0-9]{1,15}")
_BLANK: Final = re.compile(r"\s")
_EXCEL_SEPARATOR: Final = re.compile(r"sep=.?")


@dataclass(frozen=True)
class SequenceTable:
    """Sequences in input order; all lists have one entry per sequence.

    Attributes:
        source: name of the table in messages.
        names: unique names.
        tokens: uint8 (length,) each, with at least one token.
        places: origin of each sequence, for messages: `line 7`, or a file.
        labels: values by column, as written; None if missing.
        splits: train, valid or test; None if not given in the table.
        other_columns: distinct values, in lower case, of columns that are not used, while they are few.
    """

    source: str
    names: list[str]
    tokens: list[Tokens]
    places: list[str]
    labels: dict[str, list[str | None]]
    splits: list[str | None]
    other_columns: dict[str, set[str]] = field(default_factory=dict)

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
        path: the table; "-" for standard input, or a binary stream.
        label_columns: the label columns; None for all without another meaning.
        fasta: FASTA file with the records named in the column `record`.
        reference: FASTA file that `chrom`, `start` and `end` refer to.

    Raises:
        InputError: if the table or a related file is invalid; the message gives the line and the remedy.
    """
    label = source_label(path)
    # Before the first row, so that fields as long as a chromosome are accepted.
    csv.field_size_limit(_LONGEST_FIELD)
    lines = _rows(path, label)
    header = next(lines, None)
    if header is None:
        raise InputError(f"{label} is empty: give a table with a header line and one line for each sequence.")
    columns = _checked_header(header[1], label)
    wanted = _label_columns(columns, label_columns, label)
    symbols = _SymbolCount(label)
    fetch = _sequence_source(columns, label, fasta, reference, symbols)
    table = SequenceTable(label, [], [], [], {name: [] for name in wanted}, [])
    unused = {name for name in columns if name} - set(wanted) - set(RESERVED_COLUMNS)
    table.other_columns.update({name: set() for name in sorted(unused)})
    seen: dict[str, int] = {}
    row_names: bool | None = None
    for number, cells in lines:
        if row_names is None:
            row_names = _have_row_names(columns, cells)
        row = _row(columns, cells, row_names, label, number)
        name = row.get("name") or row.get("record") or f"row_{len(table) + 1}"
        if name in seen:
            raise InputError(
                f"{label} has the name '{name}' in line {number} and in line {seen[name]}: give each row a name of "
                "its own."
            )
        seen[name] = number
        tokens = fetch(row, f"{label} line {number}")
        if not len(tokens):
            raise InputError(f"{label} line {number} has an empty sequence: remove the row.")
        table.names.append(name)
        table.tokens.append(tokens)
        table.places.append(f"line {number}")
        table.splits.append(_split(row.get("split"), f"{label} line {number}"))
        for column in wanted:
            table.labels[column].append(None if is_missing(row[column]) else row[column])
        for column, distinct in table.other_columns.items():
            # More distinct values than there are names of splits are not splits, however many follow.
            if len(distinct) <= len(SPLIT_NAMES):
                distinct.add(row[column].lower())
    if not len(table):
        raise InputError(f"{label} has a header but no rows: give one line for each sequence.")
    symbols.report()
    _warn_of_other_splits(table)
    for column, values in table.labels.items():
        missing = values.count(None)
        if missing:
            LOGGER.warning(
                "%s: %d of %d values of '%s' read as missing (empty, NA, N/A, nan or null)",
                label,
                missing,
                len(values),
                column,
            )
    return table


def is_missing(text: str) -> bool:
    """Whether the text of a cell is a missing value."""
    return text.strip().lower() in MISSING


def _warn_of_other_splits(table: SequenceTable) -> None:
    """Warn of a column that holds splits but is not called so: the rows would be split otherwise without a word."""
    if any(table.splits):
        return
    for column, values in table.other_columns.items():
        if values and values <= SPLIT_NAMES.keys() and "train" in {SPLIT_NAMES[value] for value in values}:
            LOGGER.warning(
                "%s: the column '%s' names splits but is not used: call it 'split' if the rows are to be split by it",
                table.source,
                safe_field(column),
            )


def read_class_folders(folder: Path) -> SequenceTable:
    """Read folders laid out as in Genomic Benchmarks: `FOLDER/SPLIT/CLASS/*.txt`, with splits train, valid and test.

    Each file is one sequence (Grešová et al. 2023, BMC Genomic Data 24:25). The class is the label column `class`.

    Raises:
        InputError: if the layout differs, there are no classes, or a file is empty or invalid.
    """
    table = SequenceTable(str(folder), [], [], [], {CLASS_COLUMN: []}, [])
    if not (folder / "train").is_dir():
        raise InputError(f"{folder} has no folder train: give a folder with train/CLASS/*.txt and test/CLASS/*.txt.")
    symbols = _SymbolCount(str(folder))
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for split_folder in sorted(inside, key=_split_order):
        split = SPLIT_NAMES.get(split_folder.name.lower())
        if split is None:
            LOGGER.warning("%s: the folder %s is not train, valid or test and is ignored", folder, split_folder.name)
            continue
        for class_folder in sorted(path for path in split_folder.glob("*") if path.is_dir()):
            for path in sorted(class_folder.glob("*.txt"), key=_natural_order):
                with closing(read_blocks(str(path), str(path))) as blocks:
                    letters = b"".join(b"".join(blocks).split()).decode("ascii", "replace")
                tokens = symbols.encoded(letters, str(path))
                if not len(tokens):
                    raise InputError(f"{path} is empty: remove the file.")
                table.names.append(str(path.relative_to(folder)))
                table.tokens.append(tokens)
                table.places.append(str(path.relative_to(folder)))
                table.labels[CLASS_COLUMN].append(class_folder.name)
                table.splits.append(split)
    if not len(table):
        raise InputError(f"{folder} has no files train/CLASS/*.txt: give a folder of classes.")
    symbols.report()
    return table


def assign_splits(table: SequenceTable, strata: Sequence[str | None], seed: int) -> list[str]:
    """Return the split of every sequence: as given in the table, or else chosen by the seed.

    Without splits, 80 % of each stratum (class) are used for training, 10 % for validation and 10 % for testing;
    without validation rows, 10 % of the training rows are used for validation.

    Raises:
        InputError: if only some rows have a split, or none are for training.
    """
    known = [split for split in table.splits if split is not None]
    if known and len(known) < len(table):
        place = table.places[table.splits.index(None)]
        raise InputError(
            f"{table.source} has no split in {place} but has one in others: write train, valid or test in each."
        )
    if known and "train" not in known:
        raise InputError(f"{table.source} has no rows in the split train: add some.")
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
            # A small stratum keeps at least half of its rows for training.
            count = min(round(share * len(free[stratum])), len(order) // 2)
            for index in order[:count]:
                splits[index] = name
            order = order[count:]
    return splits


def repeated_in_training(table: SequenceTable, splits: Sequence[str]) -> int:
    """Return the number of validation and test sequences that also occur in training, on either strand."""
    training = {_either_strand(tokens) for tokens, split in zip(table.tokens, splits, strict=True) if split == "train"}
    return sum(
        split != "train" and _either_strand(tokens) in training
        for tokens, split in zip(table.tokens, splits, strict=True)
    )


def _either_strand(tokens: Tokens) -> bytes:
    return min(tokens.tobytes(), COMPLEMENT_IDS[tokens[::-1]].tobytes())


def _split_order(path: Path) -> int:
    """Sort key: train before valid before test, as in `SPLIT_NAMES`."""
    names = list(SPLIT_NAMES)
    return names.index(path.name.lower()) if path.name.lower() in names else -1


def _natural_order(path: Path) -> tuple[int, str]:
    """Sort key: `2.txt` before `10.txt`."""
    return len(path.name), path.name


def _rows(path: str | BinaryIO, label: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of every line that is not blank, the header first."""
    with closing(read_lines(path, label)) as lines:
        first = next((line for line in lines if line.strip()), "")
        if _EXCEL_SEPARATOR.fullmatch(first.strip()):
            first = next((line for line in lines if line.strip()), "")
        counts = {delimiter: first.count(delimiter) for delimiter in ",;"}
        delimiter = "\t" if "\t" in first else max(counts, key=lambda one: counts[one])
        # Some programs write a blank after each comma, before a quoted field too.
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, [cell.strip() for cell in cells]
        except csv.Error as error:
            raise InputError(
                f"{label} is not a table at line {reader.line_num} ({error}): quote fields properly."
            ) from error


def _checked_header(columns: list[str], label: str) -> list[str]:
    """Return the column names: "" for a leading index, and after a trailing tab; reserved names in lower case."""
    for reserved in RESERVED_COLUMNS:
        known = _SEQUENCE_NAMES if reserved == "sequence" else (reserved,)
        spellings = [name for name in columns if name.lower() in known]
        if reserved not in columns and len(spellings) == 1:
            columns = [reserved if name == spellings[0] else name for name in columns]
    for number, name in enumerate(columns, start=1):
        if not name and 1 < number < len(columns):
            raise InputError(f"{label} has no name for column {number} in its header: name every column.")
        if name and columns.index(name) != number - 1:
            raise InputError(f"{label} has two columns '{safe_field(name)}': give each its own name.")
    return columns


def _have_row_names(columns: Sequence[str], cells: Sequence[str]) -> bool:
    """Whether the first row begins with a row name, for whose column R writes no name in the header."""
    return all(columns) and len(cells) == len(columns) + 1 and bool(cells[-1])


def _row(columns: Sequence[str], cells: list[str], has_row_name: bool, label: str, number: int) -> dict[str, str]:
    """Return the cells of a line by column."""
    expected = len(columns) + has_row_name
    if len(cells) == expected + 1 and not cells[-1]:
        cells = cells[:-1]
    elif len(cells) == expected - 1 and not columns[-1]:
        cells = [*cells, ""]
    if len(cells) != expected:
        raise InputError(
            f"{label} has {len(cells)} field{'s' * (len(cells) != 1)} in line {number} but {len(columns)} columns in "
            "its header"
            f"{' and row names before them' if has_row_name else ''}: fill missing values with NA."
        )
    cells = cells[has_row_name:]
    if not columns[-1] and cells[-1]:
        raise InputError(f"{label} has no name for column {len(columns)} in its header: name every column.")
    return {name: cell for name, cell in zip(columns, cells, strict=True) if name}


def _label_columns(columns: Sequence[str], asked: Sequence[str] | None, label: str) -> list[str]:
    others = [name for name in columns if name and name not in RESERVED_COLUMNS]
    for name in asked or ():
        if name not in columns:
            raise InputError(f"{label} has no column '{name}': its columns are {', '.join(columns)}.")
        if name in RESERVED_COLUMNS:
            raise InputError(f"the column '{name}' of {label} has another meaning: name a label column.")
    return list(dict.fromkeys(asked)) if asked is not None else others


def _sequence_source(
    columns: Sequence[str], label: str, fasta: str | None, reference: str | None, symbols: "_SymbolCount"
) -> Callable[[dict[str, str], str], Tokens]:
    """Return a function that gives the tokens of a row; its second argument is the place, for messages."""
    if fasta is not None and reference is not None:
        raise InputError("--fasta and --reference are both given: give only one of them.")
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
    return lambda row, place: symbols.encoded(_letters(row["sequence"], place), place)


def _letters(text: str, place: str) -> str:
    """The letters of a cell: those of a missing value (NA, nan) would be read as bases."""
    if is_missing(text):
        raise InputError(f"{place} has no sequence{f' ({text})' if text else ''}: remove the row.")
    if (blank := _BLANK.search(text)) is not None:
        what = "a line break" if blank[0] in "\r\n" else "a blank"
        raise InputError(f"{place} has {what} within its sequence: remove it.")
    return text


def _require(columns: Sequence[str], needed: Sequence[str], label: str, option: str) -> None:
    for name in needed:
        if name not in columns:
            raise InputError(f"{label} has no column '{name}', which {option} needs: add it.")


def _record(records: Mapping[str, Tokens], name: str, fasta: str, place: str) -> Tokens:
    if name not in records:
        raise InputError(f"{place} names the record '{name}', which {fasta} does not have: correct one of them.")
    return records[name]


def _interval(genome: Reference, row: Mapping[str, str], place: str) -> Tokens:
    if not all(_POSITION.fullmatch(row[name]) for name in ("start", "end")):
        raise InputError(f"{place} has the interval '{row['start']}' to '{row['end']}': write integers.")
    start, end = int(row["start"]), int(row["end"])
    length = genome.lengths.get(row["chrom"])
    if length is None:
        raise InputError(f"{place} names '{row['chrom']}', which {genome.path} does not have: correct the name.")
    if not 0 <= start < end <= length:
        raise InputError(
            f"{place} has the interval {start} to {end}, which is not within the {length} bp of {row['chrom']}: "
            "write 0-based, half-open intervals."
        )
    strand = row.get("strand", "+")
    if strand not in ("+", "-", "."):
        raise InputError(f"{place} has the strand '{strand}': write + or -.")
    tokens = genome.tokens(row["chrom"], start, end)
    return COMPLEMENT_IDS[tokens[::-1]] if strand == "-" else tokens


class _SymbolCount:
    """Encodes sequences and counts the symbols that are read as N."""

    def __init__(self, label: str) -> None:
        self._reader = LetterReader(label)

    def encoded(self, letters: str, place: str) -> Tokens:
        text = letters.encode("utf-8", "replace")
        if text.translate(None, UNKNOWN_SYMBOLS) != text:
            return self._reader.tokens(text, 0, FastaHeader(place, ""))
        try:
            return CharacterTokenizer().encode(letters)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error

    def report(self) -> None:
        self._reader.report()


def _split(text: str | None, place: str) -> str | None:
    if text is None or is_missing(text):
        return None
    if text.lower() not in SPLIT_NAMES:
        raise InputError(f"{place} has the split '{text}': write train, valid or test.")
    return SPLIT_NAMES[text.lower()]
