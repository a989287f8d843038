"""Which bases do training, validation and test windows share, once a rule has grown them; and how to stop it.

The rows of a published split do not overlap, the windows made from them do: a row of 2^17 bp that grows to 2^20 reaches
into its neighbours' rows, which may be of another split. Everything here is exact: windows are clipped to their contig
and merged into unions, and |A and B| = |A| + |B| - |A or B|.
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
"""What stands for the sum over chromosomes in a report."""

_PAIRS: Final[tuple[tuple[Split, Split], ...]] = tuple(itertools.combinations(SPLITS, 2))


class Region:
    """A set of bases of one chromosome, as merged ranges: disjoint, sorted, none touching the next."""

    def __init__(self, starts: Positions, ends: Positions) -> None:
        """Merge ranges [start, end) in any order; empty ones are left out."""
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
        """Return the region without bases."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    @property
    def bases(self) -> int:
        """How many bases there are (bp)."""
        return int((self.ends - self.starts).sum())

    def union(self, other: "Region") -> "Region":
        """Return the bases of either."""
        return Region(np.concatenate([self.starts, other.starts]), np.concatenate([self.ends, other.ends]))

    def shared_bases(self, other: "Region") -> int:
        """Return how many bases are in both (bp)."""
        return self.bases + other.bases - self.union(other).bases

    def touches(self, starts: Positions, ends: Positions) -> npt.NDArray[np.bool_]:
        """Say for each range [start, end) whether it has a base in the region."""
        first_after = np.searchsorted(self.ends, starts, side="right")  # the first range that ends beyond the start
        begins = np.append(self.starts, np.iinfo(np.int64).max)[first_after]
        return (begins < ends) & (starts < ends)

    def gaps_within(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges of [start, end) that have no base in the region."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, end, side="left"))
        borders = [start]
        for begin, close in zip(self.starts[first:last], self.ends[first:last], strict=True):
            borders += [int(begin), int(close)]
        borders.append(end)
        return [(left, right) for left, right in zip(borders[::2], borders[1::2], strict=True) if left < right]


@dataclass(frozen=True)
class SharedBases:
    """What the windows of two splits have in common on one chromosome, or on all of them.

    - `first_bases`, `second_bases`: bases under the windows of each split, each counted once.
    - `shared_bases`: those under windows of both.
    - `first_windows`, `second_windows`: all windows of each split;
      `first_windows_touched`, `second_windows_touched`: those with a base that a window of the other split has too.
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
    """What a repair did to the rows of one split; a trimmed row may have become several."""

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
    """Count the bases that windows of two splits share: for each pair of splits every chromosome, then the sum.

    Raises:
        InputError: a length that the rule cannot use.
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
    """Yield the lines of a report as tab-separated text with a header, without line ends."""
    yield "\t".join(AUDIT_COLUMNS)
    for line in report:
        yield table_line(str(getattr(line, column)) for column in AUDIT_COLUMNS)


def repair_intervals(
    rows: Sequence[Interval], rule: WindowRule, length: int, contig_lengths: Mapping[str, int], repair: Repair
) -> tuple[list[Interval], list[RepairSummary]]:
    """Change rows so that windows of `length` bp made by `rule` share no base between splits.

    Test rows stay as they are; validation gives way to test, and training to both.

    - "drop" leaves out each row that has a window with a shared base.
    - "trim" replaces such a row by the parts that no other split uses and that are long enough for the rule's windows
      to stay inside them (`WindowRule.needed_row_length`). A part may lie anywhere in the row and, for rows shorter
      than that, in any window around the row, so a window moves away from a border instead of being lost. A row
      without such a part is left out.

    Returns the rows, in their order, and what happened to each split.

    Raises:
        InputError: a length that the rule cannot use.
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
    """Return the numbers of a split's rows with a window that has a protected base, ascending."""
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
    """Return the parts of a row's surroundings that are not protected and long enough for windows to stay inside."""
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
