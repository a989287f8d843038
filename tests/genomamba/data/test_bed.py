"""Regions: BED files of any kind, regions on the command line, and their union."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genomamba.data.bed import Region, merged, parse_region, read_bed
from genomamba.data.intervals import intervals_text, read_intervals
from mambacore.errors import InputError

LENGTHS = {"chr1": 1000, "chr2": 50, "a:b": 9}
NAMES = st.sampled_from(list(LENGTHS))


@st.composite
def regions(draw: st.DrawFn) -> Region:
    contig = draw(NAMES)
    start = draw(st.integers(0, LENGTHS[contig] - 1))
    end = draw(st.integers(start + 1, LENGTHS[contig]))
    name = draw(st.from_regex(r"[!-~]{1,9}", fullmatch=True))
    return Region(contig, start, end, name, draw(st.sampled_from("+-.")))


@given(rows=st.lists(regions(), min_size=1, max_size=8))
def test_regions_come_back_as_they_were_written(rows: list[Region]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "regions.bed"
        path.write_text(
            "track name=x\n# note\n\n"
            + "".join(f"{row.contig}\t{row.start}\t{row.end}\t{row.name}\t0\t{row.strand}\r\n" for row in rows)
        )
        assert read_bed(path, LENGTHS) == rows


def test_three_columns_and_blanks_between_them_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "regions.bed"
    path.write_text("chr1 5 9\nchr1\t0\t1\tgene\t0\t-\tmore\tcolumns\n")
    assert read_bed(path, LENGTHS) == [Region("chr1", 5, 9), Region("chr1", 0, 1, "gene", "-")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chr1\t5\n", r"regions.bed, line 1 has fewer than 3 columns"),
        ("chr1\tx\t9\n", "line 1 has the start 'x'"),
        ("chr1\t1\t-9\n", "line 1 has the end '-9'"),
        ("chr1\t9\t9\n", "line 1 is empty"),
        ("1\t1\t9\n", "names the contig '1', which the reference does not have: did you mean 'chr1'"),
        ("chr2\t1\t51\n", "ends at 51, beyond the 50 bp"),
        ("chr1\t1\t9\tx\t0\t?\n", "strand '\\?'"),
        ("# nothing\n", "has no regions"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "regions.bed"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_bed(path, LENGTHS)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=60) | st.text("chr12\t \n0123456789+-.", max_size=60).map(str.encode))
def test_no_bytes_crash_the_readers_of_regions_and_intervals(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "regions.bed"
        path.write_bytes(content)
        for read in (lambda: read_bed(path, LENGTHS), lambda: read_intervals(path, LENGTHS)):
            try:
                assert read()
            except InputError as error:
                assert str(error).endswith(".")


@given(
    rows=st.lists(
        st.tuples(NAMES, st.integers(0, 500), st.integers(1, 500), st.sampled_from(["train", "valid", "test"])),
        min_size=1,
    )
)
def test_intervals_come_back_as_they_were_written(rows: list[tuple[str, int, int, str]]) -> None:
    text = "".join(f"{contig}\t{start}\t{start + length}\t{split}\n" for contig, start, length, split in rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "intervals.bed"
        path.write_text(text)
        assert intervals_text(read_intervals(path)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chr1", Region("chr1", 0, 1000)),
        ("chr1:1-1,000", Region("chr1", 0, 1000)),
        ("chr2:7-7", Region("chr2", 6, 7)),
        ("chr1:101-", Region("chr1", 100, 1000)),
        ("chr1:5", Region("chr1", 4, 1000)),
        ("a:b", Region("a:b", 0, 9)),
        ("a:b:2-3", Region("a:b", 1, 3)),
    ],
)
def test_a_region_is_written_as_genome_browsers_write_it(text: str, expected: Region) -> None:
    assert parse_region(text, LENGTHS) == expected


@pytest.mark.parametrize(
    "text", ["2", "chr2:0-5", "chr2:9-8", "chr2:1-51", "chr3:1-2", "chr1:x", "chr1:1001-", "chr9:5-", ""]
)
def test_a_region_that_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_region(text, LENGTHS)


@given(rows=st.lists(regions(), max_size=12))
def test_merged_regions_hold_the_same_bases_once_and_in_order(rows: list[Region]) -> None:
    found = merged(rows, LENGTHS)
    expected = {(row.contig, place) for row in rows for place in range(row.start, row.end)}
    places = [(row.contig, place) for row in found for place in range(row.start, row.end)]
    assert set(places) == expected
    order = list(LENGTHS)
    assert places == sorted(places, key=lambda one: (order.index(one[0]), one[1]))
    assert len(places) == len(expected)


@pytest.mark.parametrize("number", ["9" * 5000, "²", "1_0", "٣", "+5"])
def test_what_is_not_a_plain_integer_is_not_a_position(number: str, tmp_path: Path) -> None:
    """Python would take some of these, and fail in converting others."""
    path = tmp_path / "regions.bed"
    path.write_text(f"chr1\t{number}\t60\n", encoding="utf-8")
    with pytest.raises(InputError):
        read_bed(path, {"chr1": 10**9}, "the reference")
    with pytest.raises(InputError):
        parse_region(f"chr1:{number}-60", {"chr1": 10**9})


@pytest.mark.parametrize("text", ["chr1:0-10", "chr1:0", "chr1:000-5"])
def test_a_region_from_zero_is_told_that_positions_count_from_one(text: str) -> None:
    with pytest.raises(InputError, match=f"the region '{text}' starts at 0: its positions count from 1"):
        parse_region(text, {"chr1": 100})
