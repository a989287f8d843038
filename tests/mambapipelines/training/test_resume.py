"""Resuming: a run that was stopped, whatever stopped it, ends in the numbers of a run that was not."""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genomamba.data.genomes import GenomeSpecification
from mambacore.errors import InputError
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier
from mambapipelines.training import recorder
from mambapipelines.training import state as run_state
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.plan import RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.state import (
    RunFolder,
)

STEPS = 16
# Kills itself while it writes the state of step 10: the weights are on disk, the optimiser is not.
KILLED_WHILE_SAVING = """
import os, signal, sys
from mambapipelines.training import state as run_state
from mambapipelines.training import recorder
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier
from genomamba.data.genomes import GenomeSpecification

recorder.SECONDS_BETWEEN_SAVES = 0.0
save_file = run_state.save_file

def save_and_die(tensors, path):
    if path.name == "optimizer.safetensors" and "step-000010" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(tensors, path)

run_state.save_file = save_and_die
output, *genomes = sys.argv[1:]
train_species_classifier(SpeciesTrainingOptions(
    genomes=[GenomeSpecification(f"class{number}", (path,)) for number, path in enumerate(genomes)],
    length=128, output=__import__("pathlib").Path(output), holdout=["chrII"], steps=16, recipe="tiny", threads=1,
))
"""


@pytest.fixture(scope="module")
def genomes(tmp_path_factory: pytest.TempPathFactory) -> list[GenomeSpecification]:
    folder = tmp_path_factory.mktemp("genomes")
    random = np.random.default_rng(5)
    specifications = []
    for number, probabilities in enumerate([[0.3, 0.2, 0.2, 0.3], [0.2, 0.3, 0.3, 0.2]]):
        path = folder / f"{number}.fa"
        records = [
            f">{name}\n{''.join(random.choice(list('ACGT'), 3000, p=probabilities))}\n" for name in ("chrI", "chrII")
        ]
        path.write_text("".join(records), encoding="ascii")
        specifications.append(GenomeSpecification(f"class{number}", (str(path),)))
    return specifications


@pytest.fixture
def options(genomes: list[GenomeSpecification], tmp_path: Path) -> SpeciesTrainingOptions:
    return SpeciesTrainingOptions(
        genomes=genomes,
        length=128,
        output=tmp_path / "run",
        holdout=["chrII"],
        steps=STEPS,
        recipe="tiny",
        threads=1,
    )


