"""Intervals, the published window rules, and the audit: each against a definition that looks at single bases."""

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genomamba.data.interval_audit import (
    ALL_CHROMOSOMES,
    REPAIRS,
    Region,
    Repair,
    audit_intervals,
    audit_table,
    repair_intervals,
)
from genomamba.data.intervals import (
    CADUCEUS_REACH_BP,
    SPLITS,
    WINDOW_RULES,
    Interval,
    RuleWindows,
    WindowRule,
    intervals_text,
    read_intervals,
    tile_contigs,
    window_rule,
)
from mambacore.errors import InputError

CONTIGS = {"a": 200, "b": 90, "short": 20}
# The rules as published, Caduceus' with a reach that suits small contigs.
SMALL_RULES = [
    WINDOW_RULES["hyenadna"],
    WINDOW_RULES["mamba"],
    WindowRule(
        "caduceus",
        lambda row_lengths, length: np.full_like(row_lengths, 64 // length),
        WINDOW_RULES["caduceus"].starts,
        "shift",
        64,
    ),
]


@st.composite
def rows_of_small_contigs(draw: st.DrawFn) -> list[Interval]:
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(sorted(CONTIGS)))
        start = draw(st.integers(0, CONTIGS[name] - 1))
        end = draw(st.integers(start + 1, min(CONTIGS[name], start + 70)))
        rows.append(Interval(name, start, end, draw(st.sampled_from(SPLITS))))
    return rows


def windows_of(rule: str, start: int, end: int, length: int, contig: int = 10_000_000) -> list[tuple[int, int]]:
    windows = RuleWindows([Interval("c", start, end, "train")], window_rule(rule), length, {"c": contig})
    return [(window.start, window.end) for window in windows]


@pytest.mark.parametrize(
    ("rule", "row", "length", "expected"),
    [
        ("hyenadna", (100, 200), 30, [(100, 130)]),
        ("hyenadna", (100, 200), 100, [(100, 200)]),
        ("hyenadna", (100, 200), 103, [(99, 202)]),  # the odd base goes to the right
        ("hyenadna", (10, 20), 40, [(-5, 35)]),  # padded
        ("mamba", (100, 200), 30, [(100, 130), (130, 160), (160, 190)]),
        ("mamba", (100, 200), 100, [(100, 200)]),
        ("mamba", (100, 200), 130, [(100, 230), (70, 200)]),
    ],
)
def test_the_rules_of_hyenadna_and_mamba(
    rule: str, row: tuple[int, int], length: int, expected: list[tuple[int, int]]
) -> None:
    assert windows_of(rule, *row, length) == expected


def test_the_rule_of_caduceus() -> None:
    half = CADUCEUS_REACH_BP // 2
    assert windows_of("caduceus", 100, 200, half) == [(100, 100 + half), (100 + half, 100 + 2 * half)]
    assert windows_of("caduceus", 100, 200, half, contig=half + 50) == [(50, 50 + half)] * 2  # back inside the contig
    assert windows_of("caduceus", 100, 200, half, contig=half - 50) == [(0, half)] * 2  # the contig is shorter
    assert len(windows_of("caduceus", 0, 1, 1024)) == 1024
    with pytest.raises(InputError, match="which 1000 bp does not divide"):
        windows_of("caduceus", 100, 200, 1000)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_small_contigs(), rule=st.sampled_from(SMALL_RULES), length=st.sampled_from([1, 8, 32, 64]))
def test_single_windows_are_those_of_whole_rows(rows: list[Interval], rule: WindowRule, length: int) -> None:
    windows = RuleWindows(rows, rule, length, CONTIGS)
    starts, numbers = windows.starts_of_rows(np.arange(len(rows)))
    assert [(window.start, window.row) for window in windows] == list(
        zip(starts.tolist(), numbers.tolist(), strict=True)
    )
    assert windows[-1] == windows[len(windows) - 1]
    with pytest.raises(IndexError):
        windows[len(windows)]


def bases_by_definition(
    rows: list[Interval], rule: WindowRule, length: int, split: str, name: str
) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    mask = np.zeros(CONTIGS[name], dtype=np.bool_)
    for window in RuleWindows([row for row in rows if row.split == split], rule, length, CONTIGS):
        if window.chromosome == name:
            mask[max(window.start, 0) : max(window.end, 0)] = True
    return mask


