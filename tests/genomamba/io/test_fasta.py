"""Reading FASTA: the same records whatever the line ends, compression and source; bounded memory; clear refusals."""

import bz2
import gzip
import io
import lzma
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genomamba.io import compression, fasta
from genomamba.io.compression import is_compressed
from genomamba.io.fasta import read_records, spool_records
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError

TOKENIZER = CharacterTokenizer()
TEXT = b">first one of two\nACGT\nacgtn\n\n>second\nRYK\n>empty\n>last\nT"
EXPECTED = [("first", "one of two", "ACGTACGTN"), ("second", "", None), ("empty", "", ""), ("last", "", "T")]


def read(source: fasta.FastaSource) -> list[tuple[str, list[int]]]:
    return [(record.name, record.tokens.tolist()) for record in read_records(source)]


def message_of(source: fasta.FastaSource) -> str:
    with pytest.raises(InputError) as caught:
        list(read_records(source))
    with pytest.raises(InputError) as caught_spooling:
        if isinstance(source, io.BytesIO):
            source.seek(0)
        list(spool_records(source))
    assert str(caught.value) == str(caught_spooling.value)
    return str(caught.value)


def test_names_descriptions_and_tokens_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / "two.fa"
    path.write_bytes(TEXT)
    records = list(read_records(path))
    assert [(record.name, record.description) for record in records] == [entry[:2] for entry in EXPECTED]
    assert [TOKENIZER.decode(record.tokens) for record in records if record.name != "second"] == [
        "ACGTACGTN", "", "T",
    ]  # fmt: skip
    assert all(record.tokens.dtype == np.uint8 for record in records)


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"], ids=["CRLF", "CR"])
def test_line_ends_do_not_matter(line_end: bytes) -> None:
    assert read(io.BytesIO(TEXT.replace(b"\n", line_end))) == read(io.BytesIO(TEXT))


def test_blank_lines_and_blanks_around_lines_do_not_matter() -> None:
    assert read(io.BytesIO(b"\n \n>a\n\nAC \n\t GT\n\n\n>b\n")) == [("a", [7, 8, 9, 10]), ("b", [])]


def test_a_header_without_a_name_is_numbered() -> None:
    assert [record.name for record in read_records(io.BytesIO(b">x\nA\n>\nC\n>  \nG"))] == ["x", "record_2", "record_3"]


def test_the_last_header_may_lack_a_line_end() -> None:
    assert read(io.BytesIO(b">a\nA\n>b words")) == [("a", [7]), ("b", [])]


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.tuples(st.sampled_from(["", "a", "b c"]), st.text("ACGTN", max_size=12)), min_size=1),
    width=st.integers(1, 7),
    line_end=st.sampled_from(["\n", "\r\n"]),
    block_bytes=st.integers(1, 9),
)
def test_blocks_may_be_cut_anywhere(
    records: list[tuple[str, str]], width: int, line_end: str, block_bytes: int
) -> None:
    lines = []
    for header, sequence in records:
        lines += [f">{header}", *(sequence[start : start + width] for start in range(0, len(sequence), width))]
    stream = io.BytesIO(line_end.join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "BLOCK_BYTES", block_bytes)
        found = list(read_records(stream))
    assert [TOKENIZER.decode(record.tokens) for record in found] == [sequence for _, sequence in records]
    assert [record.name for record in found] == [
        header.split()[0] if header else f"record_{number}" for number, (header, _) in enumerate(records, start=1)
    ]


