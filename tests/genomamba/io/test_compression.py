"""Any compression, by content: the same records, bounded memory, warnings for what is left out."""

import bz2
import gzip
import importlib.util
import io
import logging
import lzma
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from genomamba.io.compression import BLOCK_BYTES, is_compressed, read_blocks, read_lines
from genomamba.io.fasta import read_records
from genomamba.io.sources import read_sequences
from mambacore.errors import InputError

TEXT = b">c1 one\nACGTACGT\nACGT\n>c2\nTTTT\n"
HAS_ZSTANDARD = importlib.util.find_spec("zstandard") is not None


def zstandard(content: bytes) -> bytes:
    if not HAS_ZSTANDARD:
        pytest.skip("zstandard is not installed")
    import zstandard as library  # noqa: PLC0415

    return library.ZstdCompressor().compress(content)


COMPRESSIONS: list[Callable[[bytes], bytes]] = [gzip.compress, bz2.compress, lzma.compress, zstandard, bytes]


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n\n  ", b"\xef\xbb\xbf\r\n"])
def test_content_decides_how_a_file_is_read(
    compress: Callable[[bytes], bytes], before: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records"
    path.write_bytes(compress(before + TEXT))
    assert is_compressed(path) is (compress is not bytes)
    assert [(record.name, len(record.tokens)) for record in read_records(path)] == [("c1", 12), ("c2", 4)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(compress(before + TEXT))))
    assert [record.name for record in read_sequences("-")] == ["c1", "c2"]


@pytest.mark.parametrize("compress", COMPRESSIONS[:-1])
def test_several_members_are_one_content(compress: Callable[[bytes], bytes]) -> None:
    parts = [TEXT[:5], TEXT[5:30], b"", TEXT[30:]]
    assert b"".join(read_blocks(io.BytesIO(b"".join(map(compress, parts))), "x")) == TEXT


@pytest.mark.parametrize("compress", COMPRESSIONS[:-1])
@pytest.mark.parametrize("kept", [-3, -9, 12])
def test_a_file_that_is_cut_off_is_refused(compress: Callable[[bytes], bytes], kept: int, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(compress(TEXT * 50)[:kept])
    with pytest.raises(InputError, match=r"cut is a (truncated|damaged) compressed file"):
        list(read_blocks(path, str(path)))


def test_bytes_after_gzip_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "after.fa.gz"
    for after, warned in ((b"left over", True), (b"\0" * 3000, False), (b"\0\0x", True), (b"", False)):
        caplog.clear()
        path.write_bytes(gzip.compress(TEXT) + gzip.compress(b">c3\nAC\n") + after)
        assert [record.name for record in read_records(path)] == ["c1", "c2", "c3"]
        assert bool(caplog.records) is warned


def test_a_bomb_is_read_in_bounded_memory() -> None:
    bomb = zlib.compressobj(9, wbits=31)
    packed = b"".join(bomb.compress(b"A" * BLOCK_BYTES) for _ in range(200)) + bomb.flush()
    tracemalloc.start()
    assert sum(len(block) for block in read_blocks(io.BytesIO(packed), "bomb")) == 200 * BLOCK_BYTES
    assert tracemalloc.get_traced_memory()[1] < 8 * BLOCK_BYTES
    tracemalloc.stop()


def test_lines_that_never_end_and_endless_blanks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genomamba.io.compression.LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr("genomamba.io.compression.MOST_BLANK_BYTES", 1000)
    with pytest.raises(InputError, match="a line of more than 1,000"):
        list(read_lines(io.BytesIO(b"A" * 2000), "x"))
    with pytest.raises(InputError, match="blank"):
        list(read_lines(io.BytesIO(b"\n" * 2000), "x"))
    assert len(list(read_lines(io.BytesIO(b"a\rb\r\nc\n" * 900), "x"))) == 2700


def test_a_record_that_does_not_end_is_refused_where_records_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genomamba.io.sources.LONGEST_RECORD_BP", 1000)
    assert len(next(read_sequences({"a": "A" * 1000})).tokens) == 1000
    with pytest.raises(InputError, match="'b' has more than 1,000 bases"):
        list(read_sequences(io.BytesIO(b">a\nAC\n>b\n" + b"A" * 1001)))


@pytest.mark.parametrize("name", ["star.fa", "reads.fq", "letters"])
def test_symbols_for_unknown_bases_are_read_as_n_and_counted(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    letters = "ACGT*ACGT-AC.GTXxAC?GT"
    path = tmp_path / name
    path.write_text(f"@r\n{letters}\n+\n{'I' * 22}\n" if name.endswith("fq") else f">r\n{letters}\n")
    source = letters if name == "letters" else path
    caplog.set_level(logging.WARNING)
    (record,) = read_sequences(source)
    assert [int(token) for token in record.tokens].count(11) == 6
    assert ["6 letters" in line.getMessage() for line in caplog.records] == [True]


@pytest.mark.parametrize("compress", COMPRESSIONS[:-1])
@pytest.mark.parametrize(("after", "is_noted"), [(b"left over by an upload", True), (b"\0" * 512, False), (b"x", True)])
def test_other_bytes_after_the_content_are_noted(
    compress: Callable[[bytes], bytes], after: bytes, is_noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Decompressors ignore them silently, and so would lose whatever follows a damaged start of a second part."""
    if compress is zstandard and not is_noted:
        pytest.skip("Zstandard has no padding")
    with caplog.at_level(logging.WARNING):
        assert b"".join(read_blocks(io.BytesIO(compress(TEXT) + after), "x")) == TEXT
    assert ("other bytes after" in caplog.text) is is_noted


def test_a_frame_that_is_skipped_may_come_first() -> None:
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    assert b"".join(read_blocks(io.BytesIO(skipped + zstandard(TEXT)), "x")) == TEXT


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sequence\ty\n".encode("utf-16"), "UTF-16"),
        ("sequence\ty\n".encode("utf-16-le"), "UTF-16"),
        (b"PK\x03\x04" + bytes(100), "workbook"),
        (b"\xd0\xcf\x11\xe0" + bytes(100), "workbook"),
        (b"PAR1" + bytes(100), "Parquet"),
        ("sequence\tcaf\xe9\n".encode("latin-1"), "0xe9"),
        (b"sequence\ty\nACGT\ta\0\n", "binary"),
    ],
)
def test_what_is_not_text_is_named(content: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        list(read_lines(io.BytesIO(content), "x"))
