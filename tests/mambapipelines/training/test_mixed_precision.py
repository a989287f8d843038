"""Training in bfloat16 (autocast) keeps the scan's states and parameters in float32 and learns as in float32."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genomamba.data.genomes import GenomeSpecification
from mambacore.layers import SelectiveMixer
from mambapipelines.cli.genomamba.main import main
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier
from mambapipelines.training.module import TrainingModule
from tiny_dna import yeast_like
from training_runs import CHANGES, run_options, write_genomes

STEPS = 40
# Losses, in nats, of the two runs at the same step differ by at most this. Linear layers round by up to 2^-8, which
# mostly averages out over a batch; the residual sum and the scan's states stay in float32. (Measured: the losses, from
# 2.26 down to 1.17, differ by 0.00003 at most.)
LOSS_BAND = 0.001


def losses_in(precision: str, genomes: list[GenomeSpecification], folder: Path) -> np.ndarray:
    """The loss of every logged step of a run of the tiny recipe."""
    options = SpeciesTrainingOptions(
        genomes=genomes,
        length=256,
        output=folder,
        holdout=["chrII"],
        steps=STEPS,
        recipe="tiny",
        changes=[f"precision={precision}"],
        threads=1,
    )
    train_species_classifier(options)
    with next(folder.rglob("metrics.csv")).open(encoding="utf-8", newline="") as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]])


def test_the_loss_curve_in_bfloat16_is_that_in_float32(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    genomes = []
    for name, probabilities in (("at", [0.4, 0.1, 0.1, 0.4]), ("gc", [0.1, 0.4, 0.4, 0.1])):
        records = [f">{c}\n{''.join(random.choice(list('ACGT'), 5000, p=probabilities))}\n" for c in ("chrI", "chrII")]
        path = tmp_path / f"{name}.fa"
        path.write_text("".join(records), encoding="ascii")
        genomes.append(GenomeSpecification(name, (str(path),)))
    expected = losses_in("float32", genomes, tmp_path / "float32")
    found = losses_in("bfloat16", genomes, tmp_path / "bfloat16")
    assert expected.shape == found.shape and expected.size > 1
    assert expected[-1] < expected[0] / 1.2  # there was something to learn
    assert 0 < np.abs(found - expected).max() < LOSS_BAND


class Casts(TorchDispatchMode):
    """Counts how often each of some tensors is cast to bfloat16."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.places = {tensor.data_ptr() for tensor in tensors}
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if operator is torch.ops.aten._to_copy.default and options.get("dtype") == torch.bfloat16:
            place = arguments[0].data_ptr()
            self.counts[place] += place in self.places
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("command", ["train", "pretrain in pieces"])
def test_weights_are_cast_once_per_optimiser_step(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward: Callable[..., Any] = TrainingModule._backward
    counts: dict[int, Counter[int]] = {}
    micro_batches: Counter[int] = Counter()

    def counted(self: TrainingModule, replica: torch.nn.Module, *more: Any) -> Any:
        with Casts(replica.parameters()) as casts:
            report = backward(self, replica, *more)
        counts.setdefault(self.steps_done, Counter()).update(casts.counts)
        micro_batches[self.steps_done] += 1
        return report

    monkeypatch.setattr(TrainingModule, "_backward", counted)
    if command == "train":
        write_genomes(tmp_path)
        train_species_classifier(run_options(tmp_path, tmp_path / "out", 2, (*CHANGES, "precision=bfloat16")))
    else:
        changes = ["pretraining.piece_length=64", "batch.bases_per_step=512", "batch.bases_per_micro_batch=256"]
        settings = [part for change in changes for part in ("--set", change)]
        genome = ["--reference", yeast_like(tmp_path), "--valid-chromosomes", "chr4", "--length", "256"]
        options = ["--steps", "2", "--threads", "1", "--precision", "bfloat16", "--output", str(tmp_path / "out")]
        assert main(["pretrain", *genome, "--recipe", "tiny", *settings, *options]) == 0
    assert set(counts) == {0, 1} and min(micro_batches.values()) > 1
    for of_step in counts.values():
        cast = [count for count in of_step.values() if count]
        assert len(cast) > 3 and max(cast) == 1, of_step


@pytest.mark.parametrize("complex_state", [False, True], ids=["real", "complex"])
def test_autocast_leaves_states_and_parameters_of_the_scan_in_float32(complex_state: bool) -> None:
    torch.manual_seed(0)
    mixer = SelectiveMixer(8, state_size=4, complex_state=complex_state)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = mixer(torch.randn(2, 20, 8))
    assert outputs.dtype == torch.bfloat16
    assert state.scan.dtype == (torch.complex64 if complex_state else torch.float32)
    outputs.float().square().sum().backward()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in mixer.parameters())
