"""A shipped model is found by its name, never in place of a path, and refused when it is not what was shipped."""

import json
import logging
from pathlib import Path

import pytest
import torch

import audiomamba.weights
import genomamba
import genomamba.weights
from genomamba.models.language_model import load_language_model
from mambacore.errors import InputError
from mambacore.model_folder import read_model_folder
from mambacore.shipped import ShippedModels
from mambapipelines.cli.genomamba.main import main
from ship_model import LARGEST_MODEL_BYTES, LARGEST_TOTAL_BYTES, rounded, ship
from tiny_language_models import model_folder
from tiny_species import bases, fasta, write_tiny_model

FACTS = {"task": "a test", "figures": "none", "licence": "Apache-2.0"}
ALL_SHIPPED = [
    *genomamba.weights.MODELS.table.values(),
    *audiomamba.weights.MODELS.table.values(),
]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShippedModels:
    """A package whose models are a tiny classifier and a tiny language model; the working directory is empty."""
    for package in ("genomamba", "audiomamba"):
        (tmp_path / "checkout" / package / "weights").mkdir(parents=True)
        (tmp_path / "checkout" / package / "weights" / "models.json").write_text("{}")
    write_tiny_model(tmp_path / "classifier")
    ship(tmp_path / "classifier", "fungi", FACTS, None, tmp_path / "checkout")
    ship(model_folder(tmp_path / "pretrained", "causal"), "fungi-lm", FACTS, None, tmp_path / "checkout")
    models = ShippedModels(tmp_path / "checkout" / "genomamba" / "weights")
    monkeypatch.setattr(genomamba.weights, "MODELS", models)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return models


@pytest.mark.parametrize("reference", ["fungi", "shipped://fungi", Path("shipped://fungi"), Path("fungi")])
def test_a_name_is_the_shipped_model(shipped: ShippedModels, reference: str | Path):
    assert shipped.find(reference) == shipped.folder / "fungi"
    assert genomamba.load(reference).kind == "species classifier"


def test_every_command_takes_a_name(shipped: ShippedModels, capsys: pytest.CaptureFixture[str]):
    Path("contigs.fa").write_bytes(fasta({"one": bases(200)}))
    assert main(["classify", "fungi", "contigs.fa"]) == 0
    assert "one\t200\t" in capsys.readouterr().out
    assert main(["embed", "fungi-lm", "contigs.fa", "--output", "vectors.npz"]) == 0
    assert main(["generate", "fungi-lm", "--length", "20", "--output", "new.fa"]) == 0
    assert main(["share", "fungi", "me/fungi"]) == 0
    assert str(shipped.folder) in capsys.readouterr().out


def test_a_model_folder_of_that_name_here_is_used_and_said(
    shipped: ShippedModels, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    write_tiny_model(Path("fungi"))
    with caplog.at_level(logging.WARNING):
        assert shipped.find("fungi") == Path("fungi")
    assert "shipped://fungi is the shipped model" in caplog.text
    caplog.clear()
    assert shipped.find("./fungi") == Path("fungi")
    assert shipped.find("shipped://fungi") == shipped.folder / "fungi"
    assert not caplog.text
    Path("contigs.fa").write_bytes(fasta({"one": bases(200)}))
    capsys.readouterr()
    assert main(["classify", "fungi", "contigs.fa"]) == 0
    assert capsys.readouterr().err.count("shipped://fungi is the shipped model") == 1


def test_rounded_matrices_halve_the_file_and_load_as_before(tmp_path: Path):
    source = model_folder(tmp_path / "source", "causal")
    target = rounded(source, tmp_path / "rounded")
    (config, before), (same, after) = read_model_folder(source), read_model_folder(target)
    assert config == same and before.keys() == after.keys()
    for name, tensor in before.items():
        kept = tensor.bfloat16().float() if tensor.dim() > 1 and tensor.dtype == torch.float32 else tensor
        torch.testing.assert_close(after[name].to(tensor.dtype), kept, rtol=0, atol=0)
    assert any(tensor.dtype == torch.bfloat16 for tensor in after.values())
    module = load_language_model(target).model
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_that_could_mean_two_things_is_refused(shipped: ShippedModels, kind: str):
    Path("fungi").write_text("x") if kind == "file" else Path("fungi").mkdir()
    with pytest.raises(InputError, match="write shipped://fungi for the shipped model"):
        shipped.find("fungi")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_model_is_refused_in_one_sentence(
    shipped: ShippedModels, file: str, damage: str, capsys: pytest.CaptureFixture[str]
):
    Path("contigs.fa").write_bytes(fasta({"one": bases(200)}))
    path = shipped.folder / "fungi" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content if damage == "changed" else content[:-1])
    assert main(["classify", "fungi", "contigs.fa"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("install the package again.")
    assert file in lines[0]


def test_a_name_that_is_nothing_lists_what_there_is(shipped: ShippedModels):
    with pytest.raises(
        InputError, match=r"no model folder fungus, and no shipped model of that name \(fungi, fungi-lm"
    ):
        shipped.find("fungus")
    with pytest.raises(InputError, match="there is no shipped model 'fungus': there are fungi"):
        shipped.find("shipped://fungus")
    assert shipped.find("some/folder") == Path("some/folder")


def test_models_lists_and_prints_a_card(shipped: ShippedModels, capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split("\t") == ["name", "task", "parameters", "size_mb", "licence", "figures"]
    assert [first.split("\t")[0], second.split("\t")[0]] == ["fungi", "fungi-lm"]
    assert main(["models", "fungi"]) == 0
    assert capsys.readouterr().out.startswith("# Species classifier")
    assert main(["models", "fungus"]) == 2


def test_no_place_of_the_training_machine_ships(shipped: ShippedModels, tmp_path: Path):
    source = tmp_path / "classifier"
    config = json.loads((source / "config.json").read_text())
    config["details"] = {"genomes": {"a": ["/home/me/a.fa"]}, "share": 1 / 3}
    (source / "config.json").write_text(json.dumps(config))
    target = ship(source, "fungi", FACTS, None, tmp_path / "checkout")
    assert json.loads((target / "config.json").read_text())["details"] == {"genomes": {"a": ["a.fa"]}, "share": 1 / 3}


def test_all_shipped_models_are_small_together():
    assert sum(model.size_bytes for model in ALL_SHIPPED) <= LARGEST_TOTAL_BYTES


@pytest.mark.parametrize("model", ALL_SHIPPED, ids=lambda model: model.name)
def test_a_shipped_model_is_whole_and_described(model):
    model.check()
    assert sorted(path.name for path in model.folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert model.size_bytes <= LARGEST_MODEL_BYTES
    _, tensors = read_model_folder(model.folder)
    assert sum(tensor.numel() for tensor in tensors.values()) == model.parameters
    assert model.task
    assert model.figures
    assert model.licence
    text = (model.folder / "config.json").read_text(encoding="utf-8") + model.card
    assert '"/' not in text
    assert any(line.startswith("# ") for line in model.card.splitlines())
