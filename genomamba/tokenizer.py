"""The character tokenizer of hg38 language models: one base, one token.

The vocabulary is the one of HyenaDNA (Nguyen et al. 2023) and Caduceus (Schiff et al. 2024): seven special tokens, then
A, C, G, T and N; the embedding is padded to 16 rows. Unlike there, upper and lower case are the same base.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from genomamba.alphabet import IUPAC_CODES, UNKNOWN_SYMBOLS_AS_N, describe_byte, diagnose_invalid_byte
from mambacore.errors import InputError

Tokens = npt.NDArray[np.uint8]
"""DNA in memory: token ids, one byte per base, shape (..., length)."""

VOCABULARY: Final[dict[str, int]] = {
    "[CLS]": 0,
    "[SEP]": 1,
    "[BOS]": 2,
    "[MASK]": 3,
    "[PAD]": 4,
    "[RESERVED]": 5,
    "[UNK]": 6,
    "A": 7,
    "C": 8,
    "G": 9,
    "T": 10,
    "N": 11,
}
PADDED_VOCABULARY_SIZE: Final = 16
UNKNOWN_TOKEN: Final = VOCABULARY["[UNK]"]
ANY_BASE_TOKEN: Final = VOCABULARY["N"]
INVALID_TOKEN: Final = 255
"""Value of `TOKEN_OF_BYTE` for a byte that is not a nucleotide code; never a token of a sequence."""

TOKENIZER_NAME: Final = "hg38-character"
TOKENIZER_VERSION: Final = 1


def _token_of_byte() -> bytes:
    table = bytearray([INVALID_TOKEN]) * 256
    for code in IUPAC_CODES:
        base = "T" if code == "U" else code
        token = VOCABULARY.get(base, UNKNOWN_TOKEN)
        table[ord(code)] = table[ord(code.lower())] = token
    return bytes(table)


def _complement_ids() -> Tokens:
    complements = np.arange(PADDED_VOCABULARY_SIZE, dtype=np.uint8)
    for base, complement in ("AT", "CG", "GC", "TA"):
        complements[VOCABULARY[base]] = VOCABULARY[complement]
    complements.flags.writeable = False
    return complements


TOKEN_OF_BYTE: Final[bytes] = _token_of_byte()
"""For `bytes.translate`: the token of each byte value, `INVALID_TOKEN` for bytes that are not nucleotide codes."""

COMPLEMENT_IDS: Final[Tokens] = _complement_ids()
"""The complement of each token id, shape (16,); special tokens, [UNK] and N are their own complements."""

_NAMES = np.array([*VOCABULARY, *[""] * (PADDED_VOCABULARY_SIZE - len(VOCABULARY))])
_LETTER_OF_TOKEN = bytes.maketrans(bytes(VOCABULARY[base] for base in "ACGTN"), b"ACGTN")


class CharacterTokenizer:
    """Converts nucleotide letters to token ids and back.

    Law: `encode(reverse_complement(s))` equals `reverse_complement(encode(s))` for every sequence `s` of IUPAC codes.
    """

    vocabulary: Mapping[str, int] = VOCABULARY
    vocabulary_size: int = len(VOCABULARY)
    padded_vocabulary_size: int = PADDED_VOCABULARY_SIZE
    complement_ids: Tokens = COMPLEMENT_IDS

    def encode(self, sequence: bytes | bytearray | str | Tokens) -> Tokens:
        """Return the token ids of a sequence, uint8 of shape (length,).

        Letters are read in either case; U is read as T, N is 11, the other ambiguity codes are [UNK]; `*`, `-`, `.`,
        `?` and X are read as N. An array is taken as ASCII codes (uint8).

        Raises:
            InputError: if a byte is not an IUPAC nucleotide code, with its position.
        """
        text = _as_bytes(sequence).translate(UNKNOWN_SYMBOLS_AS_N)
        tokens = np.frombuffer(bytearray(text.translate(TOKEN_OF_BYTE)), dtype=np.uint8)
        invalid = tokens == INVALID_TOKEN
        if invalid.any():
            position = int(invalid.argmax())
            byte = text[position]
            raise InputError(
                f"the sequence has {describe_byte(byte)} at position {position + 1}, {diagnose_invalid_byte(byte)}."
            )
        return tokens

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Return the letters of tokens of shape (length,); a special token becomes its name, such as `[UNK]`.

        Raises:
            InputError: if an id is not in the vocabulary.
        """
        ids = np.asarray(tokens)
        outside = (ids < 0) | (ids >= self.vocabulary_size)
        if outside.any():
            position = int(outside.argmax())
            raise InputError(
                f"token {int(ids[position])} at position {position + 1} is not in the vocabulary of "
                f"{self.vocabulary_size} ids: decode only what this tokenizer encoded."
            )
        if (ids >= VOCABULARY["A"]).all():
            return ids.astype(np.uint8).tobytes().translate(_LETTER_OF_TOKEN).decode("ascii")
        return "".join(_NAMES[ids.astype(np.intp)])

    def reverse_complement(self, tokens: Tokens) -> Tokens:
        """Return the reverse complement of tokens of shape (..., length)."""
        return self.complement_ids[tokens[..., ::-1]]

    def to_config(self) -> dict[str, Any]:
        """Return the tokenizer description for a model folder's `config.json`."""
        return {"name": TOKENIZER_NAME, "version": TOKENIZER_VERSION, "vocabulary": dict(self.vocabulary)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CharacterTokenizer":
        """Inverse of `to_config`.

        Raises:
            InputError: if the description is of another tokenizer, version or vocabulary.
        """
        if not isinstance(config, Mapping):
            raise InputError("the model's tokenizer description is not a JSON object: the model folder is damaged.")
        name, version = config.get("name"), config.get("version")
        if name != TOKENIZER_NAME:
            raise InputError(
                f"the model uses the tokenizer {name!r}, this program supports only {TOKENIZER_NAME!r}: "
                "use the program that wrote the model."
            )
        if version != TOKENIZER_VERSION:
            raise InputError(
                f"the model's tokenizer {name!r} has version {version!r}, but this program supports version "
                f"{TOKENIZER_VERSION}: use the program that wrote the model."
            )
        if config.get("vocabulary") != VOCABULARY:
            raise InputError(
                f"the vocabulary in the model's tokenizer description is not that of {name!r} version {version}: "
                "the model folder is damaged."
            )
        return cls()


def _as_bytes(sequence: bytes | bytearray | str | Tokens) -> bytes:
    if isinstance(sequence, str):
        try:
            return sequence.encode("ascii")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the sequence has the character {sequence[error.start]!r} at position {error.start + 1}, "
                f"which is not a nucleotide code: only {IUPAC_CODES} in either case are accepted."
            ) from error
    if isinstance(sequence, np.ndarray):
        if sequence.dtype != np.uint8 or sequence.ndim != 1:
            raise TypeError(
                f"encode takes ASCII codes as uint8 of shape (length,), got {sequence.dtype} {sequence.shape}"
            )
        return sequence.tobytes()
    return bytes(sequence)
