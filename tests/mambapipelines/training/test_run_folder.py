"""A run folder: one process at a time, nothing of killed ones left, extended runs, minutes as the clock counts them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from genomamba.data.genomes import GenomeSpecification
from mambacore.errors import InputError
from mambacore.files import temporary_name
from mambapipelines.species.task import SpeciesTask
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier
from mambapipelines.training import recorder, run, session
from mambapipelines.training.lock import RunLock
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.plan import RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.schedules import Schedule
from mambapipelines.training.state import RunFolder

HOLDING = """
import pathlib, sys, time
from mambapipelines.training.lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def options(tmp_path: Path) -> SpeciesTrainingOptions:
    random = np.random.default_rng(3)
    genomes = []
    for number, probabilities in enumerate([[0.3, 0.2, 0.2, 0.3], [0.2, 0.3, 0.3, 0.2]]):
        path = tmp_path / f"{number}.fa"
        path.write_text(f">chrI\n{''.join(random.choice(list('ACGT'), 2000, p=probabilities))}\n")
        genomes.append(GenomeSpecification(f"class{number}", (str(path),)))
    return SpeciesTrainingOptions(
        genomes=genomes, length=64, output=tmp_path / "run", steps=6, recipe="tiny", threads=1
    )


def test_a_second_run_is_refused_at_once_and_names_the_first(options: SpeciesTrainingOptions) -> None:
    folder = options.output / "training"
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, str(folder)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        for resume in (False, True):
            with pytest.raises(InputError, match=f"run is in use by process {holder.pid} on .*, started 2"):
                train_species_classifier(replace(options, resume=resume))
        assert sorted(entry.name for entry in folder.iterdir()) == ["lock"]
    finally:
        holder.kill()
        holder.wait()
    # The lock of a killed process is nobody's.
    assert train_species_classifier(options).steps == 6
    assert not (folder / "lock").exists()


def test_a_mistake_leaves_no_folder_and_no_lock(options: SpeciesTrainingOptions) -> None:
    with pytest.raises(InputError, match="chrX"):
        train_species_classifier(replace(options, holdout=["chrX"], output=options.output / "deep" / "er"))
    assert not options.output.exists()


def test_temporary_files_of_killed_runs_are_removed(options: SpeciesTrainingOptions) -> None:
    folder = options.output / "training"
    folder.mkdir(parents=True)
    left = [temporary_name(folder / name, 4_000_000) for name in ("step-000003", "metrics.csv", "model")]
    left[1].write_text("half")
    for place in (left[0], left[2]):
        place.mkdir()
        (place / "weights.safetensors").write_text("half")
    train_species_classifier(options)
    assert not any(place.exists() for place in left)
    assert not [entry for entry in options.output.rglob("*") if entry.name.startswith(".")]


