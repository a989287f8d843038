"""Reading of FASTA from files, compressed or not, and standard input, in bounded memory.

The parser works on blocks of bytes, not on lines, so a chromosome on one line costs no more memory than one on many,
and no Python code runs per base. Lines may end with LF, CRLF or CR; blank lines and spaces within lines are skipped.
"""

import contextlib
import errno
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np

from genomamba.alphabet import (
    UNKNOWN_SYMBOLS,
    UNKNOWN_SYMBOLS_AS_N,
    describe_byte,
    diagnose_invalid_byte,
    looks_like_protein,
)
from genomamba.io.compression import LOGGER, Source, read_blocks, source_label
from genomamba.tokenizer import COMPLEMENT_IDS, INVALID_TOKEN, TOKEN_OF_BYTE, Tokens
from mambacore.errors import InputError

FastaSource = Source
_LONGEST_HEADER_BYTES: Final = 1 << 20
BLANKS: Final = b" \t\r\n"

_FOREIGN_FORMATS: Final[dict[bytes, str]] = {
    b"PK\x03\x04": "is a zip archive: extract the FASTA file from it",
    b"BAM\x01": "is a BAM file: convert it with `samtools fasta`",
    b"CRAM": "is a CRAM file: convert it with `samtools fasta`",
    b"\x43\x27\x41\x1a": "is a 2bit file: convert it with `twoBitToFa`",
    b"\x1a\x41\x27\x43": "is a 2bit file: convert it with `twoBitToFa`",
    b"LOCUS ": "is a GenBank file: convert it to FASTA",
    b"\xff\xfe": "is UTF-16 text: save it as plain ASCII text",
    b"\xfe\xff": "is UTF-16 text: save it as plain ASCII text",
}


@dataclass(frozen=True)
class FastaHeader:
    """The header line of one record: `name` is its first word, `description` the rest."""

    name: str
    description: str


@dataclass(frozen=True)
class FastaRecord:
    """One record, entirely in memory; `tokens` is uint8 of shape (length,)."""

    name: str
    description: str
    tokens: Tokens


class SpooledRecord:
    """One record whose tokens are kept in memory if they are few and in a temporary file if they are many.

    Pieces can be read any number of times, in both directions concurrently, until the next record is read.
    """

    def __init__(self, header: FastaHeader, memory_bytes: int) -> None:
        self.name = header.name
        self.description = header.description
        self.length = 0
        """Bases (bp)."""
        self._spool = tempfile.SpooledTemporaryFile(max_size=memory_bytes)  # noqa: SIM115 - closed by `close`

    def append(self, tokens: Tokens) -> None:
        """Add tokens at the end."""
        try:
            self._spool.write(tokens.tobytes())
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise InputError(
                f"the temporary folder {tempfile.gettempdir()} is full while record '{self.name}' is read: "
                "set TMPDIR to a folder with more space."
            ) from error
        self.length += len(tokens)

    def forward_pieces(self, piece_length: int) -> Iterator[Tokens]:
        """Yield the tokens from the start in pieces of `piece_length` bp, the last one possibly shorter."""
        for start in _piece_starts(self.length, piece_length):
            yield self._read(start, min(start + piece_length, self.length))

    def reverse_complement_pieces(self, piece_length: int) -> Iterator[Tokens]:
        """Yield the reverse complement in pieces from its own start: the `forward_pieces` of that strand."""
        for start in _piece_starts(self.length, piece_length):
            end = self.length - start
            yield COMPLEMENT_IDS[self._read(max(0, end - piece_length), end)[::-1]]

    def close(self) -> None:
        """Release the tokens and delete the temporary file."""
        self._spool.close()

    def _read(self, start: int, end: int) -> Tokens:
        tokens = np.empty(end - start, dtype=np.uint8)
        self._spool.seek(start)
        if self._spool.readinto(tokens.data) != len(tokens):  # type: ignore[attr-defined]  # since Python 3.11
            raise OSError(f"the temporary copy of record '{self.name}' was truncated by another program")
        return tokens