@settings(max_examples=150, deadline=None)
@given(rows=rows_of_small_contigs(), rule=st.sampled_from(SMALL_RULES), length=st.sampled_from([1, 8, 32, 64]))
def test_the_audit_counts_what_looking_at_every_base_counts(
    rows: list[Interval], rule: WindowRule, length: int
) -> None:
    report = audit_intervals(rows, rule, length, CONTIGS)
    totals = {pair: [0, 0, 0] for pair in itertools.combinations(SPLITS, 2)}
    for line in report:
        counts = [line.first_bases, line.second_bases, line.shared_bases]
        if line.chromosome == ALL_CHROMOSOMES:
            assert counts == totals[line.first, line.second]
            continue
        first = bases_by_definition(rows, rule, length, line.first, line.chromosome)
        second = bases_by_definition(rows, rule, length, line.second, line.chromosome)
        assert counts == [first.sum(), second.sum(), (first & second).sum()]
        touched = [
            second[max(window.start, 0) : max(window.end, 0)].any()
            for window in RuleWindows([row for row in rows if row.split == line.first], rule, length, CONTIGS)
            if window.chromosome == line.chromosome
        ]
        assert (line.first_windows, line.first_windows_touched) == (len(touched), sum(touched))
        totals[line.first, line.second] = [a + b for a, b in zip(totals[line.first, line.second], counts, strict=True)]


@settings(max_examples=200, deadline=None)
@given(
    rows=rows_of_small_contigs(),
    rule=st.sampled_from(SMALL_RULES),
    length=st.sampled_from([1, 8, 32, 64]),
    repair=st.sampled_from(REPAIRS),
)
def test_repaired_intervals_share_nothing(rows: list[Interval], rule: WindowRule, length: int, repair: Repair) -> None:
    repaired, summaries = repair_intervals(rows, rule, length, CONTIGS, repair)
    assert all(line.shared_bases == 0 for line in audit_intervals(repaired, rule, length, CONTIGS))
    assert [row for row in repaired if row.split == "test"] == [row for row in rows if row.split == "test"]
    for summary in summaries:
        assert summary.rows_before == sum(row.split == summary.split for row in rows)
        assert summary.rows_after == sum(row.split == summary.split for row in repaired)
    if repair == "drop":
        remaining = iter(rows)
        assert all(row in remaining for row in repaired)  # some of the rows, in their order
    if all(line.shared_bases == 0 for line in audit_intervals(rows, rule, length, CONTIGS)):
        assert repaired == rows


