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

    monkeypatch.setattr(induction_heads.length_warmup, "STEPS_BETWEEN_STATES", 5)
    monkeypatch.setattr(induction_heads, "rows_of", stop)
    with pytest.raises(KeyboardInterrupt):
        induction_heads.train("gru", options, kept)
    monkeypatch.setattr(induction_heads, "rows_of", note)
    again, _ = induction_heads.train("gru", options, kept)
    assert begun == list(range(5, 12))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_the_copying_task_asks_for_the_scattered_symbols_in_their_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    copying = pytest.importorskip("selective_copying")
    tokens, symbols = copying.rows_of(32, 64, seed=0, stream=copying.TRAINING_ROWS, first=3)
    again, _ = copying.rows_of(32, 64, seed=0, stream=copying.TRAINING_ROWS, first=3)
    assert torch.equal(tokens, again) and not torch.equal(tokens, copying.rows_of(32, 64, 1, 0, 3)[0])
    assert (tokens[:, 32:] == copying.ASK).all()
    places = []
    for row, wanted in zip(tokens[:, :32], symbols, strict=True):
        held = row != copying.BLANK
        assert torch.equal(row[held], wanted)
        places.append(held.nonzero().flatten())
    gaps = torch.stack(places).diff(dim=1)
    assert (gaps > 0).all() and (gaps.float().std(dim=0) > 1).all()  # at distances that vary
    assert len(copying.COMBINATIONS) == 8


def test_models_of_the_copying_task_are_selective_in_what_their_name_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    copying = pytest.importorskip("selective_copying")
    for name, selective in copying.COMBINATIONS.items():
        model = copying.CopyingModel(selective)
        mixers = [block.mixer for block in model.stack.blocks]
        assert {mixer.selective for mixer in mixers} == {selective}
        assert name == ("+".join(selective) or "none")
        assert [mixer.input_matrix is None for mixer in mixers] == ["input" in selective] * copying.LAYERS