EventReader = Callable[[Any], Generator[FastaHeader | Tokens, None, None]]
"""A function like `read_events`, for some format."""


def read_records(source: FastaSource) -> Iterator[FastaRecord]:
    """Yield the records of a FASTA source one by one, each entirely in memory (1 byte per base).

    Raises:
        InputError: if the source is not FASTA of nucleotides.
    """
    header: FastaHeader | None = None
    tokens = bytearray()
    for event in read_events(source):
        if not isinstance(event, FastaHeader):
            tokens += event.data
            continue
        if header is not None:
            yield FastaRecord(header.name, header.description, np.frombuffer(tokens, dtype=np.uint8))
        header, tokens = event, bytearray()
    if header is not None:
        yield FastaRecord(header.name, header.description, np.frombuffer(tokens, dtype=np.uint8))


def spool_records(
    source: Any, memory_bytes: int = 16 * 2**20, events_of: EventReader | None = None
) -> Iterator[SpooledRecord]:
    """Yield the records of a source one by one in bounded memory, whatever their length.

    A record of more than `memory_bytes` bases is written to a temporary file. Each record is valid until the next is
    read or the iterator is closed. `events_of` is the parser, by default `read_events` for FASTA.

    Raises:
        InputError: as the parser.
    """
    record: SpooledRecord | None = None
    with contextlib.closing((events_of or read_events)(source)) as events:
        try:
            for event in events:
                if not isinstance(event, FastaHeader):
                    cast(SpooledRecord, record).append(event)
                    continue
                if record is not None:
                    yield record
                    record.close()
                record = SpooledRecord(event, memory_bytes)
            if record is not None:
                yield record
        finally:
            if record is not None:
                record.close()


def read_events(source: FastaSource) -> Generator[FastaHeader | Tokens, None, None]:
    """Yield a `FastaHeader` for each record, followed by its tokens in arrays of at most 1 MiB: the streaming parser.

    Raises:
        InputError: if the source is not FASTA of nucleotides.
    """
    label = source_label(source)
    with contextlib.closing(read_blocks(source, label)) as blocks:
        yield from parse_fasta(blocks, label)


def parse_fasta(blocks: Iterable[bytes], label: str) -> Generator[FastaHeader | Tokens, None, None]:
    """As `read_events`, from blocks of decompressed bytes; `label` is the name of the source in messages."""
    header_line: bytearray | None = None
    header: FastaHeader | None = None
    record_number = 0
    position = 0
    byte_before = ord("\n")
    letters = LetterReader(label)
    for block in _from_first_letter(blocks):
        cursor = 0
        while cursor < len(block):
            if header_line is not None:
                end = _line_end(block, cursor)
                header_line += block[cursor:end]
                cursor = end
                if len(header_line) > _LONGEST_HEADER_BYTES:
                    raise InputError(
                        f"{label} has a header of more than {_LONGEST_HEADER_BYTES} characters at record "
                        f"{record_number}: put the sequence on the lines after the header."
                    )
                if end < len(block):
                    header, header_line = parse_header(header_line, record_number, label), None
                    yield header
                continue
            end = next_header(block, cursor, byte_before)
            text = block[cursor:end]
            if header is None and text.strip(BLANKS):
                raise InputError(_describe_missing_header(text.lstrip(BLANKS), label))
            if header is not None:
                tokens = letters.tokens(text, position, header)
                position += len(tokens)
                if len(tokens):
                    yield tokens
            if end < len(block):
                record_number, position, header_line = record_number + 1, 0, bytearray()
            cursor = end + 1
        byte_before = block[-1]
    if header_line is not None:
        header = parse_header(header_line, record_number, label)
        yield header
    if header is None:
        raise InputError(f"{label} is empty: give a FASTA file with at least one record.")
    letters.report()


