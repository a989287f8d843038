"""What goes through the model at once is halved until it fits a device; a device that is full later ends the run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mambacore.errors import InputError
from mambacore.longsequence.losses import TokenCrossEntropy
from mambapipelines.device import Placement
from mambapipelines.species.train import train_species_classifier
from mambapipelines.training import session
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.module import TrainingModule
from mambapipelines.training.schedules import LengthWarmup
from mambapipelines.training.sizes import POSITIONS_ON_A_DEVICE, Sizes, first_sizes, fitted
from mambapipelines.training.task import Pieces
from tolerances import TRAINING_FLOAT32_LOSS
from training_runs import run_options, write_genomes

STEPS = 3


@dataclass(frozen=True)
class SmallDevice(Placement):
    """The CPU under the name of a device."""

    @property
    def is_cpu(self) -> bool:
        return False


DEVICE = SmallDevice(torch.device("cpu"), "float32")


def test_rows_are_halved_and_then_the_pieces_of_a_single_row() -> None:
    assert first_sizes(Placement(torch.device("cpu"), "float32"), divisible=True) == Sizes()
    assert first_sizes(DEVICE, divisible=False) == Sizes()
    sizes = first_sizes(DEVICE, divisible=True)
    assert sizes.positions == POSITIONS_ON_A_DEVICE
    length = POSITIONS_ON_A_DEVICE // 2
    loss = TokenCrossEntropy(torch.zeros(1, length, dtype=torch.int64))
    one_row = Pieces(torch.zeros(1, length), loss, piece_length=4096)
    found = []
    while sizes is not None and len(found) < 4:
        found.append((sizes.rows(1, length), sizes.pieces(one_row).piece_length))
        sizes = sizes.halved()  # type: ignore[assignment]
    assert found == [(2, 2 * length), (1, length), (1, length // 2), (1, length // 4)]
    assert Sizes(64).halved() is None
    # On a CPU the recipe decides.
    assert (Sizes().rows(3, 100), Sizes().pieces(one_row), Sizes().halved()) == (3, one_row, None)


def test_what_was_tried_leaves_no_gradient_and_no_random_number() -> None:
    model, tried = nn.Linear(2, 1), []

    def attempt(sizes: Sizes) -> None:
        tried.append(sizes.positions)
        model(torch.randn(1, 2)).sum().backward()
        if sizes.positions is not None and sizes.positions > 300:
            raise torch.OutOfMemoryError("full")

    torch.manual_seed(1)
    said: list[str] = []
    assert fitted(Sizes(1024), attempt, model, DEVICE, said.append) == Sizes(256)
    assert tried == [1024, 512, 256]
    assert said == [
        "cpu lacks memory for 1,024 positions at once: trying 512",
        "cpu lacks memory for 512 positions at once: trying 256",
    ]
    assert model.weight.grad is None
    after = torch.rand(1)
    torch.manual_seed(1)
    assert after == torch.rand(1)


def test_the_probe_has_the_length_that_the_warm_up_ends_with() -> None:
    warmup = LengthWarmup(first_length=32, steps_per_stage=10, length=100)
    assert warmup.length_at(warmup.longest_step) == 100
    assert warmup.length_at(warmup.longest_step - 1) == 64
    assert LengthWarmup(32, 0, 100).longest_step == LengthWarmup(200, 10, 100).longest_step == 0


def full_above(positions: int, monkeypatch: pytest.MonkeyPatch, from_step: int = 0) -> None:
    """A device that is full when more positions than these go through the model at once, from a step on."""
    backward: Callable[..., Any] = TrainingModule._backward

    def limited(self: TrainingModule, replica: nn.Module, micro_batch: Any, *more: Any) -> Any:
        report = backward(self, replica, micro_batch, *more)
        if self.steps_done >= from_step and micro_batch[0].numel() > positions:
            raise torch.OutOfMemoryError("full")
        return report

    monkeypatch.setattr(session, "choose", lambda *_: DEVICE)
    monkeypatch.setattr(TrainingModule, "_backward", limited)


def losses(output: Path) -> list[float]:
    return [float(row["loss"]) for row in read_metrics(output / "training" / "metrics.csv")]


def test_a_run_goes_on_with_what_fits_and_remembers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_genomes(tmp_path)
    train_species_classifier(run_options(tmp_path, tmp_path / "cpu", STEPS))
    capsys.readouterr()
    with monkeypatch.context() as patched:
        full_above(300, patched)
        train_species_classifier(run_options(tmp_path, tmp_path / "small", STEPS))
    assert "lacks memory for 512 positions at once: trying 256" in capsys.readouterr().err
    state = json.loads(next((tmp_path / "small" / "training").glob("step-*/state.json")).read_text())
    assert state["positions"] == 256
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "cpu"), rel=TRAINING_FLOAT32_LOSS)
    # A run that goes on does not try again.
    with monkeypatch.context() as patched:
        full_above(300, patched)
        patched.setattr("mambapipelines.training.module.fitted", None)
        train_species_classifier(run_options(tmp_path, tmp_path / "small", STEPS + 1))
    assert len(losses(tmp_path / "small")) == STEPS + 1


def test_a_device_that_is_too_small_or_full_later_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_genomes(tmp_path)
    sentence = "the memory of cpu, float32 is too small for this run"
    with monkeypatch.context() as patched:
        full_above(0, patched)
        with pytest.raises(InputError, match=sentence):
            train_species_classifier(run_options(tmp_path, tmp_path / "none", STEPS))
    assert not (tmp_path / "none" / "config.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr("mambapipelines.training.recorder.SECONDS_BETWEEN_SAVES", 0.0)
        full_above(0, patched, from_step=2)
        with pytest.raises(InputError, match=sentence):
            train_species_classifier(run_options(tmp_path, tmp_path / "later", STEPS))
    # What was saved before is whole, and goes on where there is room.
    train_species_classifier(run_options(tmp_path, tmp_path / "later", STEPS))
    assert len(losses(tmp_path / "later")) == STEPS