def test_sigterm_while_data_is_read_leaves_nothing(
    options: SpeciesTrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambapipelines.species import train  # noqa: PLC0415

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "load_genomes", lambda genomes: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        train_species_classifier(options)
    assert stopped.value.code == 143 and not options.output.exists()
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_lock_belongs_to_one_at_a_time(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    first.acquire()
    with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_extended(options: SpeciesTrainingOptions, capfd: pytest.CaptureFixture[str]) -> None:
    train_species_classifier(options)
    longer = replace(options, steps=10, resume=True)
    result = train_species_classifier(longer)
    assert result.steps == 10 and not result.already_finished
    assert "extending the run of 6 steps to 10" in capfd.readouterr().err
    rows = read_metrics(result.metrics_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    schedule = RunFolder(options.output / "training").load().schedule
    assert [float(row["learning_rate"]) for row in rows[6:]] == pytest.approx(
        [schedule.learning_rate(step) for step in range(6, 10)], rel=1e-4
    )
    assert json.loads((options.output / "config.json").read_text())["details"]["steps"] == 10
    assert train_species_classifier(longer).already_finished
    for fewer in ({"steps": 6}, {"steps": None, "minutes": 1.0}):
        with pytest.raises(InputError, match="--steps was 10"):
            train_species_classifier(replace(longer, **fewer))


def test_an_extension_that_was_killed_goes_on(
    options: SpeciesTrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_species_classifier(options)
    whole = replace(options, output=tmp_path / "whole")
    train_species_classifier(whole)
    train_species_classifier(replace(whole, steps=10, resume=True))
    from mambapipelines.training import session  # noqa: PLC0415

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "published_model", die)
        with pytest.raises(KeyboardInterrupt):
            train_species_classifier(replace(options, steps=10, resume=True))
    # All steps are taken, and the model in the folder is still that of 6 steps.
    result = train_species_classifier(replace(options, steps=10, resume=True))
    assert not result.already_finished
    tensors = [(folder / "model.safetensors").read_bytes() for folder in (options.output, whole.output)]
    assert tensors[0] == tensors[1]


def test_resume_without_a_run_says_so(options: SpeciesTrainingOptions, capfd: pytest.CaptureFixture[str]) -> None:
    train_species_classifier(replace(options, resume=True, steps=1))
    assert f"{options.output} holds no training run to resume: starting one" in capfd.readouterr().err


@pytest.mark.parametrize("total", [40, 400])
def test_a_schedule_that_changes_has_no_jump_and_ends_at_the_end(total: int) -> None:
    schedule = Schedule(peak_learning_rate=1.0, warmup_steps=10, total_steps=100, final_fraction=0.1)
    changed = schedule.replanned(30, total)
    assert changed.learning_rate(30) == schedule.learning_rate(30)
    rates = [changed.learning_rate(step) for step in range(30, total + 1)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.1)
    again = changed.replanned(35, 60)
    assert again.learning_rate(35) == changed.learning_rate(35) and again.learning_rate(60) == pytest.approx(0.1)
    warming = schedule.replanned(5, total)
    assert [warming.learning_rate(step) for step in range(11)] == [schedule.learning_rate(step) for step in range(11)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of a machine that takes 1 second for each of the first 16 steps and a quarter for every other."""
    now = [1000.0]
    batch = SpeciesTask.batch

    def batch_in_time(self: SpeciesTask, step: int) -> Any:
        now[0] += 1.0 if step < 16 else 0.25
        return batch(self, step)

    monkeypatch.setattr(SpeciesTask, "batch", batch_in_time)
    for module in (recorder, run, session):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_minutes_are_those_of_the_machine_as_it_is(
    options: SpeciesTrainingOptions, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    first_plans: list[Schedule] = []
    plan = RunPlan.schedule_for_time

    def remembered(self: RunPlan, *arguments: Any) -> Schedule:
        first_plans.append(plan(self, *arguments))
        return first_plans[-1]

    monkeypatch.setattr(RunPlan, "schedule_for_time", remembered)
    small = ["batch.bases_per_step=256", "batch.minimum_windows_per_step=2"]  # only the number of steps matters
    minute = replace(options, steps=None, minutes=1.0, changes=small)
    start = clock[0]
    result = train_species_classifier(minute)
    assert first_plans[0].total_steps < 60
    assert result.steps == pytest.approx(16 + (57 - 16) / 0.25, rel=0.05)
    assert clock[0] - start == pytest.approx(57, rel=0.05)
    state = RunFolder(options.output / "training").load()
    assert state.seconds == clock[0] - start and state.schedule.replanned_step > 0

    # The minute goes on where it was when the run was stopped.
    stopped = replace(minute, output=tmp_path / "stopped")
    report = TrainingProgress.step

    def report_and_stop(self: TrainingProgress, step: int, *figures: float) -> None:
        report(self, step, *figures)
        if step == 60:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "step", report_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_species_classifier(stopped)
    clock[0] += 10_000
    assert train_species_classifier(replace(stopped, resume=True)).steps == pytest.approx(result.steps, rel=0.05)
    rates = [float(row["learning_rate"]) for row in read_metrics(result.metrics_path)]
    warm = first_plans[0].warmup_steps
    assert rates[warm:] == sorted(rates[warm:], reverse=True) and rates[-1] < 0.15 * max(rates)
