"""A reference genome on disk: the right letters, and an index that fits it."""

import gzip
import importlib.util
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyfaidx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genomamba.io import reference_index
from genomamba.io.reference import Reference, suggest_names
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError
from tiny_references import CONTIGS, block_gzip, fasta_bytes


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_bytes(CONTIGS))
    return path


def set_modified(path: Path, seconds_from_now: float) -> None:
    now = path.stat().st_mtime
    os.utime(path, (now + seconds_from_now, now + seconds_from_now))


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("width", [1, 60, 61, 100_000])
def test_every_range_is_what_the_file_says(tmp_path: Path, width: int, line_end: bytes) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(fasta_bytes(CONTIGS, width, line_end))
    genome = Reference(path)
    assert genome.lengths == {name: len(letters) for name, letters in CONTIGS.items()}
    random = np.random.default_rng(0)
    for name, letters in CONTIGS.items():
        for start, end in [(0, len(letters)), (0, 0), (len(letters), len(letters)), (59, 61), (60, 61), (0, 60)]:
            assert genome.letters(name, start, end) == letters[start:end]
        for start, end in np.sort(random.integers(len(letters) + 1, size=(30, 2)), axis=1).tolist():
            assert genome.letters(name, start, end) == letters[start:end]


@pytest.mark.parametrize(
    ("end_of_file", "start_of_file"), [(b"", b""), (b"\n\n", b""), (b"", b";a comment\n\n"), (b"\r\n", b"\n")]
)
def test_blank_lines_and_comments_around_the_records(tmp_path: Path, end_of_file: bytes, start_of_file: bytes) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(start_of_file + fasta_bytes({"a": b"ACGT" * 30, "empty": b"", "b": b"GG"})[:-1] + end_of_file)
    genome = Reference(path)
    assert genome.lengths == {"a": 120, "empty": 0, "b": 2}
    assert genome.letters("b", 0, 2) == b"GG"
    assert genome.letters("empty", -1, 2, pad=True) == b"NNN"


def test_tokens_are_those_of_the_tokenizer(genome: Path) -> None:
    expected = CharacterTokenizer().encode(CONTIGS["chr1"][100:300])
    tokens = Reference(genome).tokens("chr1", 100, 300)
    np.testing.assert_array_equal(tokens, expected)
    tokens[0] = 0  # a fresh array


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(-150, 200), length=st.integers(0, 300))
def test_beyond_the_ends_is_n_on_request(genome: Path, start: int, length: int) -> None:
    letters = CONTIGS["chrM"]
    surrounded = b"N" * 1000 + letters + b"N" * 1000
    padded = Reference(genome).letters("chrM", start, start + length, pad=True)
    assert padded == surrounded[1000 + start : 1000 + start + length]


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (0, 62), (62, 62), (5, 4)])
def test_a_range_outside_is_refused_without_padding(genome: Path, start: int, end: int) -> None:
    with pytest.raises(InputError, match=rf"\[{start}, {end}\) is not a range within the 61 bp of 'chrM'"):
        Reference(genome).letters("chrM", start, end)
    if end < start:
        with pytest.raises(InputError, match="is not a range"):
            Reference(genome).letters("chrM", start, end, pad=True)


@pytest.mark.parametrize(
    ("name", "known", "suggestion"),
    [
        ("1", ["chr1", "chr11"], "did you mean 'chr1'"),
        ("chr1", ["1", "2"], "did you mean '1'"),
        ("chrM", ["1", "MT"], "did you mean 'MT'"),
        ("chrX1", ["chrX", "chrY"], "did you mean 'chrX'"),
        ("scaffold", ["1", "2", "3", "4"], "the names are 1, 2, 3, ..."),
        ("a", [], "it has none"),
    ],
)
def test_a_missing_contig_gets_the_nearest_names(name: str, known: list[str], suggestion: str) -> None:
    assert suggest_names(name, known).startswith(suggestion)


def test_a_missing_contig_is_refused_with_the_nearest_name(genome: Path) -> None:
    with pytest.raises(InputError, match=r"genome\.fa has no contig named '2': did you mean 'chr2'"):
        Reference(genome).letters("2", 0, 1)


def test_a_pickled_reference_opens_its_own_handle(genome: Path) -> None:
    original = Reference(genome)
    copy = pickle.loads(pickle.dumps(original))
    assert copy._handle is None
    assert copy.letters("chr2", 10, 20) == CONTIGS["chr2"][10:20]
    assert copy._handle is not original._handle


def test_closing_is_not_the_end(genome: Path) -> None:
    with Reference(genome) as opened:
        assert opened.letters("chr2", 0, 5) == CONTIGS["chr2"][:5]
    assert opened._handle is None
    assert opened.letters("chr2", 0, 5) == CONTIGS["chr2"][:5]


def test_an_index_that_fits_is_used_as_it_is(genome: Path) -> None:
    pyfaidx.Faidx(str(genome)).close()
    index = Path(f"{genome}.fai")
    before = index.stat().st_mtime_ns
    Reference(genome)
    assert index.stat().st_mtime_ns == before


def test_an_index_older_than_the_file_is_built_again(genome: Path) -> None:
    Reference(genome)
    genome.write_bytes(fasta_bytes({"other": CONTIGS["chr2"]}))
    set_modified(genome, 1000)  # into the future, which must not make every use build it again
    assert Reference(genome).letters("other", 100, 200) == CONTIGS["chr2"][100:200]
    inode = Path(f"{genome}.fai").stat().st_ino
    Reference(genome)
    assert Path(f"{genome}.fai").stat().st_ino == inode


