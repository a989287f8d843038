"""Audit and repair of bases shared between training, validation and test windows once a rule has extended them.

The rows of a published split do not overlap, but the windows made from them may: a row of 2^17 bp that is extended to
2^20 reaches into neighbouring rows, which may belong to another split. All counts are exact: windows are clipped to
their contig and merged into unions, and |A and B| = |A| + |B| - |A or B|.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from genomamba.data.intervals import SPLITS, Interval, Positions, RuleWindows, Split, WindowRule
from mambacore.safe_text import table_line

Repair = Literal["drop", "trim"]
REPAIRS: Final[tuple[Repair, ...]] = ("drop", "trim")

ALL_CHROMOSOMES: Final = "all"
"""Chromosome column of a report's rows with sums over chromosomes."""

_PAIRS: Final[tuple[tuple[Split, Split], ...]] = tuple(itertools.combinations(SPLITS, 2))


class Region:
    """A set of bases of one chromosome, as merged ranges: disjoint, sorted and not adjacent."""

    def __init__(self, starts: Positions, ends: Positions) -> None:
        """Merge ranges [start, end) in any order; empty ones are ignored."""
        filled = starts < ends
        order = np.argsort(starts[filled], kind="stable")
        starts, ends = starts[filled][order], ends[filled][order]
        reached = np.maximum.accumulate(ends)
        begins = np.ones(len(starts), dtype=np.bool_)
        begins[1:] = starts[1:] > reached[:-1]
        closes = np.append(begins[1:], True)[: len(starts)]
        self.starts: Positions = starts[begins]
        self.ends: Positions = reached[closes]

    @classmethod
    def empty(cls) -> "Region":
        """Return an empty region."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    @property
    def bases(self) -> int:
        """Number of bases (bp)."""
        return int((self.ends - self.starts).sum())

    def union(self, other: "Region") -> "Region":
        """Return the union of two regions."""
        return Region(np.concatenate([self.starts, other.starts]), np.concatenate([self.ends, other.ends]))

    def shared_bases(self, other: "Region") -> int:
        """Return the number of bases in both (bp)."""
        return self.bases + other.bases - self.union(other).bases

    def touches(self, starts: Positions, ends: Positions) -> npt.NDArray[np.bool_]:
        """Return for each range [start, end) whether it overlaps the region."""
        first_after = np.searchsorted(self.ends, starts, side="right")  # the first range that ends beyond the start
        begins = np.append(self.starts, np.iinfo(np.int64).max)[first_after]
        return (begins < ends) & (starts < ends)

    def gaps_within(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of [start, end) outside the region."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, end, side="left"))
        boundaries = [start]
        for begin, close in zip(self.starts[first:last], self.ends[first:last], strict=True):
            boundaries += [int(begin), int(close)]
        boundaries.append(end)
        return [(left, right) for left, right in zip(boundaries[::2], boundaries[1::2], strict=True) if left < right]


@dataclass(frozen=True)
class SharedBases:
    """Overlap between the windows of two splits on one chromosome, or on all.

    - `first_bases`, `second_bases`: bases covered by the windows of each split, each counted once.
    - `shared_bases`: bases covered by windows of both.
    - `first_windows`, `second_windows`: number of windows of each split;
      `first_windows_touched`, `second_windows_touched`: those that overlap a window of the other split.
    """

    first: Split
    second: Split
    chromosome: str
    first_bases: int
    second_bases: int
    shared_bases: int
    first_windows: int
    first_windows_touched: int
    second_windows: int
    second_windows_touched: int


AUDIT_COLUMNS: Final = tuple(SharedBases.__dataclass_fields__)


@dataclass(frozen=True)
class RepairSummary:
    """Effect of a repair on the rows of one split; a trimmed row may be replaced by several."""

    split: Split
    rows_before: int
    rows_dropped: int
    rows_trimmed: int
    rows_after: int


@dataclass(frozen=True)
class _Coverage:
    """The windows of one split on one chromosome, clipped to the contig."""

    starts: Positions
    ends: Positions
    rows: Positions
    region: Region


def audit_intervals(
    rows: Sequence[Interval], rule: WindowRule, length: int, contig_lengths: Mapping[str, int]
) -> list[SharedBases]:
    """Count the bases shared by windows of two splits: for each pair of splits by chromosome, then in total.

    Raises:
        InputError: if the rule does not support the length.
    """
    coverages = {split: _coverages(rows, split, rule, length, contig_lengths) for split in SPLITS}
    nothing = np.empty(0, dtype=np.int64)
    absent = _Coverage(nothing, nothing, nothing, Region.empty())
    chromosomes = list(dict.fromkeys(row.chromosome for row in rows))
    report: list[SharedBases] = []
    for first, second in _PAIRS:
        lines = [
            _compare(first, second, name, coverages[first].get(name, absent), coverages[second].get(name, absent))
            for name in chromosomes
        ]
        counted = AUDIT_COLUMNS[3:]
        sums = {column: sum(getattr(line, column) for line in lines) for column in counted}
        report += [*lines, SharedBases(first, second, ALL_CHROMOSOMES, **sums)]
    return report


def audit_table(report: Iterable[SharedBases]) -> Iterator[str]:
    """Yield the lines of a report as tab-separated text with a header, without newlines."""
    yield table_line(AUDIT_COLUMNS)
    for line in report:
        yield table_line(str(getattr(line, column)) for column in AUDIT_COLUMNS)


def repair_intervals(
    rows: Sequence[Interval], rule: WindowRule, length: int, contig_lengths: Mapping[str, int], repair: Repair
) -> tuple[list[Interval], list[RepairSummary]]:
    """Change rows so that windows of `length` bp made by `rule` share no base between splits.

    Test rows are unchanged; validation gives way to test, and training to both.

    - "drop" removes each row that has a window with a shared base.
    - "trim" replaces such a row by the parts that no other split uses and that are long enough to contain the rule's
      windows (`WindowRule.needed_row_length`). A part may lie anywhere in the row and, for rows shorter
      than that, in any window around the row, so a window moves away from a boundary instead of being lost. A row
      without such a part is removed.

    Returns the rows, in their order, and what happened to each split.

    Raises:
        InputError: if the rule does not support the length.
    """
    replacements: dict[int, list[Interval]] = {}
    protected = _regions(_coverages(rows, "test", rule, length, contig_lengths))
    summaries = [_summary("test", rows, {})]
    for split in ("valid", "train"):
        changed = {
            number: _free_parts(rows[number], protected, rule, length, contig_lengths) if repair == "trim" else []
            for number in _rows_touched(rows, split, rule, length, contig_lengths, protected)
        }
        replacements |= changed
        summaries.insert(0, _summary(split, rows, changed))
        kept = [part for number, row in enumerate(rows) for part in changed.get(number, [row])]
        for name, region in _regions(_coverages(kept, split, rule, length, contig_lengths)).items():
            protected[name] = protected[name].union(region) if name in protected else region
    return [part for number, row in enumerate(rows) for part in replacements.get(number, [row])], summaries


def _coverages(
    rows: Sequence[Interval], split: Split, rule: WindowRule, length: int, contig_lengths: Mapping[str, int]
) -> dict[str, _Coverage]:
    """Return the windows of a split by chromosome; `rows` of the result are positions in the given rows."""
    numbers = [number for number, row in enumerate(rows) if row.split == split]
    windows = RuleWindows([rows[number] for number in numbers], rule, length, contig_lengths)
    by_chromosome: dict[str, list[int]] = {}
    for position, row in enumerate(windows.rows):
        by_chromosome.setdefault(row.chromosome, []).append(position)
    coverages: dict[str, _Coverage] = {}
    for name, positions in by_chromosome.items():
        starts, of_row = windows.starts_of_rows(np.array(positions, dtype=np.int64))
        ends = np.minimum(starts + length, contig_lengths[name])
        starts = np.maximum(starts, 0)
        coverages[name] = _Coverage(starts, ends, np.array(numbers, dtype=np.int64)[of_row], Region(starts, ends))
    return coverages


def _regions(coverages: Mapping[str, _Coverage]) -> dict[str, Region]:
    return {name: coverage.region for name, coverage in coverages.items()}


def _compare(first: Split, second: Split, name: str, ours: _Coverage, theirs: _Coverage) -> SharedBases:
    return SharedBases(
        first,
        second,
        name,
        first_bases=ours.region.bases,
        second_bases=theirs.region.bases,
        shared_bases=ours.region.shared_bases(theirs.region),
        first_windows=len(ours.starts),
        first_windows_touched=int(theirs.region.touches(ours.starts, ours.ends).sum()),
        second_windows=len(theirs.starts),
        second_windows_touched=int(ours.region.touches(theirs.starts, theirs.ends).sum()),
    )


def _rows_touched(
    rows: Sequence[Interval],
    split: Split,
    rule: WindowRule,
    length: int,
    contig_lengths: Mapping[str, int],
    protected: Mapping[str, Region],
) -> list[int]:
    """Return the numbers of a split's rows with a window that overlaps protected bases, ascending."""
    touched: set[int] = set()
    for name, coverage in _coverages(rows, split, rule, length, contig_lengths).items():
        if name in protected:
            touched |= set(coverage.rows[protected[name].touches(coverage.starts, coverage.ends)].tolist())
    return sorted(touched)


def _free_parts(
    row: Interval,
    protected: Mapping[str, Region],
    rule: WindowRule,
    length: int,
    contig_lengths: Mapping[str, int],
) -> list[Interval]:
    """Return the unprotected parts around a row that are long enough to contain windows."""
    needed = rule.needed_row_length(length)
    start = max(0, min(row.start, row.end - needed))
    end = min(contig_lengths[row.chromosome], max(row.end, row.start + needed))
    gaps = protected.get(row.chromosome, Region.empty()).gaps_within(start, end)
    return [replace(row, start=left, end=right) for left, right in gaps if right - left >= needed]


def _summary(split: Split, rows: Sequence[Interval], changed: Mapping[int, list[Interval]]) -> RepairSummary:
    before = sum(row.split == split for row in rows)
    dropped = sum(not parts for parts in changed.values())
    return RepairSummary(
        split, before, dropped, len(changed) - dropped, before - len(changed) + sum(map(len, changed.values()))
    )
