"""Sequences from a file, a stream, a mapping of names to letters, or the letters of one sequence."""

import os
from collections.abc import Generator, Iterator, Mapping
from typing import BinaryIO, Final

import numpy as np

from genomamba.alphabet import IUPAC_CODES, UNKNOWN_SYMBOLS
from genomamba.io.compression import STANDARD_INPUT
from genomamba.io.fasta import FastaHeader, FastaRecord, LetterReader
from genomamba.io.fastq import read_sequence_events
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError

SequenceSource = str | bytes | os.PathLike[str] | BinaryIO | Mapping[str, str | bytes]
"""A path to FASTA or FASTQ, plain or compressed; "-" for standard input; a binary stream; a mapping of names to
letters; or the letters of one sequence."""

LETTERS_NAME: Final = "sequence"
"""Name of a sequence that is given as letters."""

LONGEST_RECORD_BP: Final = 1 << 29
"""Limit for records that are read as a whole, so that a small compressed file cannot fill the memory."""

_LETTERS: Final = frozenset(IUPAC_CODES + IUPAC_CODES.lower() + UNKNOWN_SYMBOLS.decode())


def sequence_events(source: SequenceSource) -> Generator[FastaHeader | Tokens, None, None]:
    """Yield a `FastaHeader` for each sequence of a source, followed by its tokens.

    Raises:
        InputError: if a file is neither FASTA nor FASTQ, letters are not DNA, or a string is neither a file name nor
            letters.
    """
    if isinstance(source, Mapping):
        for name, letters in source.items():
            yield from _events_of_letters(str(name), letters)
    elif isinstance(source, bytes) or (isinstance(source, str) and _is_letters(source)):
        yield from _events_of_letters(LETTERS_NAME, source)
    elif isinstance(source, str) and source != STANDARD_INPUT and not os.path.exists(source) and not _is_path(source):
        shown = source if len(source) <= 40 else source[:40] + "..."
        raise InputError(f"'{shown}' is neither an existing file nor a DNA sequence: give one of these.")
    else:
        yield from read_sequence_events(source)


def read_sequences(source: SequenceSource) -> Iterator[FastaRecord]:
    """Yield the sequences of a source, each entirely in memory (1 byte per base).

    Raises:
        InputError: as `sequence_events`.
    """
    header: FastaHeader | None = None
    tokens = bytearray()
    for event in sequence_events(source):
        if not isinstance(event, FastaHeader):
            tokens += event.data
            if len(tokens) > LONGEST_RECORD_BP:
                raise InputError(
                    f"the record '{header.name if header else ''}' has more than {LONGEST_RECORD_BP:,} bases, and "
                    "records are read as a whole here: cut it into pieces."
                )
            continue
        if header is not None:
            yield FastaRecord(header.name, header.description, np.frombuffer(tokens, dtype=np.uint8))
        header, tokens = event, bytearray()
    if header is not None:
        yield FastaRecord(header.name, header.description, np.frombuffer(tokens, dtype=np.uint8))


def _events_of_letters(name: str, letters: str | bytes) -> Generator[FastaHeader | Tokens, None, None]:
    header = FastaHeader(name, "")
    yield header
    text = letters.encode("utf-8", "replace") if isinstance(letters, str) else bytes(letters)
    reader = LetterReader(f"the sequence '{name}'")
    tokens = reader.tokens(text, 0, header)
    if len(tokens):
        yield tokens
    reader.report()


def _is_letters(text: str) -> bool:
    return bool(text) and text != STANDARD_INPUT and set(text) <= _LETTERS and not os.path.exists(text)


def _is_path(text: str) -> bool:
    """Whether a string that is not an existing file was probably meant as one."""
    return os.sep in text or "." in text