@pytest.mark.parametrize(
    "changed",
    [
        {"chr1": CONTIGS["chr1"][:-1], "chr2": CONTIGS["chr2"], "chrM": CONTIGS["chrM"]},
        {"chr1": CONTIGS["chr1"], "chr3": CONTIGS["chr2"], "chrM": CONTIGS["chrM"]},
        {"chr1": CONTIGS["chr1"], "chr2": CONTIGS["chr2"]},
        {**CONTIGS, "chrN": b"ACGT"},
    ],
    ids=["shorter", "renamed", "fewer", "more"],
)
def test_a_stale_index_is_noticed_although_its_time_stamp_is_newer(genome: Path, changed: dict[str, bytes]) -> None:
    Reference(genome)
    genome.write_bytes(fasta_bytes(changed))
    set_modified(genome, -1000)  # as a copy that keeps the time does
    again = Reference(genome)
    assert again.lengths == {name: len(letters) for name, letters in changed.items()}
    assert all(again.letters(name, 0, len(letters)) == letters for name, letters in changed.items())


@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_that_changes_while_in_use_is_refused(genome: Path, pickled: bool) -> None:
    opened = Reference(genome)
    if pickled:
        opened = pickle.loads(pickle.dumps(opened))
    genome.write_bytes(fasta_bytes({"chr1": CONTIGS["chr2"]}))
    with pytest.raises(InputError, match="has changed since it was opened: start again"):
        opened.letters("chr1", 0, 10)
    genome.unlink()
    with pytest.raises(InputError, match="there is no file"):
        opened.letters("chr1", 0, 10)


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "uneven.fa"
    path.write_bytes(b">a\nACGT\nAC\nACGT\n")
    with pytest.raises(InputError, match=r"uneven\.fa has lines of uneven length .*seqtk"):
        Reference(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_gets_its_index_in_the_cache(
    genome: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    can_write_in = reference_index._can_write_in
    monkeypatch.setattr(reference_index, "_can_write_in", lambda at: at != genome.parent and can_write_in(at))
    assert Reference(genome).letters("chr2", 3, 9) == CONTIGS["chr2"][3:9]
    assert not Path(f"{genome}.fai").exists()
    (index,) = cache.rglob("*.fai")
    before = index.stat().st_mtime_ns
    Reference(genome)
    assert index.stat().st_mtime_ns == before
    monkeypatch.setattr(reference_index, "_can_write_in", lambda at: False)
    index.unlink()
    with pytest.raises(InputError, match="can be written neither beside it nor in"):
        Reference(genome)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.fa", b"", "is empty"),
        ("text.fa", b"ACGT\n", "is not a FASTA file, it starts with 'A'"),
        (
            "genome.fa.gz",
            gzip.compress(b">a\nACGT\n", mtime=0),
            "compressed with gzip, which does not allow random access",
        ),
        ("genome.fa.gz", b">a\nACGT\n", "is not compressed, although its name says so"),
        ("genome.fa", block_gzip(b">a\nACGT\n"), "its name does not say so"),
        ("twice.fa", b">a\nACGT\n>a x\nACGT\n", "more than one contig of the same name"),
        ("mac.fa", b">a\rACGT\rACGT\r", "classic Mac OS line endings"),
        ("unnamed.fa", b">\nACGT\n", "cannot be indexed"),
        ("binary.fa", b">a\nAC\xff\xfe\n", "contains binary data"),
    ],
)
def test_files_that_allow_no_random_access_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        Reference(path)
    assert str(path) in str(raised.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["missing.fa", "-", "."])
def test_what_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=r"there is no file|is not a regular file"):
        Reference(path)


def test_a_byte_that_is_no_base_is_named_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(b">a\nACGTACGTAC\nACGT!CGTAC\nAC GT\n")
    genome = Reference(path)
    assert genome.letters("a", 0, 14) == b"ACGTACGTACACGT"
    with pytest.raises(InputError, match=r"has '!' at base 15 of contig 'a'"):
        genome.letters("a", 3, 16)
    with pytest.raises(InputError, match=r"byte 0x20 at base 23 of contig 'a', where lines hold only bases"):
        genome.letters("a", 20, 24)


def test_block_gzip_without_biopython_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(block_gzip(fasta_bytes(CONTIGS)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs biopython: install it .*gunzip -c"):
        Reference(path)


@settings(max_examples=40, deadline=None)
@given(
    contigs=st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_.|:-]{1,12}", fullmatch=True),
        st.text("ACGTNRYKMSWBDHVacgtn", max_size=200),
        min_size=1,
        max_size=4,
    ),
    width=st.integers(1, 80),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
)
def test_any_fasta_comes_back_as_it_was_written(contigs: dict[str, str], width: int, line_end: bytes) -> None:
    letters = {name: text.encode() for name, text in contigs.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "genome.fa"
        path.write_bytes(fasta_bytes(letters, width, line_end))
        with Reference(path) as opened:
            assert list(opened.lengths) == list(letters)
            for name, expected in letters.items():
                assert opened.letters(name, 0, len(expected)) == expected


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=120) | st.binary(max_size=60).map(lambda tail: b">a\nACGT\n" + tail))
def test_no_bytes_crash_a_reference(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "genome.fa"
        path.write_bytes(content)
        try:
            with Reference(path) as opened:
                for name, length in opened.lengths.items():
                    opened.letters(name, 0, length)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_a_byte_order_mark_is_skipped(ends: bytes, tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(b"\xef\xbb\xbf" + ends.join([b">chr1 first", b"ACGTA", b"CC", b">chr2", b"GGGTT", b"A", b""]))
    for _ in range(2):  # the index is built, then read
        with Reference(path) as genome:
            assert dict(genome.lengths) == {"chr1": 7, "chr2": 6}
            assert genome.letters("chr1", 0, 7) == b"ACGTACC"
            assert genome.letters("chr2", 3, 6) == b"TTA"
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(InputError, match="is empty"):
        Reference(path)
