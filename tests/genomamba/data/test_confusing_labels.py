"""Tables that programs and people write: read as they are meant, or refused with the line; nothing is guessed."""

import io
import logging

import pytest

from genomamba.data.targets import describe_targets, encode_targets, guess_kind
from genomamba.io.tables import SequenceTable, assign_splits, read_sequence_table
from mambacore.errors import InputError
from tiny_species import bases

SEQUENCES = [bases(30, number).decode() for number in range(40)]
CLASSES = ["ab"[number % 2] for number in range(40)]
NUMBERS = [f"{number / 7 - 3:.3f}" for number in range(40)]


def table(cells: list[str], header: str = "sequence\ty", sequences: list[str] = SEQUENCES) -> SequenceTable:
    lines = [header, *(f"{sequence}\t{cell}" for sequence, cell in zip(sequences, cells, strict=True))]
    return read_sequence_table(io.BytesIO("\n".join(lines).encode()))


def described(rows: SequenceTable) -> tuple[str, tuple[str, ...]]:
    kind = guess_kind(rows)
    splits = assign_splits(rows, [None] * len(rows), 0)
    description = describe_targets(rows, splits, kind)
    encode_targets(rows, description)
    return description.kind, description.class_names


def alternating(*values: str) -> list[str]:
    return [values[number % len(values)] for number in range(40)]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (alternating("a", "a\u200b"), "look alike"),
        (alternating("a  b", "a b"), "look alike"),
        (alternating("caf\u00e9", "cafe\u0301"), "look alike"),
        (alternating("1", "01"), "same number"),
        (alternating("a" * 300, "b"), "300 characters"),
        ([*NUMBERS[:20], *["ND"] * 20], "'ND' in the column 'y' of line 22"),
        ([*NUMBERS[1:3], *["high", "low"] * 19], "'high' in the column 'y' of line 4"),
        ([*map(str, range(6)), *["high", "low"] * 17], "'high' in the column 'y' of line 8"),
        ([*NUMBERS[:39], "1e308"], "1e308 in the column 'y' of line 41"),
        ([f"{number}e-320" for number in range(40)], "too little"),
    ],
)
def test_labels_that_mislead_are_refused(cells: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        described(table(cells))


@pytest.mark.parametrize(
    ("cells", "header", "kind", "names"),
    [
        (alternating(str(2**53), str(2**53 + 1)), "sequence\ty", "classes", (str(2**53), str(2**53 + 1))),
        (alternating("True\tFalse", "False\tTRUE", "true\ttrue"), "sequence\ta\tb", "labels", ()),
        (alternating("1.5", "high", "low"), "sequence\ty", "classes", ("1.5", "high", "low")),
        (CLASSES, "Sequence\tKind", "classes", ("a", "b")),
    ],
)
def test_unusual_labels_are_understood(cells: list[str], header: str, kind: str, names: tuple[str, ...]) -> None:
    assert described(table(cells, header)) == (kind, names)


def test_classes_that_differ_in_case_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert described(table(alternating("TRUE", "false", "False")))[1] == ("False", "TRUE", "false")
    assert "'False' and 'false'" in caplog.text


@pytest.mark.parametrize("missing", ["NA", "nan", "NaN", "n/a", "null", ""])
def test_a_missing_sequence_is_not_read_as_bases(missing: str) -> None:
    with pytest.raises(InputError, match="line 5 has no sequence"):
        table(CLASSES, sequences=[*SEQUENCES[:3], missing, *SEQUENCES[4:]])


@pytest.mark.parametrize("blank", [" ", "\u00a0"])
def test_a_blank_within_a_sequence_is_named(blank: str) -> None:
    with pytest.raises(InputError, match="line 2 has a blank within its sequence"):
        table(CLASSES, sequences=[f"ACGT{blank}ACGT", *SEQUENCES[1:]])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["ACGT\ta", "ACGA\tb\tx"], "3 fields in line 3 but 2 columns"),
        (["1\tACGT\ta", "ACGA\tb"], "2 fields in line 3 but 2 columns in its header and row names"),
        (["ACGT\ta", "ACGA"], "1 field in line 3"),
    ],
)
def test_a_row_of_another_width_is_never_shifted(lines: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_sequence_table(io.BytesIO("\n".join(["sequence\ty", *lines]).encode()))


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nsequence;y\nACGT;a\nACGA;b\n",
        'sequence, y\n"ACGT", "a"\n"ACGA", "b"\n',
        '"sequence"\t"y"\n"1"\t"ACGT"\t"a"\n"2"\t"ACGA"\t"b"\n',
    ],
)
def test_tables_of_excel_and_r_are_read(text: str) -> None:
    rows = read_sequence_table(io.BytesIO(text.encode()))
    assert [len(tokens) for tokens in rows.tokens] == [4, 4]
    assert rows.labels == {"y": ["a", "b"]}


@pytest.mark.parametrize(("name", "is_used"), [("split", True), ("Split", True), ("set", False)])
def test_a_column_of_splits_is_used_or_noted(name: str, is_used: bool, caplog: pytest.LogCaptureFixture) -> None:
    text = f"sequence\t{name}\ty\n" + "".join(
        f"{sequence}\t{'train' if number < 30 else 'test'}\ta\n" for number, sequence in enumerate(SEQUENCES)
    )
    with caplog.at_level(logging.WARNING):
        rows = read_sequence_table(io.BytesIO(text.encode()), ["y"])
    assert (rows.splits[39] == "test") is is_used
    assert ("names splits but is not used" in caplog.text) is not is_used
