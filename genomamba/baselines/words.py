"""Encoding of words of k bases as numbers, and their counts, used by all baselines.

Bases are numbered A 0, C 1, G 2, T 3, so that the complement of base b is 3 - b, and a word is a number in base 4 with
its first base most significant.
"""

from functools import cache

import numpy as np

from genomamba.tokenizer import VOCABULARY
from mambacore.errors import InputError

FIRST_BASE_TOKEN = VOCABULARY["A"]  # C, G, T follow
BASES = 4
MAXIMUM_WORD_LENGTH = 12  # 4**12 numbers of 8 bytes are 134 MB


def word_codes(tokens: np.ndarray, word_length: int) -> np.ndarray:
    """Return the numbers of the words in a sequence, int32 (at most length - word_length + 1,), in order.

    Words with anything but A, C, G, T are skipped. A sequence shorter than a word has none.

    Args:
        tokens: uint8 (length,).
        word_length: k, bases.
    """
    position_count = len(tokens) - word_length + 1
    if position_count <= 0:
        return np.empty(0, dtype=np.int32)
    bases = tokens - np.uint8(FIRST_BASE_TOKEN)  # wraps: everything that is not a base becomes 4 or more
    two_bits = bases & 3
    codes = np.zeros(position_count, dtype=np.int32)
    for offset in range(word_length):
        codes <<= 2
        codes |= two_bits[offset : offset + position_count]
    unknown_positions = np.flatnonzero(bases > 3)
    if not len(unknown_positions):
        return codes
    is_known = np.ones(position_count, dtype=bool)
    for offset in range(word_length):
        starts = unknown_positions - offset
        is_known[starts[(starts >= 0) & (starts < position_count)]] = False
    return codes[is_known]


def word_counts(tokens: np.ndarray, word_length: int) -> np.ndarray:
    """Count each word on the given strand, int64 (4**word_length,)."""
    return np.bincount(word_codes(tokens, word_length), minlength=4**word_length)


@cache
def reverse_complement_codes(word_length: int) -> np.ndarray:
    """Return the number of each word's reverse complement, int32 (4**word_length,), read-only."""
    if not 1 <= word_length <= MAXIMUM_WORD_LENGTH:
        raise InputError(
            f"words of {word_length} bases cannot be counted: give a length from 1 to {MAXIMUM_WORD_LENGTH}"
        )
    words = np.arange(4**word_length, dtype=np.int32)
    complements = np.zeros_like(words)
    for _ in range(word_length):
        complements = complements * 4 + 3 - words % 4
        words //= 4
    complements.flags.writeable = False
    return complements
