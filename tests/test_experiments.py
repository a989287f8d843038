"""Experiments: a training that was stopped continues to the same bits."""

import argparse
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[1] / "pipelines" / "experiments"


@pytest.fixture
def induction_heads(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return pytest.importorskip("induction_heads")


def test_a_stopped_training_of_induction_heads_continues_to_the_same_bits(
    induction_heads: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = argparse.Namespace(seed=0, batch=1, steps=12, learning_rate=3e-3, enough=0.0, output=tmp_path)
    (tmp_path / "parts").mkdir()
    kept = induction_heads.state_path("gru", options)
    whole, steps = induction_heads.train("gru", options, kept)
    assert steps == 12 and not kept.exists()
    rows_of, begun = induction_heads.rows_of, []

    def stop(*numbers):
        if numbers[-1] == 8:
            raise KeyboardInterrupt
        return rows_of(*numbers)

    def note(*numbers):
        begun.append(numbers[-1])
        return rows_of(*numbers)

    monkeypatch.setattr(induction_heads, "STEPS_BETWEEN_STATES", 5)
    monkeypatch.setattr(induction_heads, "rows_of", stop)
    with pytest.raises(KeyboardInterrupt):
        induction_heads.train("gru", options, kept)
    monkeypatch.setattr(induction_heads, "rows_of", note)
    again, _ = induction_heads.train("gru", options, kept)
    assert begun == list(range(5, 12))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
