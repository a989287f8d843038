"""Mates are one call, however their files are arranged."""

from pathlib import Path

import numpy as np
import pytest

from mambacore.errors import InputError
from mambapipelines.species.classify import ClassificationOptions, classify_files
from mambapipelines.species.mates import are_mates, pair_name
from tiny_species import bases, fasta, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model")


def fastq(names: list[str], seed: int) -> bytes:
    reads = [bases(100 + number, seed + number) for number in range(len(names))]
    return b"".join(
        b"@" + name.encode() + b"\n" + read + b"\n+\n" + b"I" * len(read) + b"\n"
        for name, read in zip(names, reads, strict=True)
    )


def table(model: Path, *sources: Path, **options: object) -> list[list[str]]:
    output = sources[0].with_name("calls.tsv")
    classify_files(ClassificationOptions(model, [str(source) for source in sources], output=output, **options))
    return [line.split("\t") for line in output.read_text().splitlines()[1:]]


@pytest.mark.parametrize(
    ("first", "second", "mates"),
    [("r/1", "r/2", True), ("r", "r", True), ("r/1", "r/1", False), ("r/2", "r/1", False), ("r/1", "s/2", False)],
)
def test_names_of_mates(first: str, second: str, mates: bool) -> None:
    assert are_mates(first, second) is mates
    assert not mates or pair_name(first) == pair_name(second)


@pytest.mark.parametrize("endings", [("/1", "/2"), ("", "")])
def test_two_files_are_one_interleaved_file(model: Path, tmp_path: Path, endings: tuple[str, str]) -> None:
    names = ["a", "b", "c"]
    parts = [fastq([name + ending for name in names], 10 * seed) for seed, ending in enumerate(endings)]
    (tmp_path / "one.fq").write_bytes(parts[0])
    (tmp_path / "two.fq").write_bytes(parts[1])
    lines = [part.splitlines(keepends=True) for part in parts]
    records = [b"".join(side[4 * number : 4 * number + 4]) for number in range(3) for side in lines]
    (tmp_path / "both.fq").write_bytes(b"".join(records))
    rows = table(model, tmp_path / "both.fq", paired=True)
    assert [row[0] for row in rows] == names
    assert [int(row[1]) for row in rows] == [200, 202, 204]
    assert table(model, tmp_path / "one.fq", tmp_path / "two.fq", paired=True) == rows
    assert table(model, tmp_path / "one.fq", tmp_path / "two.fq", paired=True, processes=2, threads=1) == rows


def test_the_evidence_of_mates_adds_up(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pair.fa").write_bytes(
        b">r/1\n" + bases(300) + b"\n>r/2\n" + bases(300) + b"\n>alone/1\n" + bases(50) + b"\n"
    )
    rows = table(model, tmp_path / "pair.fa", paired=True)
    assert [(row[0], row[1]) for row in rows] == [("r", "600"), ("alone/1", "50")]
    single = table(model, tmp_path / "pair.fa")
    # The same read twice has the evidence per base of one, and at least its confidence.
    assert rows[0][2] == single[0][2]
    assert float(rows[0][3]) >= float(single[0][3])
    assert np.isclose(sum(map(float, rows[0][4:])), 1, atol=1e-5)


def test_a_masked_mate_adds_nothing_and_both_go_to_one_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pair.fa").write_bytes(fasta({"r/1": bases(300), "r/2": b"N" * 80, "n/1": b"NNN", "n/2": b"NN"}))
    rows = table(
        model,
        tmp_path / "pair.fa",
        paired=True,
        classified_output=str(tmp_path / "in"),
        unclassified_output=tmp_path / "no.fa",
    )
    assert rows[0][3] == table(model, tmp_path / "pair.fa")[0][3]
    assert rows[1][:4] == ["n", "5", "unclassified", "NA"]
    assert (tmp_path / "in" / f"{rows[0][2]}.fa").read_bytes().count(b">") == 2
    assert (tmp_path / "no.fa").read_bytes().count(b">") == 2


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["a/1", "b/1"], ["a/2"], "number of reads"),
        (["a/1"], ["b/2"], "read 1 is 'a/1'"),
        (["a/1"], ["a/1"], "same pairs in the same order"),
    ],
)
def test_files_of_other_pairs_are_refused(
    model: Path, tmp_path: Path, first: list[str], second: list[str], message: str
) -> None:
    (tmp_path / "one.fq").write_bytes(fastq(first, 0))
    (tmp_path / "two.fq").write_bytes(fastq(second, 5))
    with pytest.raises(InputError, match=message):
        table(model, tmp_path / "one.fq", tmp_path / "two.fq", paired=True)
    with pytest.raises(InputError, match="3 inputs"):
        table(model, *[tmp_path / "one.fq"] * 3, paired=True)
    assert not (tmp_path / "calls.tsv").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["r/1", "r/2", "s/1"], "1 record without a mate, called alone\n"),
        (["r.1", "r.2"], "2 records without a mate, called alone: mates have one name, or names that end in /1 and /2"),
        (["r/1", "r/2"], None),
    ],
)
def test_reads_without_a_mate_are_counted(
    names: list[str], words: str | None, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reads.fq").write_bytes(fastq(names, 0))
    table(model, tmp_path / "reads.fq", paired=True)
    errors = capsys.readouterr().err
    assert (words or "without a mate") in errors if words else "without a mate" not in errors
