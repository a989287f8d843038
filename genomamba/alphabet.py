"""The IUPAC nucleotide alphabet: codes and their complements.

Source: A. Cornish-Bowden, "Nomenclature for incompletely specified bases in nucleic acid sequences", Nucleic
Acids Research 13 (1985), table 1. Each code stands for a set of bases, its complement for the set of their complements,
so R (A or G) and Y (C or T) are a pair, and S (C or G), W (A or T) and N (any) are their own complements.
"""

import numpy as np
import numpy.typing as npt

from mambacore.errors import InputError

IUPAC_CODES = "ACGTURYSWKMBDHVN"
_COMPLEMENTS = "TGCAAYRSWMKVHDBN"

PROTEIN_ONLY_LETTERS = frozenset("EFIJLOPQZ")
"""Letters of the amino-acid alphabet that are not nucleotide codes."""

UNKNOWN_SYMBOLS = b"*-.?Xx"
"""Symbols other than N that files use for unknown bases: alignment gaps, stops, X from masking programs."""

UNKNOWN_SYMBOLS_AS_N: bytes = bytes.maketrans(UNKNOWN_SYMBOLS, b"N" * len(UNKNOWN_SYMBOLS))
"""For `bytes.translate`: each of `UNKNOWN_SYMBOLS` becomes N, every other byte stays as it is."""

_BASES_AND_N = b"ACGTUNacgtun"

COMPLEMENT_OF_BYTE: bytes = bytes.maketrans(
    (IUPAC_CODES + IUPAC_CODES.lower()).encode(), (_COMPLEMENTS + _COMPLEMENTS.lower()).encode()
)
"""For `bytes.translate`: each code becomes its complement in the same case, every other byte stays as it is."""

IS_NUCLEOTIDE_CODE: npt.NDArray[np.bool_] = np.zeros(256, dtype=np.bool_)
"""Look-up table over the 256 byte values."""
IS_NUCLEOTIDE_CODE[np.frombuffer((IUPAC_CODES + IUPAC_CODES.lower()).encode(), dtype=np.uint8)] = True


def first_invalid_position(sequence: bytes) -> int | None:
    """Return the 0-based position of the first byte that is not an IUPAC nucleotide code, or None if all are."""
    valid = IS_NUCLEOTIDE_CODE[np.frombuffer(sequence, dtype=np.uint8)] if sequence else np.ones(0, dtype=np.bool_)
    return None if valid.all() else int(valid.argmin())


def describe_byte(byte: int) -> str:
    """Format a byte for an error message: printable characters in quotes, others as a hexadecimal value."""
    return f"'{chr(byte)}'" if 0x20 < byte < 0x7F else f"byte 0x{byte:02x}"


def diagnose_invalid_byte(byte: int) -> str:
    """Explain what a byte that is not a nucleotide code suggests about its file, and what to do about it."""
    letter = chr(byte).upper()
    if letter in PROTEIN_ONLY_LETTERS:
        return "which looks like a protein sequence: give the nucleotide sequence instead"
    if letter == ">":
        return "inside a sequence line: start each header on its own line"
    if not 0x20 <= byte < 0x7F:
        return "which looks like binary content: give a FASTA text file, plain or gzipped"
    return f"which is not a nucleotide code: only {IUPAC_CODES} in either case are accepted"


def looks_like_protein(text: bytes) -> bool:
    """Return whether letters that include X or a stop are a protein: most are not A, C, G, T, U or N.

    Args:
        text: the letters of a record, without whitespace.
    """
    if not (b"X" in text or b"x" in text or b"*" in text):
        return False
    letters = text.translate(None, UNKNOWN_SYMBOLS)
    return len(letters) > 0 and 2 * len(letters.translate(None, _BASES_AND_N)) > len(letters)


def reverse_complement(sequence: bytes) -> bytes:
    """Return the reverse complement of a sequence of IUPAC codes, keeping the case of each letter.

    U is read as T, so its complement is A.

    Raises:
        InputError: if a byte is not an IUPAC nucleotide code.
    """
    position = first_invalid_position(sequence)
    if position is not None:
        byte = sequence[position]
        raise InputError(
            f"the sequence has {describe_byte(byte)} at position {position + 1}, {diagnose_invalid_byte(byte)}."
        )
    return sequence.translate(COMPLEMENT_OF_BYTE)[::-1]