def test_only_rows_that_leak_are_dropped_and_trimming_moves_a_window_away() -> None:
    rows = [Interval("a", 0, 20, "train"), Interval("a", 60, 80, "train"), Interval("a", 80, 100, "test")]
    dropped, _ = repair_intervals(rows, WINDOW_RULES["hyenadna"], 24, CONTIGS, "drop")
    assert dropped == [rows[0], rows[2]]
    trimmed, summaries = repair_intervals(rows, WINDOW_RULES["hyenadna"], 24, CONTIGS, "trim")
    assert trimmed == [rows[0], rows[2]]  # [56, 78) is all that the test window [78, 102) leaves
    assert summaries[0].rows_dropped == 1
    further = [rows[0], Interval("a", 58, 78, "train"), rows[2]]
    trimmed, summaries = repair_intervals(further, WINDOW_RULES["hyenadna"], 24, CONTIGS, "trim")
    assert trimmed == [rows[0], Interval("a", 54, 78, "train"), rows[2]]
    assert summaries[0].rows_trimmed == 1


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8), st.integers(0, 60), st.integers(0, 60))
def test_a_region_is_the_set_of_its_bases(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    region = Region(
        np.array([low for low, _ in ranges], dtype=np.int64), np.array([high for _, high in ranges], dtype=np.int64)
    )
    bases = {base for low, high in ranges for base in range(low, high)}
    assert region.bases == len(bases)
    assert np.all(region.starts[1:] > region.ends[:-1])
    assert bool(region.touches(np.array([start]), np.array([end]))[0]) == bool(bases & set(range(start, end)))
    free = [base for low, high in region.gaps_within(start, end) for base in range(low, high)]
    assert free == [base for base in range(start, end) if base not in bases]


def test_the_table_has_a_header_and_a_line_for_every_count() -> None:
    rows = [Interval("a", 0, 20, "train"), Interval("a", 10, 30, "test")]
    lines = list(audit_table(audit_intervals(rows, WINDOW_RULES["mamba"], 20, CONTIGS)))
    assert lines[0].split("\t")[:6] == ["first", "second", "chromosome", "first_bases", "second_bases", "shared_bases"]
    assert "train\ttest\ta\t20\t20\t10\t1\t1\t1\t1" in lines


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_small_contigs())
def test_a_file_of_intervals_reads_as_it_was_written(
    rows: list[Interval], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.bed"
    path.write_text(intervals_text(rows), encoding="utf-8")
    assert read_intervals(path, CONTIGS) == rows
    path.write_bytes(gzip.compress(b"# made by hand\n\n" + intervals_text(rows).replace("\n", "\r\n").encode()))
    assert read_intervals(path) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no intervals"),
        ("name\tfrom\tto\tsplit\n", "line 1 has the start 'from', which is not a position: remove the header line"),
        ("a\t0\t5\ttrain\na\t1\n", "line 2 has 2 tab-separated fields"),
        ("a 0 5 train\n", "line 1 has 1 tab-separated field, .*separate them by tabs"),
        ("a\t-1\t5\ttrain\n", "line 1 has the start '-1'"),
        ("a\t0\t5\tdev\n", "line 1 has the split 'dev': use train, valid or test"),
        ("\n\na\t5\t5\ttrain\n", "line 3 ends at 5, which is not after its start 5"),
        ("chra\t0\t5\ttrain\n", "line 1 names the chromosome 'chra', .*did you mean 'a'"),
        ("a\t0\t201\ttest\n", "line 1 ends at 201, beyond the 200 bp of 'a' in ref.fa"),
        ("\t0\t5\ttrain\n", "line 1 names no chromosome"),
        ("\xff\xfe", "is UTF-16 text"),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.bed"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as raised:
        read_intervals(path, CONTIGS, "ref.fa")
    assert str(path) in str(raised.value)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=60))
def test_no_content_crashes_the_reader(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.bed"
    for written in (content, b"\x1f\x8b" + content, gzip.compress(content)[:-3]):
        path.write_bytes(written)
        try:
            read_intervals(path, CONTIGS)
        except InputError as error:
            assert str(path) in str(error)


def test_splits_by_contig() -> None:
    lengths = {"one": 25, "two": 30, "three": 19, "left": 40, "tiny": 9}
    rows = list(tile_contigs(lengths, 10, valid=["two"], test=["three"], exclude=["left"]))
    assert rows == [
        Interval("one", 0, 10, "train"),
        Interval("one", 10, 20, "train"),
        Interval("two", 0, 10, "valid"),
        Interval("two", 10, 20, "valid"),
        Interval("two", 20, 30, "valid"),
        Interval("three", 0, 10, "test"),
    ]
    for rule in ("hyenadna", "mamba", "caduceus"):
        report = audit_intervals(rows, WINDOW_RULES[rule], 16, lengths)
        assert not any(line.shared_bases for line in report)
    with pytest.raises(InputError, match="given to --valid and to --test"):
        list(tile_contigs(lengths, 10, ["two"], ["two"]))
    with pytest.raises(InputError, match=r"no contig 'tow' .*did you mean 'two'"):
        list(tile_contigs(lengths, 10, ["tow"], ["three"]))
    with pytest.raises(InputError, match="no contig of 10 bp is left for test: name a longer one in --test"):
        list(tile_contigs(lengths, 10, ["two"], ["tiny"]))
    with pytest.raises(InputError, match="is left for train"):
        list(tile_contigs({"one": 20, "two": 20}, 10, ["one"], ["two"]))


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(InputError, match="no window rule 'enformer': use hyenadna, mamba, caduceus"):
        window_rule("enformer")
