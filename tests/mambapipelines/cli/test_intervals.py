"""`genomamba intervals`: tables on standard output, whole files or none, one sentence for a mistake."""

import csv
import io
import re
from pathlib import Path

import pytest

from genomamba.data.intervals import read_intervals
from mambapipelines.cli.genomamba.main import main
from tiny_species import bases, fasta

SPLIT_OF_ROW = ["train", "train", "train", "valid", "train", "train", "train", "test"]
ROWS = "".join(
    f"chr1\t{number * 200}\t{number * 200 + 200}\t{SPLIT_OF_ROW[number % len(SPLIT_OF_ROW)]}\n" for number in range(24)
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    gap = b"N" * 500
    contigs = {"chr1": bases(5000), "chr2": bases(1600, 1), "chr3": bases(1000, 2) + gap, "chrM": bases(70, 3)}
    (tmp_path / "genome.fa").write_bytes(fasta(contigs))
    (tmp_path / "rows.bed").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def audit(*further: str, intervals: str = "rows.bed", rule: str = "mamba", length: str = "300") -> int:
    arguments = ["--intervals", intervals, "--reference", "genome.fa", "--rule", rule, "--length", length]
    return main(["intervals", "audit", *arguments, *further])


def make(*further: str, test: str = "chr3", length: str = "500") -> int:
    arguments = ["--reference", "genome.fa", "--valid", "chr2", "--test", test, "--length", length]
    return main(["intervals", "make", *arguments, *further])


def table(text: str) -> dict[tuple[str, str, str], dict[str, str]]:
    rows = csv.DictReader(io.StringIO(text), delimiter="\t")
    return {(row["first"], row["second"], row["chromosome"]): row for row in rows}


def test_the_audit_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit() == 0
    captured = capsys.readouterr()
    rows = table(captured.out)
    assert len(rows) == 6
    # A row's windows of 300 cover 100 bp on either side of it: its neighbours' meet over every base of three rows' 400.
    assert rows["train", "valid", "all"]["shared_bases"] == rows["train", "valid", "chr1"]["shared_bases"] == "1200"
    assert captured.err == ""


@pytest.mark.parametrize("rule", ["hyenadna", "mamba"])
@pytest.mark.parametrize("fix", ["drop", "trim"])
def test_a_fix_writes_rows_that_share_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], rule: str, fix: str
) -> None:
    assert audit(rule=rule) == 0
    before = capsys.readouterr().out
    assert audit("--fix", fix, "--output", "fixed.bed", rule=rule) == 0
    captured = capsys.readouterr()
    assert captured.out == before
    assert re.search(r"train: 18 rows, \d+ dropped, \d+ trimmed, \d+ written", captured.err)
    assert audit(intervals="fixed.bed", rule=rule) == 0
    rows = table(capsys.readouterr().out)
    assert {row["shared_bases"] for row in rows.values()} == {"0"}
    assert sorted(path.name for path in folder.iterdir()) == ["fixed.bed", "genome.fa", "genome.fa.fai", "rows.bed"]


def test_make_splits_by_chromosome_and_says_what_it_leaves_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("--output", "made.bed") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "train 10, valid 3, test 2; excluded: 1 rows with unknown bases, 1 shorter contigs, 170 bp" in captured.err
    rows = read_intervals("made.bed")
    assert {(row.chromosome, row.split) for row in rows} == {("chr1", "train"), ("chr2", "valid"), ("chr3", "test")}
    assert make() == 0
    assert capsys.readouterr().out == (folder / "made.bed").read_text(encoding="utf-8")
    assert audit(intervals="made.bed", rule="caduceus", length="256") == 0
    assert {row["shared_bases"] for row in table(capsys.readouterr().out).values()} == {"0"}
    assert make("--max-unknown", "1") == 0
    assert capsys.readouterr().out.count("test") == 3


def expect_one_line(status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    captured = capsys.readouterr()
    assert status == 2
    assert re.fullmatch(r"genomamba: error: [^\n]+\n", captured.err), captured.err
    assert message in captured.err


@pytest.mark.parametrize(
    ("further", "changes", "message"),
    [
        ((), {"rule": "enformer"}, "use hyenadna, mamba, caduceus"),
        ((), {"rule": "caduceus"}, "300 bp does not divide"),
        ((), {"length": "0"}, "the window length is 0"),
        ((), {"intervals": "missing.bed"}, "there is no file missing.bed"),
        (("--fix", "mend", "--output", "x.bed"), {}, "use drop or trim"),
        (("--fix", "drop"), {}, "name a file with --output"),
        (("--output", "x.bed"), {}, "choose a repair"),
        (("--fix", "drop", "--output", "no/x.bed"), {}, "there is no folder"),
        (("--reference", "missing.fa"), {}, "there is no file missing.fa"),
    ],
)
def test_mistakes_in_an_audit(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    further: tuple[str, ...],
    changes: dict[str, str],
    message: str,
) -> None:
    expect_one_line(audit(*further, **changes), message, capsys)
    assert not (folder / "x.bed").exists()


def test_a_row_of_another_assembly_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.bed").write_text(ROWS + "chr2\t1500\t1700\ttest\n")
    expect_one_line(audit(), "rows.bed, line 25 ends at 1700, beyond the 1600 bp of 'chr2' in genome.fa", capsys)


def test_a_fix_that_leaves_nothing_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.bed").write_text("chr1\t0\t200\ttrain\nchr1\t200\t400\ttest\n")
    expect_one_line(audit("--fix", "drop", "--output", "x.bed"), "leaves no train rows at 300 bp", capsys)
    assert not (folder / "x.bed").exists()


@pytest.mark.parametrize(
    ("further", "changes", "message"),
    [
        ((), {"test": "3"}, "no contig '3' (--test): did you mean 'chr3'"),
        ((), {"test": "chr2"}, "is given to --valid and to --test"),
        ((), {"test": "chr3,,chr1"}, "has an empty entry"),
        ((), {"test": "chrM"}, "no contig of 500 bp is left for test"),
        (("--max-unknown", "2"), {}, "--max-unknown is 2.0"),
        (("--exclude", "chr1"), {}, "left for train"),
        ((), {"length": "1500"}, "every test row of 1500 bp has more than 0.01"),
    ],
)
def test_mistakes_in_making(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    further: tuple[str, ...],
    changes: dict[str, str],
    message: str,
) -> None:
    expect_one_line(make(*further, **changes), message, capsys)


@pytest.mark.parametrize("name", ["audit", "make"])
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["intervals", name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"genomamba intervals {name}" in shown
    assert "Exit codes" in shown