@pytest.fixture(scope="module")
def uninterrupted(genomes: list[GenomeSpecification], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    train_species_classifier(
        SpeciesTrainingOptions(
            genomes=genomes, length=128, output=output, holdout=["chrII"], steps=STEPS, recipe="tiny", threads=1
        )
    )
    return output


def assert_same_run(first: Path, second: Path) -> None:
    """Model, optimiser and metrics agree to the last bit."""
    state = f"training/step-{STEPS:06d}"
    for name in ("model.safetensors", f"{state}/weights.safetensors", f"{state}/optimizer.safetensors"):
        tensors, others = load_file(first / name), load_file(second / name)
        assert tensors.keys() == others.keys()
        assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []
    rows, other_rows = (read_metrics(folder / "training" / "metrics.csv") for folder in (first, second))
    columns = ("step", "loss", "accuracy", "learning_rate", "held_out_accuracy")
    assert [[row[column] for column in columns] for row in rows] == [
        [row[column] for column in columns] for row in other_rows
    ]
    assert (first / "README.md").read_text() == (second / "README.md").read_text()


def interrupt_at(step: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do `action` while step `step` is being reported."""
    report = TrainingProgress.step

    def report_and_act(self: TrainingProgress, current: int, *figures: float) -> None:
        report(self, current, *figures)
        if current == step:
            action()

    monkeypatch.setattr(TrainingProgress, "step", report_and_act)


def test_a_run_killed_while_it_saves_resumes_to_the_same_numbers(
    options: SpeciesTrainingOptions, uninterrupted: Path
) -> None:
    paths = [path for genome in options.genomes for path in genome.paths]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(options.output), *paths], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert RunFolder(options.output / "training").load().step == 9
    assert not (options.output / "config.json").exists()
    train_species_classifier(replace(options, resume=True))
    assert_same_run(options.output, uninterrupted)
    assert [entry.name for entry in (options.output / "training").glob("*step-*")] == ["step-000016"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "term", "hup"])
def test_a_run_stopped_by_a_signal_saves_and_resumes_to_the_same_numbers(
    options: SpeciesTrainingOptions,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    handlers = [signal.getsignal(each) for each in recorder.STOPPING_SIGNALS]
    with monkeypatch.context() as patch:
        interrupt_at(7, lambda: signal.raise_signal(number), patch)
        with pytest.raises(expected):
            train_species_classifier(options)
    assert [signal.getsignal(each) for each in recorder.STOPPING_SIGNALS] == handlers
    assert "--resume" in capfd.readouterr().err
    assert RunFolder(options.output / "training").load().step == 7
    train_species_classifier(replace(options, resume=True))
    assert "resuming after step 7 of 16" in capfd.readouterr().err
    assert_same_run(options.output, uninterrupted)


def test_a_signal_sent_twice_by_the_scheduler_and_by_torchrun_stops_after_the_step(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate_twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        interrupt_at(7, terminate_twice, patch)
        with pytest.raises(SystemExit) as stopped:
            train_species_classifier(options)
    assert stopped.value.code == 143
    assert RunFolder(options.output / "training").load().step == 7


def test_a_second_ctrl_c_ends_the_process_at_once(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)

    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        interrupt_at(7, interrupt_twice, patch)
        with pytest.raises(SystemExit) as stopped:
            train_species_classifier(options)
    assert stopped.value.code == 130
    assert RunFolder(options.output / "training").load().step == 6


def test_a_run_killed_between_training_and_writing_the_model_only_writes_the_model(
    options: SpeciesTrainingOptions, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_species_classifier(options)
    (options.output / "config.json").unlink()
    interrupt_at(STEPS, lambda: pytest.fail("there was nothing left to train"), monkeypatch)
    result = train_species_classifier(replace(options, resume=True))
    assert not result.already_finished
    assert_same_run(options.output, uninterrupted)


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    options: SpeciesTrainingOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    first = train_species_classifier(options)
    before = (options.output / "config.json").read_bytes()
    again = train_species_classifier(replace(options, resume=True))
    assert again.already_finished and again.steps == STEPS
    assert (again.held_out_accuracy, again.calibration) == (first.held_out_accuracy, first.calibration)
    assert "finished" in capfd.readouterr().err
    assert (options.output / "config.json").read_bytes() == before
    with pytest.raises(InputError, match="holds a training run already: add --resume"):
        train_species_classifier(options)


def test_resuming_where_nothing_is_starts_a_run(
    options: SpeciesTrainingOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    result = train_species_classifier(replace(options, resume=True, steps=2))
    assert result.steps == 2 and not result.already_finished
    assert "holds no training run to resume: starting one" in capfd.readouterr().err


def test_stopping_before_the_length_of_the_run_is_known_leaves_nothing_to_resume(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = replace(options, steps=None, minutes=0.05)
    with monkeypatch.context() as patch:
        interrupt_at(1, lambda: signal.raise_signal(signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            train_species_classifier(measured)
    assert not RunFolder(options.output / "training").holds_a_run()
    monkeypatch.setattr(recorder, "TIMED_STEPS", 2)
    assert train_species_classifier(measured).steps > 2


def test_a_run_in_minutes_keeps_the_number_of_steps_it_once_measured(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = replace(options, steps=None, minutes=5.0)
    monkeypatch.setattr(recorder, "TIMED_STEPS", 2)
    plan = RunPlan.schedule_for_time

    def plan_a_fast_machine(self: RunPlan, measured_steps: int, seconds_per_step: float, seconds_left: float) -> Any:
        assert seconds_per_step > 0 and seconds_left < 300
        return plan(self, measured_steps, 1.0, 20.0)

    with monkeypatch.context() as patch:
        patch.setattr(RunPlan, "schedule_for_time", plan_a_fast_machine)
        interrupt_at(8, lambda: signal.raise_signal(signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            train_species_classifier(measured)
    schedule = RunFolder(options.output / "training").load().schedule
    with monkeypatch.context() as patch:
        patch.setattr(RunPlan, "schedule_for_time", lambda *arguments: pytest.fail("measured once more"))
        result = train_species_classifier(replace(measured, resume=True))
    assert result.steps == schedule.total_steps > 8
    rates = [float(row["learning_rate"]) for row in read_metrics(result.metrics_path)]
    assert rates == pytest.approx([schedule.learning_rate(step) for step in range(result.steps)], rel=1e-4)


def test_resuming_with_other_options_or_sequences_names_the_difference(
    options: SpeciesTrainingOptions, tmp_path: Path
) -> None:
    short = replace(options, steps=2)
    train_species_classifier(short)
    (options.output / "config.json").unlink()
    changed = tmp_path / "changed.fa"
    letters = Path(options.genomes[1].paths[0]).read_text(encoding="ascii")
    changed.write_text(letters[:-10] + "ACGTACGTA\n", encoding="ascii")
    recipe = tmp_path / "other.yaml"
    recipe.write_text("minutes: 0.1\n", encoding="utf-8")
    other: list[tuple[dict[str, Any], str]] = [
        ({"length": 64}, "--length was 128 and is now 64"),
        ({"seed": 9}, "--seed was 0 and is now 9"),
        ({"steps": 1}, "--steps was 2 and is now 1"),
        ({"steps": None, "minutes": 1.0}, "--steps was 2 and is now not given"),
        ({"holdout": []}, "--holdout was chrII and is now empty"),
        ({"recipe": str(recipe)}, "recipe.model.model_width was 16 and is now not given"),
        ({"genomes": options.genomes[::-1]}, "classes was class0,class1 and is now class1,class0"),
        (
            {"genomes": [options.genomes[0], GenomeSpecification("class1", (str(changed),))]},
            r"sequence 'chrII' has other letters, one of class 'class1', which .* \(missing: .*; new: .*\)",
        ),
    ]
    for changes, expected in other:
        with pytest.raises(InputError, match=expected):
            train_species_classifier(replace(short, resume=True, **changes))


def test_a_full_disk_is_reported_and_the_run_goes_on_from_the_state_before(
    options: SpeciesTrainingOptions, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)
    save_file = run_state.save_file

    def save_until_full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step-000005" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_file", save_until_full)
        with pytest.raises(InputError, match=r"cannot be written .*No space left"):
            train_species_classifier(options)
    train_species_classifier(replace(options, resume=True))
    assert_same_run(options.output, uninterrupted)