def test_gzip_is_found_by_content_and_may_have_many_members(tmp_path: Path) -> None:
    zipped = tmp_path / "zipped.fa"
    zipped.write_bytes(gzip.compress(TEXT[:20]) + gzip.compress(b"") + gzip.compress(TEXT[20:]))
    plain = tmp_path / "plain.fa.gz"
    plain.write_bytes(TEXT)
    assert is_compressed(zipped)
    assert not is_compressed(plain)
    assert read(zipped) == read(plain) == read(io.BytesIO(TEXT))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_standard_input_is_read_even_byte_by_byte(
    pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = os.pipe()

    def write_slowly() -> None:
        with open(write_end, "wb", buffering=0) as stream:
            for byte in pack(TEXT):
                stream.write(bytes([byte]))

    writer = threading.Thread(target=write_slowly)
    with open(read_end) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        writer.start()
        assert read("-") == read(io.BytesIO(TEXT))
        writer.join()


def test_a_given_stream_stays_open() -> None:
    stream = io.BytesIO(gzip.compress(TEXT))
    list(read_records(stream))
    assert not stream.closed


@settings(max_examples=60, deadline=None)
@given(
    sequence=st.text("ACGTNR", max_size=50),
    piece_length=st.integers(1, 60),
    memory_bytes=st.sampled_from([1, 10, 2**20]),
)
def test_reverse_pieces_are_the_forward_pieces_of_the_reverse_complement(
    sequence: str, piece_length: int, memory_bytes: int
) -> None:
    tokens = TOKENIZER.encode(sequence)
    opposite = TOKENIZER.reverse_complement(tokens)
    (record,) = collect(sequence, memory_bytes)
    with_pieces = [list(record.forward_pieces(piece_length)), list(record.reverse_complement_pieces(piece_length))]
    record.close()
    assert record.length == len(sequence)
    for pieces, strand in zip(with_pieces, (tokens, opposite), strict=True):
        expected = [strand[start : start + piece_length] for start in range(0, len(strand), piece_length)]
        assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in expected]


def collect(sequence: str, memory_bytes: int) -> list[fasta.SpooledRecord]:
    record = fasta.SpooledRecord(fasta.FastaHeader("r", ""), memory_bytes)
    record.append(TOKENIZER.encode(sequence))
    return [record]


def test_both_directions_can_be_read_at_once() -> None:
    records = spool_records(io.BytesIO(b">r\nAACCGGTN\n"), memory_bytes=2)
    record = next(records)
    pairs = zip(record.forward_pieces(3), record.reverse_complement_pieces(3), strict=True)
    assert [(TOKENIZER.decode(forward), TOKENIZER.decode(reverse)) for forward, reverse in pairs] == [
        ("AAC", "NAC"), ("CGG", "CGG"), ("TN", "TT"),
    ]  # fmt: skip


def test_pieces_can_be_written_to() -> None:
    records = spool_records(io.BytesIO(b">r\nACGT\n"))
    record = next(records)
    for piece in (*record.forward_pieces(2), *record.reverse_complement_pieces(2)):
        piece[:] = 0
    assert [piece.tolist() for piece in record.forward_pieces(4)] == [[7, 8, 9, 10]]


def test_a_record_ends_when_the_next_is_drawn() -> None:
    records = spool_records(io.BytesIO(b">a\nAC\n>b\nG\n"))
    first = next(records)
    second = next(records)
    with pytest.raises(ValueError, match="closed"):
        list(first.forward_pieces(1))
    records.close()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="closed"):
        list(second.forward_pieces(1))


