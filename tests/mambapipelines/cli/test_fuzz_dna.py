"""Damaged inputs of every kind of DNA command: a sentence or a result, never an exception, a hang or a full memory."""

import os
from pathlib import Path

import pytest

import fuzz_dna
from fuzzing import run_case, run_cases

NAMES = (
    "reads", "compressed reads", "paired reads", "groups", "genome list", "genome to train on", "regions to embed",
    "regions to track", "region option", "variants", "chromosome map", "intervals", "fine-tuning table",
    "table to predict", "prompt", "recipe", "index of a genome", "configuration of a species model",
    "configuration of a language model", "configuration of a fine-tuned model", "weights", "metrics of a run",
    "state of a run",
)  # fmt: skip
# Cases of each target in the slow test: 20,000 in all; FUZZ_CASES says otherwise.
SLOW_CASES = int(os.environ.get("FUZZ_CASES", "870"))
SLOW_TRAINING = ("genome to train on", "fine-tuning table", "state of a run")
FAST_CASES = 6


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz_dna.prepare(tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_tried(material: Path) -> None:
    assert set(fuzz_dna.targets(material)) == set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW_TRAINING])
def test_some_damaged_inputs(name: str, material: Path) -> None:
    target = fuzz_dna.targets(material)[name]
    failures = [f"case {index}: {what}" for index in range(FAST_CASES) if (what := run_case(target, index))]
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_inputs(name: str, material: Path) -> None:
    failures = run_cases("fuzz_dna", material, name, range(SLOW_CASES))
    assert not failures, f"{len(failures)} of {SLOW_CASES}:\n" + "\n".join(map(str, failures[:5]))
