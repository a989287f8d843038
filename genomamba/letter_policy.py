"""Letter policies: how a DNA language model reads N, soft-masked letters and IUPAC codes, and which are scored.

Letters become the tokens of `genomamba.tokenizer`. The published models differ in three choices, each of which affects
the perplexity:

- soft-masked (lower-case) letters: Caduceus reads them as the same base; HyenaDNA as [UNK].
- N: for HyenaDNA a token that must be predicted like a base; Caduceus maps it to [PAD], which is never scored.
- the other ambiguity codes (R, Y, K, ...): [UNK] in both, scored.
"""

import functools
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from genomamba.alphabet import IUPAC_CODES, UNKNOWN_SYMBOLS_AS_N, describe_byte, diagnose_invalid_byte
from genomamba.tokenizer import (
    ANY_BASE_TOKEN,
    INVALID_TOKEN,
    PADDED_VOCABULARY_SIZE,
    TOKEN_OF_BYTE,
    UNKNOWN_TOKEN,
    VOCABULARY,
    Tokens,
)
from mambacore.errors import InputError

PADDING_TOKEN: Final = VOCABULARY["[PAD]"]

SoftMask = Literal["same", "unknown"]
AnyBase = Literal["scored", "unscored", "padding"]
Ambiguous = Literal["scored", "unscored", "any"]


@dataclass(frozen=True)
class LetterPolicy:
    """A letter policy.

    - `soft_mask`: "same": lower case is the same base; "unknown": it is [UNK] (and so is lower-case n).
    - `any_base`: N is the token N, "scored" or "unscored" as a target, or "padding": the token [PAD], never scored.
    - `ambiguous`: other ambiguity codes are [UNK], "scored" or "unscored", or treated as N: "any". Soft-masked letters
      read as [UNK] are scored or not like these.
    """

    soft_mask: SoftMask = "same"
    any_base: AnyBase = "unscored"
    ambiguous: Ambiguous = "unscored"

    def __post_init__(self) -> None:
        """Check that all values are valid choices."""
        for name, choices in (("soft_mask", SoftMask), ("any_base", AnyBase), ("ambiguous", Ambiguous)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise InputError(f"the letter policy has {name} '{value}': use {' or '.join(get_args(choices))}.")

    def tokens(self, letters: bytes) -> Tokens:
        """Return the tokens of letters, uint8 of shape (length,); `*`, `-`, `.`, `?` and X are read as N.

        Raises:
            InputError: if a byte is not a nucleotide code.
        """
        letters = letters.translate(UNKNOWN_SYMBOLS_AS_N)
        tokens = np.frombuffer(bytearray(letters.translate(self._token_of_byte)), dtype=np.uint8)
        if len(tokens) and tokens.max() == INVALID_TOKEN:
            position = int(tokens.argmax())
            byte = letters[position]
            raise InputError(
                f"the sequence has {describe_byte(byte)} at position {position + 1}, {diagnose_invalid_byte(byte)}."
            )
        return tokens

    def is_scored(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        """Return for each token whether it is scored as a target, bool of the shape of `tokens`."""
        return self._is_scored_by_token[tokens]

    def to_config(self) -> dict[str, Any]:
        """Return the choices as a mapping."""
        return asdict(self)

    @functools.cached_property
    def _token_of_byte(self) -> bytes:
        table = bytearray(TOKEN_OF_BYTE)
        any_base = PADDING_TOKEN if self.any_base == "padding" else ANY_BASE_TOKEN
        for code in IUPAC_CODES + IUPAC_CODES.lower():
            if table[ord(code)] == ANY_BASE_TOKEN or (table[ord(code)] == UNKNOWN_TOKEN and self.ambiguous == "any"):
                table[ord(code)] = any_base
            if self.soft_mask == "unknown" and code.islower():
                table[ord(code)] = UNKNOWN_TOKEN
        return bytes(table)

    @functools.cached_property
    def _is_scored_by_token(self) -> npt.NDArray[np.bool_]:
        scored = np.zeros(PADDED_VOCABULARY_SIZE, dtype=np.bool_)
        scored[[VOCABULARY[base] for base in "ACGT"]] = True
        scored[ANY_BASE_TOKEN] = self.any_base == "scored"
        scored[UNKNOWN_TOKEN] = self.ambiguous == "scored"
        scored.flags.writeable = False
        return scored


LETTER_POLICIES: Final[dict[str, LetterPolicy]] = {
    "bases": LetterPolicy(),
    "hyenadna": LetterPolicy(soft_mask="unknown", any_base="scored", ambiguous="scored"),
    "caduceus": LetterPolicy(soft_mask="same", any_base="padding", ambiguous="scored"),
}
"""Policies by name: "bases" (only A, C, G and T in either case are scored), and those of two publications."""


def letter_policy(name: str) -> LetterPolicy:
    """Return a policy by name.

    Raises:
        InputError: if the name is unknown.
    """
    if name not in LETTER_POLICIES:
        raise InputError(f"there is no letter policy '{name}': use {', '.join(LETTER_POLICIES)}.")
    return LETTER_POLICIES[name]
