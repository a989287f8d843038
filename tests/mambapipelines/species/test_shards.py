"""Shards that independent jobs classify, merged: the same bytes as of one process, and nothing mixed up."""

import shutil
from pathlib import Path

import pytest

from mambapipelines.cli.genomamba.main import main
from tiny_species import bases, fasta, tiny_model, write_tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    write_tiny_model(place / "model")
    for name, first in (("a.fa", 0), ("b.fa", 50)):
        records = {f"{name}_{k}": bases(30 + 17 * (k * 7 % 11), first + k) for k in range(40)}
        (place / name).write_bytes(fasta(records | {f"{name}_n": b"NN"}))
    return place


def classify(place: Path, *options: str) -> int:
    inputs = [str(place / name) for name in ("a.fa", "b.fa")]
    return main(["classify", str(place / "model"), *inputs, "-q", "-t", "1", *options])


def outputs(folder: Path) -> list[str]:
    folder.mkdir()
    return [
        "-o",
        str(folder / "calls.tsv"),
        "--kraken-report",
        str(folder / "kraken"),
        "--multiqc",
        str(folder / "x_mqc.tsv"),
    ]


@pytest.fixture(scope="module")
def sharded(place: Path) -> Path:
    for number in (3, 1, 2):
        assert classify(place, "--parts", str(place / "parts"), "--shard", f"{number}/3") == 0
    return place


def test_merged_shards_are_one_process(sharded: Path) -> None:
    assert classify(sharded, *outputs(sharded / "one")) == 0
    assert classify(sharded, *outputs(sharded / "merged"), "--parts", str(sharded / "parts")) == 0
    for path in (sharded / "one").iterdir():
        assert path.read_bytes() == (sharded / "merged" / path.name).read_bytes()


def test_mixed_and_missing_shards_are_refused(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(sentence: str, *options: str) -> None:
        assert classify(sharded, *options) == 2
        assert sentence in capsys.readouterr().err

    parts = tmp_path / "parts"
    shutil.copytree(sharded / "parts", parts)
    (parts / "of_3" / "1.part").unlink()
    refused("has no shard 2/3", "--parts", str(parts))
    (parts / "of_2").mkdir()
    refused("has 2 divisions", "--parts", str(parts))
    refused("--parts is for independent jobs", "--parts", str(parts), "--processes", "2")
    refused("write K/N", "--parts", str(parts), "--shard", "4/3")
    refused("add --parts DIR", "--shard", "1/3")
    refused("writes into --parts only", "--parts", str(parts), "--shard", "1/3", "-o", str(tmp_path / "x"))
    refused("was made with another piece length", "--parts", str(sharded / "parts"), "--piece-length", "64")
    only_one = ["classify", str(sharded / "model"), str(sharded / "a.fa"), "--parts", str(sharded / "parts")]
    assert main(only_one) == 2
    assert "was made with another input" in capsys.readouterr().err


def test_shards_of_another_model_are_refused(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from genomamba.models.species_classifier import save_classifier  # noqa: PLC0415

    other = tiny_model()
    other.confidence_slope.data.fill_(0.2)
    save_classifier(tmp_path / "other", other, details={})
    inputs = [str(sharded / name) for name in ("a.fa", "b.fa")]
    assert main(["classify", str(tmp_path / "other"), *inputs, "--parts", str(sharded / "parts")]) == 2
    assert "was made with another model" in capsys.readouterr().err
