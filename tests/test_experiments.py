"""Experiments: a training that was stopped continues to the same bits, and tables say what was measured."""

import argparse
import json
from pathlib import Path
from types import ModuleType

import numpy as np
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
    options = argparse.Namespace(
        seed=0,
        batch=1,
        steps=12,
        learning_rate=3e-3,
        enough=0.0,
        mixed_lengths=True,
        cooldown=0.5,
        output=tmp_path,
    )
    # Mixed lengths, the cooldown and the step where it stops all lie at the last length.
    monkeypatch.setattr(induction_heads, "FIRST_LENGTH", 128)
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


def test_mixed_lengths_keep_half_of_the_steps_at_the_last_length_and_share_the_others(induction_heads: ModuleType):
    schedule = induction_heads.Schedule(8, 256, 1000, 0.0, 3e-3, mixed=True, seed=5)
    lengths = [schedule.length_at(step, 256) for step in range(4000)]
    assert lengths == [schedule.length_at(step, 256) for step in range(4000)]
    counts = {length: lengths.count(length) / len(lengths) for length in sorted(set(lengths))}
    assert list(counts) == [8, 16, 32, 64, 128, 256]
    assert counts.pop(256) == pytest.approx(0.5, abs=0.03)
    assert list(counts.values()) == pytest.approx([0.1] * 5, abs=0.02)
    # Lengths that are still being learned, and a schedule that does not mix, stay as they are.
    assert {schedule.length_at(step, 64) for step in range(100)} == {64}
    assert {schedule._replace(mixed=False).length_at(step, 256) for step in range(100)} == {256}


def test_the_learning_rate_falls_to_nothing_in_the_cooldown_alone(induction_heads: ModuleType):
    schedule = induction_heads.Schedule(8, 256, 1000, 0.0, 3e-3, cooldown=0.2)
    assert [schedule.rate_at(step) for step in (0, 24, 49, 500, 800)] == pytest.approx([0.02, 0.5, 1, 1, 1])
    assert [schedule.rate_at(step) for step in (850, 900, 999)] == pytest.approx([0.75, 0.5, 0.005])
    assert schedule._replace(cooldown=0.0).rate_at(999) == 1


def test_a_transfer_is_compared_row_by_row_over_the_same_seeds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    transfer = pytest.importorskip("transfer")

    def result(right: list[int], auroc: float) -> dict[str, object]:
        return {"right": right, "nats": [0.5] * 4, "metrics": {"genomamba": {"auroc": auroc}}}

    scratch = [result([1, 1, 0, 0], 0.6), result([1, 0, 0, 0], 0.6)]
    found = [result([1, 1, 1, 0], 0.7), result([1, 1, 1, 1], 0.9)]
    seeds, accuracy, _, _, least, most, nats, auroc, difference = transfer.summary_row(found, scratch)
    assert (seeds, accuracy, least, most, nats, auroc) == ("2", "87.5", "75.0", "100.0", "0.5000", "0.800")
    # Rows differ by 0, 0.5, 1 and 0.5.
    half = 196 * float(np.std([0, 0.5, 1, 0.5], ddof=1)) / 2
    assert difference == f"+50.0 ({50 - half:+.1f} to {50 + half:+.1f})"


def test_windows_of_the_transfer_table_come_from_the_chromosomes_of_their_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    transfer = pytest.importorskip("transfer")
    monkeypatch.setattr(transfer, "WINDOWS", {"train": 3, "valid": 2, "test": 2})
    base = {"chrI": "A", "chrVII": "C", "chrX": "G", "chrXI": "T"}
    for strain in transfer.STRAINS.values():
        text = "".join(f">{name}\n{letter * 60}\n" for name, letter in base.items())
        (tmp_path / f"{strain}.fa").write_text(text)
    monkeypatch.setattr(transfer, "SUFFIX", ".fa")
    lines = [line.split("\t") for line in transfer.yeasts_table(tmp_path, 40).splitlines()[1:]]
    assert {(split, sequence) for _, sequence, _, split in lines} == {
        ("train", "A" * 40),
        ("valid", "T" * 40),
        ("test", "C" * 40),
    }
    assert all(name.split("_")[0] == label for name, _, label, _ in lines)


def test_species_tables_give_means_and_ranges_over_seeds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    species = pytest.importorskip("species_by_length")
    row = {"length": 4096, "windows": 30, "independent_windows": 20}
    results = [{"parameters": 7, "rows": [{**row, "accuracy": share}]} for share in (0.4, 0.6)]
    found = species.table_rows("some", results)
    low, high = species.wilson_interval(0.5, 20)
    assert found == [["some", "7", "4,096", "2", "50.0", f"{100 * low:.1f}", f"{100 * high:.1f}", "40.0", "60.0", "30"]]


def test_centred_evidence_loses_what_is_the_same_for_all_windows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    species = pytest.importorskip("species_by_length")
    passes = []

    def evidence(_model: object, windows: list[int]) -> np.ndarray:
        """One unit for the class that the window names, and five for the first class, always."""
        passes.append(len(windows))
        return np.eye(2)[windows] + [5.0, 0.0]

    class Sampler:
        def __init__(self, *_arguments: object, **_options: object) -> None:
            pass

        def sample_batch(self, _first: int, _count: int) -> tuple[np.ndarray, np.ndarray]:
            # Unbalanced: the mean over classes must not lean towards the frequent one.
            return np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1])

    monkeypatch.setattr(species, "evidence_of_records", evidence)
    monkeypatch.setattr(species, "WindowSampler", Sampler)
    training = argparse.Namespace(class_names=("one", "other"))
    classifiers = species.StackCalls(None, training).classifiers()
    windows = [0, 1, 1]
    assert classifiers[""](windows, 3)[0].tolist() == [0, 0, 0]
    assert classifiers[species.CENTRED](windows, 3)[0].tolist() == [0, 1, 1]
    assert passes == [4, 3]  # one pass for both


def test_finished_parts_are_found_by_their_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    experiment = pytest.importorskip("experiment").Experiment("some", tmp_path, {})
    for name in ("a, seed 1", "a, seed 0", "a, from b, seed 0"):
        experiment.part(name, lambda name=name: {"name": name})
    assert [found["name"] for found in experiment.finished("a, seed *")] == ["a, seed 0", "a, seed 1"]
    assert json.loads((tmp_path / "parts" / "a, seed 1.json").read_text())["name"] == "a, seed 1"


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
