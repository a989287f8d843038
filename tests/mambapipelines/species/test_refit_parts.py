"""A model that was trained before a part existed gets it, and keeps its stack."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import refit_parts
from genomamba.data.genomes import GenomeSpecification
from genomamba.models.species_classifier import load_classifier
from mambacore.errors import InputError
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier


def trained_without_parts(folder: Path, length: int) -> Path:
    """A model of two species that differ in their composition, as if it had been trained before there were parts."""
    model = trained(folder, length)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    del config["details"]["recipe"]["parts"]
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def trained(folder: Path, length: int, changes: tuple[str, ...] = ()) -> Path:
    """A model of two species that differ in their composition, trained for two steps, with stretches held out."""
    random = np.random.default_rng(3)
    genomes = []
    for name, gc in (("at", 0.2), ("gc", 0.6)):
        letters = random.choice(list("ACGT"), length, p=[(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2])
        (folder / f"{name}.fa").write_text(f">{name}\n{''.join(letters)}\n", encoding="ascii")
        genomes.append(GenomeSpecification(name, (str(folder / f"{name}.fa"),)))
    options = SpeciesTrainingOptions(
        genomes, 256, folder / "model", steps=2, recipe="tiny", threads=1, seed=4, changes=changes
    )
    train_species_classifier(options)
    return options.output


def test_a_refitted_model_has_parts_and_the_same_stack(tmp_path: Path) -> None:
    model = trained_without_parts(tmp_path, 60_000)
    refit_parts.refit(model, tmp_path / "new", bases_per_class=4096)
    before, old = load_classifier(model)
    after, new = load_classifier(tmp_path / "new")
    assert before.parts is None and after.parts is not None and after.parts.order > 1
    for name, value in before.stack.state_dict().items():
        assert torch.equal(after.stack.state_dict()[name], value)
    assert new["parts"]["cross_validated_accuracy"]["combined"]["1024"] > 0.95
    assert new["recipe"]["parts"]["markov"] and "parts" not in old["recipe"]
    assert new["calibration"]["accuracy_by_length"]["1024"] > 0.95
    assert new["stretches"] == old["stretches"]


def test_genomes_without_held_out_sequence_are_refused(tmp_path: Path) -> None:
    model = trained_without_parts(tmp_path, 4000)
    with pytest.raises(InputError, match="no held-out sequence"):
        refit_parts.refit(model, tmp_path / "new", bases_per_class=4096)
    assert not (tmp_path / "new").exists()


def test_what_the_recipe_leaves_out_stays_out(tmp_path: Path) -> None:
    model = trained(tmp_path, 60_000, ("parts.markov=true", "parts.words=false"))
    refit_parts.refit(model, tmp_path / "new", bases_per_class=4096)
    parts = load_classifier(tmp_path / "new")[0].parts
    assert parts is not None and parts.order == 4
    assert not parts.kmers and parts.words is None


def test_a_model_whose_recipe_has_no_counted_part_is_refused(tmp_path: Path) -> None:
    model = trained(tmp_path, 60_000)
    with pytest.raises(InputError, match="its recipe leaves them out"):
        refit_parts.refit(model, tmp_path / "new", bases_per_class=4096)
    assert not (tmp_path / "new").exists()
