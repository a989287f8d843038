"""Reading of FASTQ and FASTA, recognised by content; of qualities only the number is checked.

Sequence and qualities may be on one line or on several (Cock et al. 2010, "The Sanger FASTQ file format", Nucleic
Acids Research 38:1767). A record's text is in memory while it is read: FASTQ is for reads, not for chromosomes.
"""

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from genomamba.io.compression import read_blocks, source_label
from genomamba.io.fasta import (
    BLANKS,
    FastaHeader,
    FastaSource,
    LetterReader,
    next_header,
    parse_fasta,
    parse_header,
)
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError

FASTQ_MARK: Final = b"@"
_LONGEST_LINE_BYTES: Final = 1 << 28
_SAM_HEADERS: Final = (b"@HD\t", b"@SQ\t", b"@RG\t", b"@PG\t", b"@CO\t")


@dataclass(frozen=True)
class FastqText:
    """The text of one record: the header line without its mark, and the joined lines of bases."""

    header: bytes
    letters: bytes


def read_sequence_events(source: FastaSource) -> Generator[FastaHeader | Tokens, None, None]:
    """Yield a `FastaHeader` for each record of a FASTA or FASTQ source, followed by its tokens.

    Raises:
        InputError: if the source is neither FASTA nor FASTQ of nucleotides.
    """
    label = source_label(source)
    with contextlib.closing(read_blocks(source, label)) as blocks:
        start, joined = _look_at_start(blocks)
        if not start.startswith(FASTQ_MARK):
            yield from parse_fasta(joined, label)
            return
        letters = LetterReader(label)
        for number, record in enumerate(parse_fastq(joined, label), start=1):
            header = parse_header(record.header, number, label)
            yield header
            tokens = letters.tokens(record.letters, 0, header)
            if len(tokens):
                yield tokens
        letters.report()


def read_record_texts(source: FastaSource) -> Iterator[tuple[int, bytes]]:
    """Yield the text of a source in pieces, each with the number of the record (from 0) that it belongs to.

    FASTA text is unchanged, and ends with a newline; FASTQ records are converted to FASTA, bases on one line.

    Raises:
        InputError: if the source cannot be read.
    """
    label = source_label(source)
    with contextlib.closing(read_blocks(source, label)) as blocks:
        start, joined = _look_at_start(blocks)
        if start.startswith(FASTQ_MARK):
            for number, record in enumerate(parse_fastq(joined, label)):
                yield number, b">" + record.header + b"\n" + record.letters + b"\n"
            return
        yield from _fasta_texts(joined)


def parse_fastq(blocks: Iterable[bytes], label: str) -> Iterator[FastqText]:
    """Yield the records in blocks of FASTQ; `label` is the name of the source in messages.

    Raises:
        InputError: if the text is not FASTQ or ends within a record.
    """
    lines = _lines(blocks, label)
    for number in itertools.count(1):
        header = next((line for line in lines if line.strip(BLANKS)), None)
        if header is None:
            return
        if header.startswith(_SAM_HEADERS):
            raise InputError(f"{label} is a SAM file: convert it with `samtools fasta`.")
        if not header.startswith(FASTQ_MARK):
            raise InputError(
                f"{label} has no '@' at the start of FASTQ record {number}: it may have more qualities than bases, "
                "or lines are missing before it."
            )
        letters = bytearray()
        for line in lines:
            if line.startswith(b"+"):
                break
            letters += line.translate(None, BLANKS)
        else:
            raise InputError(f"{label} ends within FASTQ record {number}: copy or download it again.")
        qualities = 0
        while qualities < len(letters):
            quality_line = next(lines, None)
            if quality_line is None:
                raise InputError(f"{label} ends within FASTQ record {number}: copy or download it again.")
            qualities += len(quality_line.strip(BLANKS))
        if qualities > len(letters):
            raise InputError(
                f"{label} has {qualities} qualities for the {len(letters)} bases of FASTQ record {number}: "
                "the file is damaged, copy or download it again."
            )
        yield FastqText(header[1:], bytes(letters))


def _look_at_start(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes after leading whitespace, and the blocks from there on."""
    for block in blocks:
        stripped = block.lstrip(BLANKS)
        if stripped:
            return stripped, itertools.chain([stripped], blocks)
    return b"", iter(())


def _lines(blocks: Iterable[bytes], label: str) -> Iterator[bytes]:
    """Yield lines without their endings (LF, CRLF or CR)."""
    held: list[bytes] = []
    rest, size = b"", 0
    for block in blocks:
        # Blocks within a line are joined once, at its end: joining each would take the square of its length.
        is_within = not (rest.endswith(b"\r") or b"\n" in block or b"\r" in block)
        held.append(block)
        size += len(block)
        lines = [] if is_within else b"".join(held).splitlines(keepends=True)
        if not is_within:
            # A carriage return at the end may be half of CRLF.
            rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
            held, size = [rest], len(rest)
        if size > _LONGEST_LINE_BYTES:
            raise InputError(
                f"{label} has a line of more than {_LONGEST_LINE_BYTES:,} characters, too long for FASTQ: give FASTA."
            )
        for line in lines:
            yield line.rstrip(b"\r\n")
    if last := b"".join(held):
        yield last.rstrip(b"\r\n")


def _fasta_texts(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    number, byte_before = -1, ord("\n")
    for block in blocks:
        cursor = 0
        while cursor < len(block):
            # A mark at the cursor begins this record, which ends at the mark after that.
            begins = block[cursor : cursor + 1] == b">" and (block[cursor - 1] if cursor else byte_before) in b"\r\n"
            number += begins
            end = next_header(block, cursor + begins, byte_before)
            if number >= 0:
                yield number, block[cursor:end]
            cursor = end
        byte_before = block[-1]
    if number >= 0 and byte_before != ord("\n"):
        yield number, b"\n"