def _from_first_letter(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Skip whitespace before the first record, including before its mark."""
    begun = False
    for block in blocks:
        content = block if begun else block.lstrip(BLANKS)
        begun = begun or bool(content)
        if content:
            yield content


def _line_end(block: bytes, start: int) -> int:
    """Return the end of the line at `start` in the block (the block's length if the line continues)."""
    line_feed = block.find(b"\n", start)
    end = line_feed if line_feed >= 0 else len(block)
    carriage_return = block.find(b"\r", start, end)
    return carriage_return if carriage_return >= 0 else end


def next_header(block: bytes, start: int, byte_before: int) -> int:
    """Return the position of the next '>' at the start of a line (the block's length if there is none)."""
    mark = block.find(b">", start)
    while mark >= 0:
        if (block[mark - 1] if mark else byte_before) in b"\r\n":
            return mark
        mark = block.find(b">", mark + 1)
    return len(block)


def parse_header(line: bytes | bytearray, record_number: int, label: str) -> FastaHeader:
    """Parse a header line without its mark; a record without a name is named by its number."""
    if 0 in line:
        raise InputError(
            f"{label} has byte 0x00 in the header of record {record_number}, which looks like binary content: "
            "give a FASTA text file, plain or gzipped."
        )
    words = line.decode("utf-8", errors="replace").split(maxsplit=1)
    name = words[0] if words else f"record_{record_number}"
    return FastaHeader(name, words[1].strip() if len(words) > 1 else "")


class LetterReader:
    """Converts the letters of a source to tokens, and counts the symbols that are read as N.

    Args:
        label: name of the source in messages.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.replaced = 0

    def tokens(self, text: bytes, bases_before: int, header: FastaHeader) -> Tokens:
        """Return the tokens of letters, skipping whitespace.

        The symbols `*`, `-`, `.`, `?` and X are read as N.

        Args:
            text: part of a record.
            bases_before: number of preceding bases of the record.
            header: header of the record.

        Raises:
            InputError: if a byte is not a nucleotide code, or the letters are a protein.
        """
        letters = text.translate(None, BLANKS)
        symbols = len(letters) - len(letters.translate(None, UNKNOWN_SYMBOLS))
        if symbols:
            if looks_like_protein(letters):
                raise InputError(
                    f"{self.label} has the record '{header.name}', which looks like a protein sequence: give the "
                    "nucleotide sequence instead."
                )
            self.replaced += symbols
            letters = letters.translate(UNKNOWN_SYMBOLS_AS_N)
        tokens = np.frombuffer(bytearray(letters.translate(TOKEN_OF_BYTE)), dtype=np.uint8)
        if len(tokens) and tokens.max() == INVALID_TOKEN:
            invalid = int(tokens.argmax())
            byte = letters[invalid]
            raise InputError(
                f"{self.label} has {describe_byte(byte)} at base {bases_before + invalid + 1} of record "
                f"'{header.name}', {diagnose_invalid_byte(byte)}."
            )
        return tokens

    def report(self) -> None:
        """Log how many symbols were read as N, if any."""
        if self.replaced:
            letters = "letter" if self.replaced == 1 else "letters"
            LOGGER.warning("%s: %d %s (*, -, ., ? or X) read as N", self.label, self.replaced, letters)


def _describe_missing_header(text: bytes, label: str) -> str:
    for magic, description in _FOREIGN_FORMATS.items():
        if text.startswith(magic):
            return f"{label} {description}."
    if text[:1] == b"@":
        return f"{label} looks like FASTQ or SAM, which is not supported here: convert it to FASTA (`seqtk seq -A`)."
    if not 0x20 <= text[0] < 0x7F:
        return (
            f"{label} starts with byte 0x{text[0]:02x}, which looks like binary content: "
            "give a FASTA text file, plain or gzipped."
        )
    return (
        f"{label} is not a FASTA file, it starts with {describe_byte(text[0])}: put a header line such as "
        "'>name' before the sequence."
    )


def _piece_starts(length: int, piece_length: int) -> range:
    if piece_length < 1:
        raise ValueError(f"piece_length must be at least 1 bp, got {piece_length}")
    return range(0, length, piece_length)
