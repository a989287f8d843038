"""What the training loop offers beyond its defaults: averaged weights, plateau, length warm-up, kept states."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from genomamba.data.genomes import GenomeSpecification
from mambapipelines.language.recipe import PretrainingRecipe
from mambapipelines.language.train import LanguagePlan
from mambapipelines.species.plan import SpeciesPlan
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier
from mambapipelines.training import recorder
from mambapipelines.training.averaging import AveragedWeights
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.plan import RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.schedules import LengthWarmup, ValidationHistory
from mambapipelines.training.state import RunFolder, Schedule
from mambapipelines.waveforms.recipe import WaveformTrainingRecipe
from mambapipelines.waveforms.train import WaveformPlan

STEPS = 16
CHANGES = (
    "optimizer.schedule=plateau",
    "optimizer.plateau_patience=1",
    "optimizer.average_decay=0.8",
    "length.warmup_first_length=32",
    "length.warmup_steps_per_stage=4",
    "checkpoints.keep_last=2",
    "checkpoints.keep_best=1",
)


@pytest.fixture
def options(tmp_path: Path) -> SpeciesTrainingOptions:
    random = np.random.default_rng(5)
    specifications = []
    for number, probabilities in enumerate([[0.3, 0.2, 0.2, 0.3], [0.2, 0.3, 0.3, 0.2]]):
        letters = ["".join(random.choice(list("ACGT"), 3000, p=probabilities)) for _ in range(2)]
        path = tmp_path / f"{number}.fa"
        path.write_text("".join(f">chr{name}\n{text}\n" for name, text in zip("12", letters, strict=True)))
        specifications.append(GenomeSpecification(f"class{number}", (str(path),)))
    return SpeciesTrainingOptions(
        genomes=specifications, length=128, output=tmp_path / "run", holdout=["chr2"], steps=STEPS, recipe="tiny",
        changes=CHANGES, threads=1,
    )  # fmt: skip


def test_a_run_with_every_option_resumes_to_the_same_numbers(
    options: SpeciesTrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)
    whole = replace(options, output=tmp_path / "whole")
    train_species_classifier(whole)
    report = TrainingProgress.step

    def report_and_stop(self: TrainingProgress, current: int, *figures: float) -> None:
        report(self, current, *figures)
        if current == 7:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "step", report_and_stop)
        with pytest.raises(SystemExit) as stopped:
            train_species_classifier(options)
    assert stopped.value.code == 143
    train_species_classifier(replace(options, resume=True))
    names = sorted(path.relative_to(whole.output) for path in whole.output.rglob("*.safetensors"))
    state = Path("training") / f"step-{STEPS:06d}"
    assert {Path("model.safetensors"), state / "weights.safetensors", state / "optimizer.safetensors"} <= set(names)
    for name in ("model.safetensors", *(path for path in names if path.parent == state)):
        first, second = load_file(whole.output / name), load_file(options.output / name)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name
    rows, others = (read_metrics(run / "training" / "metrics.csv") for run in (whole.output, options.output))
    assert [(row["loss"], row["learning_rate"]) for row in rows] == [
        (row["loss"], row["learning_rate"]) for row in others
    ]


def test_the_last_states_and_the_best_are_kept_and_the_average_is_the_model(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)
    train_species_classifier(options)
    folder = options.output / "training"
    state = RunFolder(folder).load()
    kept = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    assert kept[-2:] == [STEPS - 1, STEPS] and len(kept) <= 3
    assert state.history.best_step in kept
    model = load_file(options.output / "model.safetensors")
    trained, averaged = state.weights, state.average
    assert averaged is not None
    layer = next(name for name in averaged if name.endswith("input_projection.weight"))
    assert torch.equal(model[layer], averaged[layer]) and not torch.equal(model[layer], trained[layer])


def test_the_average_forgets_the_start_and_follows_its_definition() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average = AveragedWeights(model, 0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 2.0, 4.0], start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert float(average.tensors["weight"]) == pytest.approx(expected)
    with average.in_place():
        assert float(model.weight) == pytest.approx(expected)
    assert float(model.weight) == 4.0
    average.keep()
    assert float(model.weight) == pytest.approx(expected)


def test_a_plateau_lowers_the_rate_after_patience_and_never_below_the_floor() -> None:
    schedule = Schedule(1.0, 2, 100, 0.1, kind="plateau", plateau_factor=0.5)
    assert [schedule.learning_rate(50, reductions) for reductions in (0, 1, 2, 9)] == [1.0, 0.5, 0.25, 0.1]
    assert schedule.learning_rate(0, 5) < 1.0  # the warm-up knows of no plateau
    history = ValidationHistory()
    for step, figure in enumerate([0.5, 0.6, 0.6, 0.55, float("nan"), 0.7]):
        history = history.after(figure, step, higher_is_better=True, patience=2)
    assert (history.best, history.best_step, history.reductions, history.waiting) == (0.7, 5, 1, 0)
    lower = ValidationHistory().after(2.0, 1, higher_is_better=False, patience=3)
    assert lower.after(1.5, 2, higher_is_better=False, patience=3).best == 1.5


def plans(stage: int) -> dict[str, RunPlan]:
    """Plans of all that have a length warm-up, with `stage` steps of each length."""
    changes = [f"length.warmup_steps_per_stage={stage}", "length.warmup_first_length=64"]
    audio = load_task_recipe(WaveformTrainingRecipe, "tiny", [*changes, "batch.samples_per_step=1024"])
    pretraining = load_task_recipe(PretrainingRecipe, "tiny", [*changes, "batch.bases_per_step=1024"])
    species = load_task_recipe(SpeciesRecipe, "tiny", [*changes, "batch.bases_per_step=1024"])
    return {
        "species": SpeciesPlan(species, 1024, 2, 0, 0),
        "pretraining": LanguagePlan(pretraining, 1024, 0),
        "audio": WaveformPlan(audio, 0, 0),
    }


@pytest.mark.parametrize("name", ["species", "pretraining", "audio"])
@pytest.mark.parametrize("minutes", [0.5, 5.0])
def test_a_run_in_minutes_that_begins_with_short_windows_takes_the_time_it_is_given(name: str, minutes: float) -> None:
    plan = plans(stage=40)[name]
    seconds_per_position, measured = 1e-4, 12

    def seconds_of(steps: int) -> float:
        return sum(plan.step_positions(step) for step in range(steps)) * seconds_per_position

    # At least two windows per step, whatever their length: the first stages read less than the last ones.
    assert plan.step_positions(0) <= plan.step_positions(10_000)
    left = 60 * minutes - seconds_of(measured)
    schedule = plan.schedule_for_time(measured, seconds_of(measured) / measured, left)
    assert seconds_of(schedule.total_steps) <= 60 * minutes < seconds_of(schedule.total_steps + 1)
    assert plan.steps_cost(schedule.total_steps) == pytest.approx(
        seconds_of(schedule.total_steps) / seconds_per_position / plan.step_positions(10_000)
    )


def test_windows_double_from_stage_to_stage() -> None:
    warmup = LengthWarmup(32, 4, 128)
    assert [warmup.length_at(step) for step in (0, 3, 4, 7, 8, 10_000_000)] == [32, 32, 64, 64, 128, 128]
    assert LengthWarmup(32, 0, 128).length_at(0) == 128
