"""Tables of sequences with labels: what is read, how it is split, and which mistakes are named with their line."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from genomamba.data.targets import describe_targets, encode_targets, guess_kind
from genomamba.io.tables import assign_splits, read_class_folders, read_sequence_table, repeated_in_training
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError

TABLE = "name\tsequence\tlabel\tsplit\na\tACGT\tx\ttrain\nb\tacgn\ty\ttrain\nc\tGG\tNA\tvalid\nd\tTTT\ty\ttest\n"


def write(folder: Path, text: str, name: str = "table.tsv") -> str:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


@pytest.mark.parametrize(("name", "separator"), [("t.tsv", "\t"), ("t.csv", ","), ("t.csv.gz", ",")])
def test_rows_come_in_order_with_their_labels(name: str, separator: str, tmp_path: Path) -> None:
    table = read_sequence_table(write(tmp_path, TABLE.replace("\t", separator).replace("\n", "\r\n"), name))
    assert table.names == ["a", "b", "c", "d"]
    assert table.labels == {"label": ["x", "y", None, "y"]}
    assert table.splits == ["train", "train", "valid", "test"]
    assert [CharacterTokenizer().decode(tokens) for tokens in table.tokens] == ["ACGT", "ACGN", "GG", "TTT"]


def test_records_and_intervals_give_the_same_sequences(tmp_path: Path) -> None:
    fasta = write(tmp_path, ">one\nACGTAC\n>two\nTTGACC\n", "genome.fa")
    records = read_sequence_table(write(tmp_path, "record\tlabel\ntwo\t1\none\t0\n"), fasta=fasta)
    intervals = "chrom\tstart\tend\tstrand\tlabel\ntwo\t0\t6\t+\t1\none\t1\t4\t-\t0\n"
    placed = read_sequence_table(write(tmp_path, intervals), reference=fasta)
    decode = CharacterTokenizer().decode
    assert [decode(tokens) for tokens in records.tokens] == ["TTGACC", "ACGTAC"]
    assert [decode(tokens) for tokens in placed.tokens] == ["TTGACC", "ACG"]
    assert records.names == ["two", "one"]


def test_folders_of_classes_are_read_as_genomic_benchmarks_has_them(tmp_path: Path) -> None:
    for place, letters in (("train/pos/10", "AC"), ("train/pos/2", "GT"), ("train/neg/0", "TT"), ("test/neg/7", "CC")):
        path = tmp_path / f"{place}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(letters + "\n")
    table = read_class_folders(tmp_path)
    assert table.names == ["train/neg/0.txt", "train/pos/2.txt", "train/pos/10.txt", "test/neg/7.txt"]
    assert table.labels == {"class": ["neg", "pos", "pos", "neg"]}
    assert table.splits == ["train", "train", "train", "test"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"is empty"),
        ("sequence\tlabel\n", r"a header but no rows"),
        ("sequence\tlabel\tlabel\nAC\t1\t2\n", r"two columns 'label'"),
        ("sequence\t\nAC\t1\n", r"no name for column 2"),
        ("letters\tlabel\nAC\t1\n", r"no column 'sequence'"),
        ("sequence\tlabel\nAC\t1\nAC\n", r"1 field in line 3 but 2 columns"),
        ("sequence\tlabel\nAC\t1\n\t2\n", r"line 3 has no sequence"),
        ("sequence\tlabel\nAC\t1\nAJ\t2\n", r"line 3: the sequence has 'J' at position 2"),
        ("name\tsequence\nx\tAC\ny\tAC\nx\tAC\n", r"the name 'x' in line 4 and in line 2"),
        ("sequence\tsplit\nAC\tlater\n", r"line 2 has the split 'later'"),
    ],
)
def test_mistakes_in_a_table_are_named_with_their_line(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        read_sequence_table(write(tmp_path, text))


def test_mistakes_beside_a_table_are_named(tmp_path: Path) -> None:
    fasta = write(tmp_path, ">one\nACGTAC\n", "genome.fa")
    with pytest.raises(InputError, match=r"has no column 'other'"):
        read_sequence_table(write(tmp_path, TABLE), ["other"])
    with pytest.raises(InputError, match=r"line 2 names the record 'two'"):
        read_sequence_table(write(tmp_path, "record\ntwo\n"), fasta=fasta)
    for row, sentence in (("one\t2\t9", r"2 to 9, which is not within the 6 bp"), ("one\tx\t3", r"'x' to '3'")):
        with pytest.raises(InputError, match=sentence):
            read_sequence_table(write(tmp_path, f"chrom\tstart\tend\n{row}\n"), reference=fasta)


def test_splits_are_a_function_of_the_seed_and_keep_the_classes_shares(tmp_path: Path) -> None:
    rows = "".join(f"{'ACGT' * 3}\t{'rare' if number % 10 == 0 else 'common'}\n" for number in range(200))
    table = read_sequence_table(write(tmp_path, "sequence\tlabel\n" + rows))
    splits = assign_splits(table, table.labels["label"], seed=1)
    assert splits == assign_splits(table, table.labels["label"], seed=1)
    assert splits != assign_splits(table, table.labels["label"], seed=2)
    assert [splits.count(name) for name in ("train", "valid", "test")] == [160, 20, 20]
    rare = [split for split, label in zip(splits, table.labels["label"], strict=True) if label == "rare"]
    assert [rare.count(name) for name in ("train", "valid", "test")] == [16, 2, 2]
    assert repeated_in_training(table, splits) == 40


def test_a_reverse_complement_in_training_is_a_repeat(tmp_path: Path) -> None:
    table = read_sequence_table(write(tmp_path, "sequence\tsplit\nAACG\ttrain\nCGTT\ttest\nACCG\ttest\n"))
    assert repeated_in_training(table, ["train", "test", "test"]) == 1


def test_kinds_are_guessed_and_targets_encoded(tmp_path: Path) -> None:
    cases = {
        "y\nb\na\nb\n": ("classes", [[1], [0], [1]]),
        "y\n2\n1\n1\n": ("classes", [[1], [0], [0]]),
        "y\tz\n1\t0\n0\tNA\n1\t1\n": ("labels", [[1, 0], [0, np.nan], [1, 1]]),
        "y\n0.5\n-1\nnan\n": ("numbers", [[0.5], [-1], [np.nan]]),
    }
    for text, (kind, expected) in cases.items():
        head, *rows = text.splitlines()
        table = read_sequence_table(write(tmp_path, "\n".join([f"sequence\t{head}", *(f"AC\t{row}" for row in rows)])))
        assert guess_kind(table) == kind
        description = describe_targets(table, ["train"] * 3, guess_kind(table))
        assert np.array_equal(encode_targets(table, description), np.array(expected, dtype=float), equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "labels", "splits", "sentence"),
    [
        ("classes", "abca", "ttvt", r"class 'c' in line 4 \(valid\) but not in training"),
        ("classes", "aaaa", "tttt", r"1 class in training"),
        ("numbers", "1x23", "tttt", r"'x' in the column 'y' of line 3, which is not a finite number"),
        ("labels", "0121", "tttt", r"has 2 in the column 'y' of line 4, but labels are 0 or 1"),
        ("numbers", "1112", "tttv", r"only the value 1 in training"),
    ],
)
def test_targets_that_cannot_be_learned_are_named(
    kind: str, labels: str, splits: str, sentence: str, tmp_path: Path
) -> None:
    table = read_sequence_table(write(tmp_path, "sequence\ty\n" + "".join(f"AC\t{label}\n" for label in labels)))
    names = [{"t": "train", "v": "valid"}[letter] for letter in splits]
    with pytest.raises(InputError, match=sentence):
        describe_targets(table, names, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", ["1_000", "1e400", "--1", "0x1f", "\u22121"])
def test_what_only_looks_like_a_number_is_named(number: str, tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    rows = [f"ACGT\t{value / 7:.3f}" for value in range(30)]
    table.write_text("\n".join(["sequence\ty", *rows, f"ACGT\t{number}"]), encoding="utf-8")
    with pytest.raises(InputError, match="of line 32, which is not a finite number"):
        guess_kind(read_sequence_table(str(table)))
