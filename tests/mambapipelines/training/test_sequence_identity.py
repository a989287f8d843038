"""What a run depends on: any other base of its data is found, and states of earlier versions are still read."""

from pathlib import Path

import pytest

from mambacore.errors import InputError
from mambapipelines.training import fingerprint
from mambapipelines.training.fingerprint import refuse_other_run, sequence_identity
from tiny_species import bases

LENGTH = 20_000
SEQUENCE = bases(LENGTH)


def identity(letters: bytes) -> list:
    return sequence_identity("chr1", len(letters), lambda start, end: letters[start:end])


def with_another_base(position: int) -> bytes:
    return (
        SEQUENCE[:position] + (b"A" if SEQUENCE[position : position + 1] != b"A" else b"C") + SEQUENCE[position + 1 :]
    )


@pytest.mark.parametrize("where", ["sequences", "reference"])
@pytest.mark.parametrize("position", [0, 4095, 4096, LENGTH // 2, LENGTH - 4097, LENGTH - 1])
def test_another_base_anywhere_is_found(
    position: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_POSITIONS_AT_ONCE", 3000)
    before, now = (
        {where: {"cow": [identity(letters)]} if where == "sequences" else [identity(letters)]}
        for letters in (SEQUENCE, with_another_base(position))
    )
    refuse_other_run(before, before, tmp_path)
    with pytest.raises(InputError, match="sequence 'chr1' has other letters"):
        refuse_other_run(before, now, tmp_path)


@pytest.mark.parametrize(("position", "is_found"), [(0, True), (LENGTH // 2, False)])
def test_states_of_earlier_versions_know_only_the_ends(position: int, is_found: bool, tmp_path: Path) -> None:
    before = {"sequences": {"cow": [identity(SEQUENCE)[:3]]}}
    refuse_other_run(before, {"sequences": {"cow": [identity(SEQUENCE)]}}, tmp_path)
    now = {"sequences": {"cow": [identity(with_another_base(position))]}}
    if not is_found:
        refuse_other_run(before, now, tmp_path)
        return
    with pytest.raises(InputError, match="other letters"):
        refuse_other_run(before, now, tmp_path)


def test_an_added_sequence_is_named_beside_an_earlier_state(tmp_path: Path) -> None:
    before = {"reference": [identity(SEQUENCE)[:3]]}
    now = {"reference": [identity(SEQUENCE), sequence_identity("chr2", 4, lambda start, end: b"ACGT"[start:end])]}
    with pytest.raises(InputError, match="sequence 'chr2' has been added"):
        refuse_other_run(before, now, tmp_path)