def test_a_long_record_on_one_line_does_not_grow_memory(tmp_path: Path) -> None:
    length = 24_000_000
    path = tmp_path / "long.fa"
    path.write_bytes(b">long\n" + b"ACGTTGCA" * (length // 8) + b"\n")
    tracemalloc.start()
    try:
        total = 0
        for record in spool_records(path, memory_bytes=2**20):
            total += sum(len(piece) for piece in record.reverse_complement_pieces(2**16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == length
    assert peak < 10 * 2**20


def test_piece_length_must_be_positive() -> None:
    records = spool_records(io.BytesIO(b">r\nACGT\n"))
    record = next(records)
    with pytest.raises(ValueError, match="piece_length"):
        list(record.forward_pieces(0))


BAD_CONTENT = {
    "empty": (b"", "is empty"),
    "blank lines only": (b"\n \n", "is empty"),
    "no header": (b"ACGT\n", "starts with 'A': put a header line"),
    "FASTQ": (b"@read\nACGT\n+\nIIII\n", "FASTQ"),
    "gzipped FASTQ": (gzip.compress(b"@read\nACGT\n"), "FASTQ"),
    "protein": (b">a\nACG\n>p\nACGT\nMKVLA\n", "'L' at base 8 of record 'p', which looks like a protein"),
    "protein with a stop": (b">a\nMKVAYHGRWSTDDVMK*\n", "the record 'a', which looks like a protein"),
    "protein with X": (b">a\nMKVAYHGRX\n", "the record 'a', which looks like a protein"),
    "digit": (b">a\n1 ACGT\n", "'1' at base 1 of record 'a', which is not a nucleotide code"),
    "header inside a line": (b">a\nACGT>b\nACGT\n", "'>' at base 5 of record 'a', inside a sequence line"),
    "binary sequence": (b">a\nAC\x00\x01\n", "byte 0x00 at base 3 of record 'a', which looks like binary"),
    "binary start": (b"\x7fELF\x00", "starts with byte 0x7f, which looks like binary"),
    "binary header": (b">a\x00b\nAC\n", "byte 0x00 in the header of record 1"),
    "truncated bzip2": (bz2.compress(TEXT)[:-12], "truncated compressed"),
    "damaged xz": (lzma.compress(TEXT)[:20] + b"rubbish" + lzma.compress(TEXT)[27:], "damaged compressed"),
    "2bit": (b"\x43\x27\x41\x1a\x00", "twoBitToFa"),
    "truncated gzip": (gzip.compress(TEXT)[:-12], "truncated compressed"),
    "only the start of gzip": (b"\x1f\x8b", "truncated compressed"),
    "gzip with a wrong checksum": (gzip.compress(TEXT)[:-8] + b"\0" * 8, "damaged compressed"),
    "endless header": (b">" + b"A" * (2**20 + 1), "header of more than"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CONTENT.values(), ids=BAD_CONTENT.keys())
def test_bad_content_is_refused_in_one_sentence_that_names_the_file(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "input.fa"
    path.write_bytes(content)
    text = message_of(path)
    assert str(path) in text
    assert message in text
    assert text.endswith(".")
    assert "\n" not in text


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    assert message_of(tmp_path / "none.fa") == f"there is no file {tmp_path / 'none.fa'}: check the path."
    assert "is a directory" in message_of(tmp_path)


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compression, "open", refuse, raising=False)  # the administrator may read every file
    assert "permission denied" in message_of(tmp_path / "secret.fa")


def test_a_full_temporary_folder_is_reported() -> None:
    class FullDisk(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    record = fasta.SpooledRecord(fasta.FastaHeader("r", ""), 1)
    record._spool = FullDisk()  # type: ignore[assignment]
    with pytest.raises(InputError, match="set TMPDIR"):
        record.append(TOKENIZER.encode("ACGT"))


def test_temporary_files_are_gone_after_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc to count open files")
    before = len(list(descriptors.iterdir()))
    with pytest.raises(InputError):
        for record in spool_records(io.BytesIO(b">a\nACGTACGT\n>b\nACGTACGT\n>c\nL\n"), memory_bytes=1):
            list(record.forward_pieces(2))
    assert len(list(descriptors.iterdir())) == before
    assert list(tmp_path.iterdir()) == []


def test_gigabytes_of_blank_lines_are_refused_early(tmp_path: Path) -> None:
    path = tmp_path / "blank.fa"
    with path.open("wb") as stream:
        stream.truncate(0)
        for _ in range(70):
            stream.write(b"\n" * 2**20)
    with pytest.raises(InputError, match="consecutive blank characters"):
        list(read_records(str(path)))
