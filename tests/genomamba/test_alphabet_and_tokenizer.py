"""The alphabet and the tokenizer: every IUPAC code, both strands, and sentences for everything else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genomamba.alphabet import IUPAC_CODES, first_invalid_position, reverse_complement
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError

TOKENIZER = CharacterTokenizer()
BASES_OF_CODE = {
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip
nucleotides = st.text(alphabet=IUPAC_CODES + IUPAC_CODES.lower(), max_size=80).map(str.encode)


def test_the_complement_of_a_code_stands_for_the_complements_of_its_bases() -> None:
    code_of_bases = {frozenset(bases): code for code, bases in BASES_OF_CODE.items()}
    for code, bases in BASES_OF_CODE.items():
        complements = frozenset({"A": "T", "C": "G", "G": "C", "T": "A"}[base] for base in bases)
        assert reverse_complement(code.encode()).decode() == code_of_bases[complements]
        assert reverse_complement(code.lower().encode()).decode() == code_of_bases[complements].lower()


def test_uracil_is_read_as_thymine() -> None:
    assert reverse_complement(b"ACGUu") == b"aACGT"
    np.testing.assert_array_equal(TOKENIZER.encode("UuTt"), [10, 10, 10, 10])


@given(nucleotides)
def test_reverse_complement_twice_is_the_sequence_with_u_as_t(sequence: bytes) -> None:
    assert reverse_complement(reverse_complement(sequence)) == sequence.replace(b"U", b"T").replace(b"u", b"t")


@given(nucleotides)
def test_encoding_and_reverse_complement_commute(sequence: bytes) -> None:
    np.testing.assert_array_equal(
        TOKENIZER.encode(reverse_complement(sequence)), TOKENIZER.reverse_complement(TOKENIZER.encode(sequence))
    )


@given(nucleotides)
def test_case_does_not_matter(sequence: bytes) -> None:
    np.testing.assert_array_equal(TOKENIZER.encode(sequence.lower()), TOKENIZER.encode(sequence.upper()))


@given(st.text(alphabet="ACGTN", max_size=80))
def test_decode_undoes_encode(sequence: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(sequence)) == sequence


def test_ids_are_those_of_the_hg38_vocabulary() -> None:
    np.testing.assert_array_equal(TOKENIZER.encode("ACGTN"), [7, 8, 9, 10, 11])
    np.testing.assert_array_equal(TOKENIZER.encode("RYSWKMBDHV"), [6] * 10)
    assert (TOKENIZER.vocabulary_size, TOKENIZER.padded_vocabulary_size) == (12, 16)
    assert TOKENIZER.complement_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15]
    assert TOKENIZER.decode([0, 7, 3, 6]) == "[CLS]A[MASK][UNK]"


def test_bytes_text_and_ascii_arrays_encode_alike() -> None:
    expected = TOKENIZER.encode("ACGTnr")
    for form in (b"ACGTnr", bytearray(b"ACGTnr"), np.frombuffer(b"ACGTnr", dtype=np.uint8)):
        tokens = TOKENIZER.encode(form)
        assert tokens.dtype == np.uint8
        assert tokens.flags.writeable
        np.testing.assert_array_equal(tokens, expected)


def test_reverse_complement_works_row_by_row_on_batches() -> None:
    batch = np.stack([TOKENIZER.encode("AACG"), TOKENIZER.encode("TTNG")])
    assert [TOKENIZER.decode(row) for row in TOKENIZER.reverse_complement(batch)] == ["CGTT", "CNAA"]


@pytest.mark.parametrize("byte", sorted(set(range(256)) - {ord(c) for c in IUPAC_CODES + IUPAC_CODES.lower()}))
def test_every_other_byte_is_refused_with_its_position(byte: int) -> None:
    sequence = b"ACG" + bytes([byte]) + b"T"
    assert first_invalid_position(sequence) == 3
    read_as_n = byte in b"*-.?Xx"
    if read_as_n:
        assert TOKENIZER.decode(TOKENIZER.encode(sequence)) == "ACGNT"
    for refuse in (reverse_complement,) if read_as_n else (TOKENIZER.encode, reverse_complement):
        with pytest.raises(InputError, match="at position 4,"):
            refuse(sequence)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("ACL", "'L' at position 3, which looks like a protein"),
        ("A\0", "byte 0x00 at position 2, which looks like binary"),
        ("AC!", r"'!' at position 3, which is not a nucleotide code"),
        ("ACÄ", "'Ä' at position 3, which is not a nucleotide code"),
    ],
)
def test_the_message_says_what_the_byte_suggests(sequence: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TOKENIZER.encode(sequence)


@pytest.mark.parametrize("token", [12, 16, 255, -1])
def test_ids_outside_the_vocabulary_are_not_decoded(token: int) -> None:
    with pytest.raises(InputError, match=f"token {token} at position 2"):
        TOKENIZER.decode([7, token])


def test_the_configuration_rebuilds_the_tokenizer() -> None:
    rebuilt = CharacterTokenizer.from_config(TOKENIZER.to_config())
    assert rebuilt.to_config() == TOKENIZER.to_config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "bpe"}, "'bpe'"),
        ({"version": 2}, "version 2"),
        ({"vocabulary": {"A": 0}}, "vocabulary"),
    ],
)
def test_the_configuration_of_another_tokenizer_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CharacterTokenizer.from_config({**TOKENIZER.to_config(), **change})


def test_a_configuration_that_is_no_object_is_refused() -> None:
    with pytest.raises(InputError, match="not a JSON object"):
        CharacterTokenizer.from_config(["hg38-character"])  # type: ignore[arg-type]
