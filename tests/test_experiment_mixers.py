"""The experiment that puts mixers beside each other: its parities, its equal parameters, its table."""

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[1] / "pipelines" / "experiments"


@pytest.fixture
def mixers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return pytest.importorskip("mixers")


def test_parities_are_those_of_the_bits_after_the_mark(mixers: ModuleType):
    tokens, answers = mixers.bits(9, 5, (0, 1))
    assert tokens.shape == answers.shape == (5, 10)
    assert (tokens[:, 0] == mixers.PARITY_MARK).all() and (answers[:, 0] == 0).all()
    for row, parities in zip(tokens[:, 1:].tolist(), answers[:, 1:].tolist(), strict=True):
        assert parities == [sum(row[: end + 1]) % 2 for end in range(9)]
    assert torch.equal(mixers.bits(9, 5, (0, 1))[0], tokens) and not torch.equal(mixers.bits(9, 5, (0, 2))[0], tokens)


@pytest.mark.parametrize("task", ["dna", "audio"])
def test_models_of_a_task_have_equal_parameters_within_two_percent(mixers: ModuleType, task: str):
    build = mixers.TRAINED[task][0]
    counts = [
        mixers.parameters_of(build(mixers.with_equal_parameters(build, mixer))) for mixer in mixers.MIXERS.values()
    ]
    assert max(counts) / min(counts) < 1.02


def test_rows_hold_figures_and_paired_differences(mixers: ModuleType):
    def result(losses):
        part = {"losses": losses, "steps": 3, "training_seconds": 2.0}
        return {"mixer": {"name": "any"}, "parameters": 7, "steps": part, "time": part}

    found = {
        ("selective", 0): result([1.0, 1.2, 1.4]), ("selective", 1): result([1.2, 1.4, 1.6]),
        ("mamba2", 0): result([1.1, 1.3, 1.5]), ("mamba2", 1): result([1.3, 1.5, 1.7]),
    }  # fmt: skip
    rows = mixers.rows_of_task("dna", found)
    first, second = rows[:2]
    assert first[7] == f"{math.exp(1.3):.4f}" and second[7] == f"{math.exp(1.4):.4f}"
    assert first[9] == "" and second[9] == "+100.0 +- 0.0"  # every block differs by as much
    assert first[10] == second[10] == "200.0"
    assert mixers.rows_of_task("audio", found)[0][7] == f"{1.3 / math.log(2):.4f}"
