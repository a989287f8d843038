"""A run that depended on other data says which files those are."""

from pathlib import Path

import pytest

from mambacore.errors import InputError
from mambapipelines.training.fingerprint import CONTENTS_NAME, changed_contents, refuse_other_run, write_contents

BEFORE = {"a.wav": "1", "b.wav": "2", "caf\udce9.wav": "3", "d.wav": "4"}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (BEFORE, None),
        (BEFORE | {"b.wav": "9"}, "changed: b.wav"),
        (dict.fromkeys(BEFORE, "9"), "changed: a.wav, b.wav, caf\udce9.wav and 1 other"),
        ({"a.wav": "1", "d.wav": "4", "e.wav": "5"}, "missing: b.wav, caf\udce9.wav; new: e.wav"),
    ],
)
def test_files_are_named(now: dict[str, str], words: str | None, tmp_path: Path) -> None:
    write_contents(tmp_path, BEFORE)
    assert changed_contents(tmp_path, now) == words


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_contents_name_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / CONTENTS_NAME).write_bytes(content)
    assert changed_contents(tmp_path, BEFORE) is None


def test_a_refusal_names_them_only_where_data_differ(tmp_path: Path) -> None:
    recorded = {"--seed": 1, "training clips": [2, 100, 5]}
    with pytest.raises(InputError, match=r"training clips of the data, which .* \(changed: b\.wav\); give the same"):
        refuse_other_run(recorded, recorded | {"training clips": [2, 100, 6]}, tmp_path, lambda: "changed: b.wav")
    with pytest.raises(InputError, match="--seed was 1 and is now 2; give the same"):
        refuse_other_run(recorded, recorded | {"--seed": 2}, tmp_path, lambda: "changed: b.wav")
