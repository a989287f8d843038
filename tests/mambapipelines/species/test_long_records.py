"""A record of 50 million bases is classified in bounded memory, by a model of the default size."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig, save_classifier
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.training.recipe import load_task_recipe

RECORD_BP = 50_000_000
LIMIT_BYTES = 1_500_000_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_million_bases_stay_under_one_and_a_half_gigabytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SpeciesClassifier(
        SpeciesClassifierConfig(class_names=("a", "b", "c"), **load_task_recipe(SpeciesRecipe, "small").model)
    )
    torch.nn.init.normal_(model.deviation.weight)
    save_classifier(tmp_path / "model", model, details={})
    bases = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(0).integers(0, 4, RECORD_BP)]
    (tmp_path / "long.fa").write_bytes(b">long\n" + bases.tobytes() + b"\n")
    command = [sys.executable, "-m", "mambapipelines.cli.genomamba.main", "classify", "model", "long.fa"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[1].startswith(f"long\t{RECORD_BP}\t")
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit < LIMIT_BYTES
