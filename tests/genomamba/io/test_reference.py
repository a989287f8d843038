"""A reference genome on disk: right letters, from any number of processes, and an index that is built once."""

import gzip
import importlib.util
import multiprocessing
import os
import pickle
import struct
import tempfile
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyfaidx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genomamba.io import reference as reference_module
from genomamba.io.reference import Reference, suggest_names
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError

WORKERS = 8
FETCHES_PER_WORKER = 60


def random_letters(length: int, seed: int = 0) -> bytes:
    letters = np.frombuffer(b"ACGTNacgtnRYKM", dtype=np.uint8)
    return letters[np.random.default_rng(seed).integers(len(letters), size=length)].tobytes()


CONTIGS = {"chr1": random_letters(20_011, 1), "chr2": random_letters(7_000, 2), "chrM": random_letters(61, 3)}


def fasta_bytes(contigs: dict[str, bytes], width: int = 60, line_end: bytes = b"\n") -> bytes:
    text = b""
    for name, letters in contigs.items():
        text += b">" + name.encode() + b" described" + line_end
        for start in range(0, len(letters), width):
            text += letters[start : start + width] + line_end
    return text


def block_gzip(content: bytes, block_bytes: int = 0xFF00) -> bytes:
    """BGZF after the SAM specification, section 4.1; the empty block at the end marks the end of the file."""
    blocks = b""
    for start in [*range(0, len(content), block_bytes), len(content)]:
        text = content[start : start + block_bytes]
        compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
        data = compressor.compress(text) + compressor.flush()
        header = struct.pack("<BBBBIBBHBBHH", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, len(data) + 25)
        blocks += header + data + struct.pack("<II", zlib.crc32(text), len(text))
    return blocks


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


def _fetch_many(arguments: tuple[Reference | str, int]) -> int:
    """Compare random ranges with the truth; returns how many were wrong."""
    source, seed = arguments
    genome = Reference(source) if isinstance(source, str) else source
    random = np.random.default_rng(seed)
    wrong = 0
    for _ in range(FETCHES_PER_WORKER):
        name = ("chr1", "chr2")[random.integers(2)]
        start, end = np.sort(random.integers(len(CONTIGS[name]) + 1, size=2)).tolist()
        wrong += genome.letters(name, start, end) != CONTIGS[name][start:end]
    return wrong


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_eight_workers_with_one_object_get_the_right_letters(genome: Path, method: str) -> None:
    shared = Reference(genome)
    shared.letters("chr1", 5, 500)  # its handle is open before the workers exist
    context = multiprocessing.get_context(method)
    workers = WORKERS if method == "fork" else 2  # each spawned one imports everything again
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        assert sum(pool.map(_fetch_many, [(shared, seed) for seed in range(2 * workers)])) == 0


_INHERITED: list[Reference] = []


def _fetch_with_inherited(seed: int) -> int:
    return _fetch_many((_INHERITED[0], seed))


def test_eight_forked_workers_do_not_use_the_handle_they_inherit(genome: Path) -> None:
    _INHERITED[:] = [Reference(genome)]
    _INHERITED[0].letters("chr1", 5, 500)
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")) as pool:
        assert sum(pool.map(_fetch_with_inherited, range(2 * WORKERS))) == 0


def test_threads_share_one_object(genome: Path) -> None:
    shared = Reference(genome)
    with ThreadPoolExecutor(WORKERS) as pool:
        assert sum(pool.map(_fetch_many, [(shared, seed) for seed in range(WORKERS)])) == 0


def _first_use(
    path: str,
    barrier: "threading.Barrier",
    builds: "multiprocessing.sharedctypes.Synchronized[int]",
    wrong: "multiprocessing.sharedctypes.Synchronized[int]",
) -> None:
    build = reference_module._build_index

    def counted(*arguments: object) -> None:
        with builds.get_lock():
            builds.value += 1
        time.sleep(0.2)  # long enough for the others to come by
        build(*arguments)  # type: ignore[arg-type]

    reference_module._build_index = counted  # type: ignore[assignment]
    barrier.wait()
    mistakes = _fetch_many((path, os.getpid()))
    with wrong.get_lock():
        wrong.value += mistakes


@pytest.mark.parametrize("stale", [False, True])
def test_concurrent_first_use_builds_the_index_once(genome: Path, stale: bool) -> None:
    if stale:
        Path(f"{genome}.fai").write_text("chr1\t5\t6\t5\t6\n", encoding="utf-8")
    context = multiprocessing.get_context("fork")
    barrier, builds, wrong = context.Barrier(WORKERS), context.Value("i", 0), context.Value("i", 0)
    workers = [context.Process(target=_first_use, args=(str(genome), barrier, builds, wrong)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * WORKERS
    assert (builds.value, wrong.value) == (1, 0)
    assert sorted(path.name for path in genome.parent.iterdir()) == ["genome.fa", "genome.fa.fai"]


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
    can_write_in = reference_module._can_write_in
    monkeypatch.setattr(reference_module, "_can_write_in", lambda at: at != genome.parent and can_write_in(at))
    assert Reference(genome).letters("chr2", 3, 9) == CONTIGS["chr2"][3:9]
    assert not Path(f"{genome}.fai").exists()
    (index,) = cache.rglob("*.fai")
    before = index.stat().st_mtime_ns
    Reference(genome)
    assert index.stat().st_mtime_ns == before
    monkeypatch.setattr(reference_module, "_can_write_in", lambda at: False)
    index.unlink()
    with pytest.raises(InputError, match="can be written neither beside it nor in"):
        Reference(genome)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.fa", b"", "is empty"),
        ("text.fa", b"ACGT\n", "is not a FASTA file, it starts with 'A'"),
        ("genome.fa.gz", gzip.compress(b">a\nACGT\n"), "compressed with gzip, which does not allow random access"),
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


@pytest.mark.parametrize("block_bytes", [0xFF00, 997])
def test_block_gzip_gives_the_same_letters(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(block_gzip(fasta_bytes(CONTIGS), block_bytes))
    genome = Reference(path)
    assert genome.lengths == {name: len(letters) for name, letters in CONTIGS.items()}
    for name, letters in CONTIGS.items():
        for start in range(0, len(letters), 331):
            assert genome.letters(name, start, start + 400, pad=True) == letters[start : start + 400].ljust(400, b"N")
    index = Path(f"{path}.fai")
    before = index.stat().st_mtime_ns
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        assert sum(pool.map(_fetch_many, [(genome, seed) for seed in range(WORKERS)])) == 0
    assert index.stat().st_mtime_ns == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["genome.fa.gz", "genome.fa.gz.fai", "genome.fa.gz.gzi"]


class _Windows(torch.utils.data.Dataset[torch.Tensor]):
    """Windows of one reference that every worker of a DataLoader shares."""

    def __init__(self, genome: Reference) -> None:
        self.genome = genome

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.genome.tokens("chr1", 50 * index, 50 * index + 100))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores, on purpose
@pytest.mark.parametrize("workers", [0, 8])
def test_the_workers_of_a_data_loader_get_the_right_tokens(genome: Path, workers: int) -> None:
    opened = Reference(genome)
    opened.letters("chr1", 0, 10)  # the workers inherit an open handle
    loader = torch.utils.data.DataLoader(_Windows(opened), batch_size=10, num_workers=workers)
    tokens = torch.cat(list(loader))
    whole = CharacterTokenizer().encode(CONTIGS["chr1"])
    expected = np.stack([whole[50 * index : 50 * index + 100] for index in range(200)])
    np.testing.assert_array_equal(tokens.numpy(), expected)


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
