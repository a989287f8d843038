"""The IUPAC nucleotide alphabet: which letters are nucleotide codes and which is whose complement.

Source: A. Cornish-Bowden, "Nomenclature for incompletely specified bases in nucleic acid sequences", Nucleic
Acids Research 13 (1985), table 1. Each code stands for a set of bases, its complement for the set of their complements,
so R (A or G) and Y (C or T) are a pair, and S (C or G), W (A or T) and N (any) are their own complements.
"""

import numpy as np
import numpy.typing as npt

from mambacore.errors import InputError

IUPAC_CODES = "ACGTURYSWKMBDHVN"
_COMPLEMENTS = "TGCAAYRSWMKVHDBN"

PROTEIN_ONLY_LETTERS = frozenset("EFIJLOPQXZ")
"""Letters of the amino-acid alphabet that are no nucleotide code."""

GAP_SYMBOLS = frozenset("-.*")

COMPLEMENT_OF_BYTE: bytes = bytes.maketrans(
    (IUPAC_CODES + IUPAC_CODES.lower()).encode(), (_COMPLEMENTS + _COMPLEMENTS.lower()).encode()
)
"""For `bytes.translate`: each code becomes its complement in the same case, every other byte stays what it is."""

IS_NUCLEOTIDE_CODE: npt.NDArray[np.bool_] = np.zeros(256, dtype=np.bool_)
"""Look-up table over the 256 byte values."""
IS_NUCLEOTIDE_CODE[np.frombuffer((IUPAC_CODES + IUPAC_CODES.lower()).encode(), dtype=np.uint8)] = True


def first_invalid_position(sequence: bytes) -> int | None:
    """Return the 0-based position of the first byte that is no IUPAC nucleotide code, or None when all are."""
    valid = IS_NUCLEOTIDE_CODE[np.frombuffer(sequence, dtype=np.uint8)] if sequence else np.ones(0, dtype=np.bool_)
    return None if valid.all() else int(valid.argmin())


def describe_byte(byte: int) -> str:
    """Name a byte in an error message: printable characters in quotes, others as a hexadecimal value."""
    return f"'{chr(byte)}'" if 0x20 < byte < 0x7F else f"byte 0x{byte:02x}"


def diagnose_invalid_byte(byte: int) -> str:
    """Say what a byte that is no nucleotide code suggests about its file, and what to do about it."""
    letter = chr(byte).upper()
    if letter in PROTEIN_ONLY_LETTERS:
        return "which looks like a protein sequence: give the nucleotide sequence instead"
    if letter in GAP_SYMBOLS:
        return "which is a gap or a stop sign: remove the gaps of the alignment"
    if letter == ">":
        return "inside a sequence line: start each header on a line of its own"
    if not 0x20 <= byte < 0x7F:
        return "which looks like binary content: give a FASTA text file, plain or gzipped"
    return f"which is no nucleotide code: only {IUPAC_CODES} in either case are read"


def reverse_complement(sequence: bytes) -> bytes:
    """Return the other strand of a sequence of IUPAC codes, read in its own direction, the case of each letter kept.

    U is read as T, so its complement is A.

    **Raises** `InputError` for a byte that is no IUPAC nucleotide code.
    """
    position = first_invalid_position(sequence)
    if position is not None:
        byte = sequence[position]
        raise InputError(
            f"the sequence has {describe_byte(byte)} at position {position + 1}, {diagnose_invalid_byte(byte)}."
        )
    return sequence.translate(COMPLEMENT_OF_BYTE)[::-1]
