"""Waveform models: a killed training ends in the same numbers, and a full disk is one sentence."""

import json
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

from mambapipelines.cli.audiomamba.main import main
from waveform_runs import run_in_process, training_command, write_tones

STEPS = 60
KILLS = 2
WAITING_SECONDS = 240.0


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    modules = ["mambapipelines.waveforms.train", "mambapipelines.waveforms.generate", "torch.utils.tensorboard"]
    context.set_forkserver_preload(modules)
    return context


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("data") / "clips", 20)


@pytest.fixture(scope="module")
def whole(processes: ForkServerContext, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    output = tmp_path_factory.mktemp("whole") / "model"
    process = start(processes, training_command(clips, output, STEPS), output.with_suffix(".err"))
    assert finish(process) == 0, output.with_suffix(".err").read_text()
    return output


def start(processes: ForkServerContext, *arguments: Any) -> Any:
    process = processes.Process(target=run_in_process, args=arguments)
    process.start()
    return process


def finish(process: Any) -> int:
    process.join(WAITING_SECONDS)
    assert process.exitcode is not None, "the process did not end"
    return int(process.exitcode)


def saved_step(output: Path) -> int:
    """The step of the state that counts, 0 where there is none."""
    try:
        return int(json.loads((output / "training" / "current.json").read_text())["folder"].removeprefix("step-"))
    except FileNotFoundError:
        return 0


def test_a_killed_training_goes_on_to_the_same_numbers(
    processes: ForkServerContext, clips: Path, whole: Path, tmp_path: Path
) -> None:
    output, errors, moments = tmp_path / "model", tmp_path / "err", random.Random(0)
    command = training_command(clips, output, STEPS, "--resume")
    for _ in range(KILLS):
        before, deadline = saved_step(output), time.monotonic() + WAITING_SECONDS
        process = start(processes, command, errors)
        while saved_step(output) <= before + 2 and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL, "the run was over before it could be killed"
        assert before < saved_step(output) <= STEPS
    assert not (output / "config.json").exists()
    assert finish(start(processes, command, errors)) == 0, errors.read_text()
    state = f"training/step-{STEPS:06d}"
    for name in ("model.safetensors", *(f"{state}/{part}.safetensors" for part in ("weights", "optimizer", "average"))):
        expected, found = load_file(whole / name), load_file(output / name)
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == [], name
    average, weights = (load_file(output / state / f"{part}.safetensors") for part in ("average", "weights"))
    assert any(not torch.equal(average[key], weights[key]) for key in average), "the average is no average"


def test_a_disk_that_is_full_in_the_middle_of_a_clip_is_one_sentence(
    processes: ForkServerContext, whole: Path, tmp_path: Path
) -> None:
    output, errors = tmp_path / "clips", tmp_path / "err"
    command = ["generate", str(whole), "--clips", "3", "--seconds", "0.1", "--batch", "1", "--output", str(output)]
    assert finish(start(processes, command, errors, 800)) == 2  # a clip has 1,644 bytes
    text = errors.read_text()
    complaints = [line for line in text.splitlines() if line.startswith("audiomamba: error: ")]
    assert (
        len(complaints) == 1 and "clip-00000.wav cannot be written (File too large); free some space" in complaints[0]
    )
    assert "Traceback" not in text and list(output.iterdir()) == []
    assert main(command) == 0
    assert sorted(path.name for path in output.glob("*.wav")) == [f"clip-{number:05d}.wav" for number in range(3)]
