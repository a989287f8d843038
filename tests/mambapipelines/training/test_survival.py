"""Survival: whatever ends a training process, and whenever, the run is whole and ends in the same numbers."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mambacore.errors import InputError
from mambapipelines.species.task import SpeciesTask
from mambapipelines.species.train import train_species_classifier
from mambapipelines.training import recorder
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.state import RunFolder
from training_runs import run_options, train_in_process, write_genomes

STEPS = 40
WAITING_SECONDS = 240.0


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mambapipelines.species.train", "torch.utils.tensorboard"])
    return context


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_genomes(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `STEPS` steps that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    write_genomes(folder)
    options = run_options(folder, folder / "run", STEPS)
    assert finish(start(processes, options)) == 0, options.output.with_suffix(".err").read_text()
    return options.output


def start(processes: ForkServerContext, *arguments: Any) -> Any:
    process = processes.Process(target=train_in_process, args=arguments)
    process.start()
    return process


def wait_for_state(output: Path, process: Any) -> None:
    """Until there is a state, or the process has ended."""
    deadline = time.monotonic() + WAITING_SECONDS
    while not (output / "training" / "current.json").exists() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_steps(output: Path, process: Any, inode: int) -> None:
    """Until the process takes steps: its time to start is no part of the run that a kill could do harm to.

    `inode` is that of the metrics before the process began; it starts with a new file, and then adds rows.
    """
    path = output / "training" / "metrics.csv"
    deadline, size = time.monotonic() + WAITING_SECONDS, None
    while process.is_alive():
        assert time.monotonic() < deadline
        if inode_of(path) not in (0, inode):
            now = path.stat().st_size
            if size is not None and now > size > 0:
                return
            size = now
        time.sleep(0.001)


def inode_of(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def finish(process: Any) -> int:
    process.join(WAITING_SECONDS)
    assert process.exitcode is not None, "the process did not end"
    return int(process.exitcode)


def assert_same_end(first: Path, second: Path, steps: int) -> None:
    """Model, weights, optimiser, averaged weights and metrics agree to the last bit."""
    state = f"training/step-{steps:06d}"
    for name in ("model.safetensors", *(f"{state}/{part}.safetensors" for part in ("weights", "optimizer", "average"))):
        tensors, others = load_file(first / name), load_file(second / name)
        assert tensors.keys() == others.keys()
        assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == [], name
    columns = ("step", "loss", "accuracy", "learning_rate", "held_out_accuracy")
    rows, other_rows = (read_metrics(folder / "training" / "metrics.csv") for folder in (first, second))
    assert [[row[name] for name in columns] for row in rows] == [[row[name] for name in columns] for row in other_rows]
    assert (RunFolder(first / "training").load().history) == RunFolder(second / "training").load().history


def kill_and_resume(processes: ForkServerContext, data: Path, whole: Path, kills: int, steps: int) -> None:
    """Kill a run `kills` times at moments that nothing in it chooses; compare it with one that was left alone."""
    killed = run_options(data, data / "killed", steps)
    moments = random.Random(2)
    done, step = 0, 0
    for _ in range(20 * kills):
        inode = inode_of(killed.output / "training" / "metrics.csv")
        process = start(processes, killed)
        wait_for_steps(killed.output, process, inode)
        time.sleep(moments.uniform(0.0, 0.2))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL
        done += 1
        folder = RunFolder(killed.output / "training")
        if folder.holds_a_run():
            state = folder.load()
            assert state.step >= step, "a state that had been saved was lost"
            step = state.step
            best = state.history.best_step
            assert best is None or (folder.path / f"step-{best:06d}" / "weights.safetensors").is_file()
        if done == kills:
            break
    assert done == kills, f"the run was over after {done} kills"
    assert step > 0, "no kill came after the first state"
    assert finish(start(processes, killed)) == 0, killed.output.with_suffix(".err").read_text()
    assert_same_end(whole, killed.output, steps)


def test_a_run_killed_at_random_moments_ends_in_the_same_numbers(
    processes: ForkServerContext, data: Path, whole: Path
) -> None:
    kill_and_resume(processes, data, whole, kills=2, steps=STEPS)


@pytest.mark.slow
def test_a_run_killed_twenty_times_at_random_moments_ends_in_the_same_numbers(
    processes: ForkServerContext, data: Path
) -> None:
    whole = run_options(data, data / "whole", 20 * STEPS)
    assert finish(start(processes, whole)) == 0
    kill_and_resume(processes, data, whole.output, kills=20, steps=20 * STEPS)


def test_a_preempted_process_saves_and_exits_with_143(processes: ForkServerContext, data: Path) -> None:
    options = run_options(data, data / "run", 10 * STEPS)
    process = start(processes, options)
    wait_for_state(options.output, process)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    state = RunFolder(options.output / "training").load()
    assert 0 < state.step < 10 * STEPS
    assert int(read_metrics(options.output / "training" / "metrics.csv")[-1]["step"]) == state.step
    assert f"stopped after step {state.step}" in options.output.with_suffix(".err").read_text()


def test_a_full_disk_is_one_sentence_and_the_state_before_it_is_whole(
    processes: ForkServerContext, data: Path, whole: Path
) -> None:
    full = run_options(data, data / "full", STEPS)
    # Room for everything but the optimiser's state: writing it fails in the middle of the file.
    optimizer = max(path.stat().st_size for path in (whole / "training").rglob("optimizer.safetensors"))
    process = start(processes, full)
    wait_for_state(full.output, process)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    before = RunFolder(full.output / "training").load().step
    assert finish(start(processes, full, optimizer - 1)) == 2
    text = full.output.with_suffix(".err").read_text()
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "free some space and add --resume" in errors[0], text
    assert "Traceback" not in text
    assert RunFolder(full.output / "training").load().step >= before
    assert finish(start(processes, full)) == 0
    assert_same_end(whole, full.output, STEPS)


def test_a_vanished_data_file_is_one_sentence_and_the_state_is_whole(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)
    whole, options = run_options(data, data / "whole", 8), run_options(data, data / "run", 8)
    train_species_classifier(whole)
    batch = SpeciesTask.batch

    def batch_until_it_vanishes(self: SpeciesTask, step: int) -> Any:
        if step == 5:
            (data / "0.fa").rename(data / "elsewhere.fa")
            (data / "0.fa").read_bytes()
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(SpeciesTask, "batch", batch_until_it_vanishes)
        with pytest.raises(InputError, match=r"the data of step 6 cannot be read .*add --resume"):
            train_species_classifier(options)
    # The data of a step may be read while the step before it is still at work.
    assert RunFolder(options.output / "training").load().step in (4, 5)
    with pytest.raises(InputError, match=r"0\.fa"):
        train_species_classifier(options)
    (data / "elsewhere.fa").rename(data / "0.fa")
    train_species_classifier(options)
    assert_same_end(whole.output, options.output, 8)


def test_a_loss_that_is_not_a_number_stops_before_it_reaches_the_weights(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_SAVES", 0.0)
    options = run_options(data, data / "run", 8)
    loss, calls = SpeciesTask.loss, []

    def loss_until_it_breaks(self: SpeciesTask, *arguments: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        figures = loss(self, *arguments)
        return figures | {"loss": figures["loss"] * float("nan")} if len(calls) > 10 else figures

    with monkeypatch.context() as patch:
        patch.setattr(SpeciesTask, "loss", loss_until_it_breaks)
        with pytest.raises(InputError, match=r"stopped being a finite number at step 6: the last good state is kept"):
            train_species_classifier(options)
    state = RunFolder(options.output / "training").load()
    assert state.step == 5
    assert all(torch.isfinite(tensor).all() for tensor in (*state.weights.values(), *state.average.values()))
