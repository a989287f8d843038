"""Genomic intervals with their split, and the published rules that turn them into windows of a given length.

The file format is that of the Basenji and Enformer split, used by hg38 language models (`human-sequences.bed`): no
header, tab-separated chromosome, start, end and split, 0-based and half-open.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt

from genomamba.io.compression import read_lines, source_label
from genomamba.io.reference import suggest_names
from mambacore.errors import InputError
from mambacore.safe_text import table_line

Split = Literal["train", "valid", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "valid", "test")

Positions = npt.NDArray[np.int64]
"""Positions or lengths in bp."""

CADUCEUS_REACH_BP: Final = 2**20
"""The length to which Caduceus extends every row."""

_POSITION = re.compile(r"[0-9]{1,15}")
_COMMENTS = ("#", "track ", "track\t", "browser ")
_LONGEST_LINE: Final = 1 << 16
_START_NAMES: Final = frozenset({"start", "begin", "chromstart", "chrom_start", "txstart", "pos"})
_END_NAMES: Final = frozenset({"end", "stop", "chromend", "chrom_end", "txend"})


@dataclass(frozen=True, slots=True)
class Interval:
    """One row: bases [start, end) of a chromosome, 0-based, and the split they belong to."""

    chromosome: str
    start: int
    end: int
    split: Split

    @property
    def length(self) -> int:
        """Bases (bp)."""
        return self.end - self.start


def read_intervals(
    path: str | os.PathLike[str],
    contig_lengths: Mapping[str, int] | None = None,
    reference_label: str = "the reference",
) -> list[Interval]:
    """Read an interval file, plain or gzipped, "-" for standard input, in file order.

    Blank lines, and lines that start with '#', 'track' or 'browser', are skipped. With `contig_lengths` every row must
    lie within a contig.

    Raises:
        InputError: if a row has another form; the message names the file and the line.
    """
    label = source_label(path)
    rows: list[Interval] = []
    for text, place in table_lines(path, "intervals"):
        row = _parse_row(text, place)
        if contig_lengths is not None:
            _require_within(row, contig_lengths, reference_label, place)
        rows.append(row)
    if not rows:
        raise InputError(f"{label} has no intervals: give lines of chromosome, start, end and split.")
    return rows


def intervals_text(intervals: Iterable[Interval]) -> str:
    """Return the content of an interval file, as read by `read_intervals`."""
    return "".join(table_line([row.chromosome, str(row.start), str(row.end), row.split]) + "\n" for row in intervals)


@dataclass(frozen=True)
class WindowRule:
    """A published rule that turns rows into windows of `length` bp.

    Rows are given as arrays, one entry per row, so that a genome's windows are computed instead of listed.

    - `windows_per_row(row_lengths, length)`: number of windows of each row.
    - `starts(row_starts, row_ends, which, length)`: start of window number `which` of each row, before contig ends are
      taken into account.
    - `at_edges`: a window that extends beyond its contig is padded ("pad") or moved back inside ("shift").
    - `reach_bp`: rows are extended to this length whatever `length` is; 0 if they are not.
    """

    name: str
    windows_per_row: Callable[[Positions, int], Positions]
    starts: Callable[[Positions, Positions, Positions, int], Positions]
    at_edges: Literal["pad", "shift"]
    reach_bp: int = 0

    def require_length(self, length: int) -> None:
        """Check that this rule supports a window length.

        Raises:
            InputError: if the length is below 1, or does not divide the reach.
        """
        if length < 1:
            raise InputError(f"the window length is {length} bp: use 1 or more.")
        if self.reach_bp and self.reach_bp % length:
            raise InputError(
                f"the rule '{self.name}' extends rows to {self.reach_bp} bp, which {length} bp does not divide: use a "
                f"power of two up to {self.reach_bp}, or another rule."
            )

    def needed_row_length(self, length: int) -> int:
        """Return the length (bp) that a row needs to contain all of its windows."""
        return max(length, self.reach_bp)


def _hyenadna_count(row_lengths: Positions, length: int) -> Positions:
    return np.ones_like(row_lengths)


def _hyenadna_starts(row_starts: Positions, row_ends: Positions, which: Positions, length: int) -> Positions:
    # Short rows are extended to the left by half of the missing length, rounded down; others keep their start.
    lacking = np.maximum(length - (row_ends - row_starts), 0)
    return row_starts - lacking // 2


def _mamba_count(row_lengths: Positions, length: int) -> Positions:
    return np.where(row_lengths < length, 2, row_lengths // length)


def _mamba_starts(row_starts: Positions, row_ends: Positions, which: Positions, length: int) -> Positions:
    grown = np.where(which == 0, row_starts, row_ends - length)
    return np.where(row_ends - row_starts < length, grown, row_starts + which * length)


def _caduceus_count(row_lengths: Positions, length: int) -> Positions:
    return np.full_like(row_lengths, CADUCEUS_REACH_BP // length)


def _caduceus_starts(row_starts: Positions, row_ends: Positions, which: Positions, length: int) -> Positions:
    return row_starts + which * length


WINDOW_RULES: Final[dict[str, WindowRule]] = {
    rule.name: rule
    for rule in (
        # Nguyen et al. 2023: one window per row: its first bases, or the row extended equally on both sides.
        WindowRule("hyenadna", _hyenadna_count, _hyenadna_starts, "pad"),
        # Gu and Dao 2023, section E.3: non-overlapping tiles; a row shorter than a window gives one that begins with it
        # and one that ends with it.
        WindowRule("mamba", _mamba_count, _mamba_starts, "pad"),
        # Schiff et al. 2024: every row is extended from its start to 2^20 bp and tiled; at the end of a contig windows
        # are moved back inside it.
        WindowRule("caduceus", _caduceus_count, _caduceus_starts, "shift", CADUCEUS_REACH_BP),
    )
}


def window_rule(name: str) -> WindowRule:
    """Return a published rule by name.

    Raises:
        InputError: if the name is unknown.
    """
    if name not in WINDOW_RULES:
        raise InputError(f"there is no window rule '{name}': use {', '.join(WINDOW_RULES)}.")
    return WINDOW_RULES[name]


@dataclass(frozen=True, slots=True)
class PlacedWindow:
    """A window of row number `row`: bases [start, end) of a chromosome.

    With a rule that pads, or in a contig shorter than the window, start may be below 0 and end beyond the contig.
    """

    row: int
    chromosome: str
    start: int
    end: int


class RuleWindows(Sequence[PlacedWindow]):
    """The windows of a rule for the given rows, in row order, computed on access."""

    def __init__(
        self, rows: Sequence[Interval], rule: WindowRule, length: int, contig_lengths: Mapping[str, int]
    ) -> None:
        """Count the windows of `length` bp.

        Raises:
            InputError: if the rule does not support the length, or a row is not within a contig.
        """
        rule.require_length(length)
        self.rows = tuple(rows)
        self.rule = rule
        self.length = length
        for row in self.rows:
            _require_within(row, contig_lengths, "the reference", f"the row {row.chromosome}:{row.start}-{row.end}")
        self._row_starts = np.array([row.start for row in self.rows], dtype=np.int64)
        self._row_ends = np.array([row.end for row in self.rows], dtype=np.int64)
        self._contig_lengths = np.array([contig_lengths[row.chromosome] for row in self.rows], dtype=np.int64)
        self.windows_per_row: Positions = rule.windows_per_row(self._row_ends - self._row_starts, length)
        self._windows_through_row = np.cumsum(self.windows_per_row)

    def __len__(self) -> int:
        return int(self._windows_through_row[-1]) if len(self.rows) else 0

    def __getitem__(self, index: Any) -> Any:
        """Return window number `index`, or a list of windows for a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"there is no window {index} among {len(self)}")
        row = int(np.searchsorted(self._windows_through_row, position, side="right"))
        which = position - int(self._windows_through_row[row]) + int(self.windows_per_row[row])
        start = int(self._starts_of(np.array([row]), np.array([which]))[0])
        return PlacedWindow(row, self.rows[row].chromosome, start, start + self.length)

    def starts_of_rows(self, rows: Positions) -> tuple[Positions, Positions]:
        """Return the starts of all windows of the given rows (by index), and the row of each, both (windows,)."""
        counts = self.windows_per_row[rows]
        repeated = np.repeat(rows, counts)
        which = np.arange(len(repeated)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._starts_of(repeated, which), repeated

    def _starts_of(self, rows: Positions, which: Positions) -> Positions:
        starts = self.rule.starts(self._row_starts[rows], self._row_ends[rows], which, self.length)
        if self.rule.at_edges == "shift":
            starts = np.maximum(np.minimum(starts, self._contig_lengths[rows] - self.length), 0)
        return starts


def tile_contigs(
    contig_lengths: Mapping[str, int],
    length: int,
    valid: Iterable[str],
    test: Iterable[str],
    exclude: Iterable[str] = (),
) -> Iterator[Interval]:
    """Tile all contigs with non-overlapping rows of `length` bp, split by contig; unnamed contigs are for training.

    An incomplete row at the end of a contig is dropped, as are contigs shorter than a row.

    Raises:
        InputError: if a contig does not exist or is assigned to two splits, or a split would have no rows.
    """
    if length < 1:
        raise InputError(f"the length of a row is {length} bp: use 1 or more.")
    purposes: dict[str, str] = {}
    for purpose, names in (("valid", valid), ("test", test), ("exclude", exclude)):
        for name in names:
            if name not in contig_lengths:
                raise InputError(
                    f"the reference has no contig '{name}' (--{purpose}): {suggest_names(name, contig_lengths)}."
                )
            if purposes.setdefault(name, purpose) != purpose:
                raise InputError(
                    f"contig '{name}' is given to --{purposes[name]} and to --{purpose}: give it to one of them."
                )
    rows = {name: contig_length // length for name, contig_length in contig_lengths.items()}
    for split in SPLITS:
        if not any(count for name, count in rows.items() if purposes.get(name, "train") == split):
            raise InputError(
                f"no contig of {length} bp is left for {split}: "
                + (
                    f"name a longer one in --{split}."
                    if split in purposes.values()
                    else "give it one, or a shorter --length."
                )
            )
    for name, count in rows.items():
        split_name = purposes.get(name, "train")
        if split_name in SPLITS:
            for number in range(count):
                yield Interval(name, number * length, (number + 1) * length, cast(Split, split_name))


def table_lines(path: str | os.PathLike[str], content: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a table of positions, each with its place for error messages.

    The file is plain or compressed, "-" is standard input. Blank lines, lines that start with '#', 'track' or
    'browser', and a header line such as `chrom start end` are skipped.

    Raises:
        InputError: if the file cannot be read; `content` describes what it should contain.
    """
    label = source_label(path)
    with contextlib.closing(read_lines(path, label)) as lines:
        first = True
        for number, line in enumerate(lines, start=1):
            text = line.rstrip("\r\n")
            if not text.strip() or text.startswith(_COMMENTS):
                continue
            if len(text) > _LONGEST_LINE:
                raise InputError(
                    f"{label}, line {number} has more than {_LONGEST_LINE:,} characters: give a text file of {content}."
                )
            header = first and _is_header(text)
            first = False
            if not header:
                yield text, f"{label}, line {number}"


def _is_header(text: str) -> bool:
    """Whether a line names the columns of chromosome, start and end."""
    fields = [field.strip().lower() for field in (text.split("\t") if "\t" in text else text.split())]
    return len(fields) >= 3 and fields[1] in _START_NAMES and fields[2] in _END_NAMES


def _parse_row(text: str, place: str) -> Interval:
    fields = text.split("\t")
    if len(fields) != 4:
        remedy = "separate them by tabs" if len(fields) == 1 and len(text.split()) >= 4 else "write those four"
        raise InputError(
            f"{place} has {len(fields)} tab-separated field{'' if len(fields) == 1 else 's'}, not the four chromosome, "
            f"start, end and split: {remedy}."
        )
    chromosome, start, end, split = (field.strip() for field in fields)
    if not chromosome:
        raise InputError(f"{place} names no chromosome: write it in the first field.")
    for what, number in (("start", start), ("end", end)):
        if not _POSITION.fullmatch(number):
            header = ": remove the header line" if place.endswith("line 1") else ": write an integer number of bases"
            raise InputError(f"{place} has the {what} '{number}', which is not a position{header}.")
    if split not in SPLITS:
        raise InputError(f"{place} has the split '{split}': use train, valid or test.")
    if int(start) >= int(end):
        raise InputError(f"{place} ends at {end}, which is not after its start {start}: ends are exclusive.")
    return Interval(chromosome, int(start), int(end), cast(Split, split))


def _require_within(row: Interval, contig_lengths: Mapping[str, int], reference_label: str, place: str) -> None:
    length = contig_lengths.get(row.chromosome)
    if length is None:
        raise InputError(
            f"{place} names the chromosome '{row.chromosome}', which {reference_label} does not have: "
            f"{suggest_names(row.chromosome, contig_lengths)}."
        )
    if row.end > length or row.start < 0:
        raise InputError(
            f"{place} ends at {row.end}, beyond the {length} bp of '{row.chromosome}' in {reference_label}: use the "
            "assembly that the intervals were made for."
        )
