"""Several processes train as one does: the same losses and parameters to rounding, states for any number of them."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from audiomamba.data.writing import write_waveform
from genomamba.data.assemblies import GREAT_APES
from genomamba.models.sequence_model import load_sequence_model
from mambacore.errors import InputError
from mambapipelines.finetuning.train import FinetuningOptions, finetune
from mambapipelines.protocols.train import SpeciesProtocolOptions, run_species_task
from mambapipelines.species.train import SpeciesTrainingOptions
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.ranks import Ranks, check_strategy
from mambapipelines.training.state import RunFolder
from mambapipelines.waveforms.train import WaveformTrainingOptions, train_waveform_model
from mambapipelines.waveforms.train_classifier import ClassifierTrainingOptions, train_clip_classifier
from tiny_assemblies import write_assemblies
from tolerances import TRAINING_FLOAT32, TRAINING_FLOAT32_LOSS, relative_error
from training_runs import (
    CHANGES,
    exit_codes,
    run_options,
    save_every_step_and_report_to,
    start_ranks,
    train_in_process,
    write_genomes,
)

STEPS = 6
SECONDS = 200


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "mambapipelines.species.train",
            "mambapipelines.finetuning.train",
            "mambapipelines.waveforms.train",
            "mambapipelines.waveforms.train_classifier",
            "mambapipelines.protocols.train",
            "torch.utils.tensorboard",
        ]
    )
    return context


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genomes")
    write_genomes(folder)
    return folder


@pytest.fixture(scope="module")
def alone(data: Path, processes: ForkServerContext) -> Path:
    """A run of one process."""
    options = run_options(data, data / "alone", STEPS)
    process = processes.Process(target=train_in_process, args=(options,))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0, options.output.with_suffix(".err").read_text()
    return options.output


def train(processes: ForkServerContext, options: SpeciesTrainingOptions, count: int) -> None:
    """Train in `count` processes."""
    codes = exit_codes(start_ranks(processes, train_in_process, options, count))
    assert codes == [0] * count, options.output.with_suffix(".err").read_text()


def assert_close(found: Path, expected: Path) -> None:
    """Losses, weights and averages of two runs agree to rounding."""
    rows, others = (read_metrics(folder / "training" / "metrics.csv") for folder in (found, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in others] == [str(n) for n in range(1, STEPS + 1)]
    assert [float(row["loss"]) for row in rows] == pytest.approx(
        [float(row["loss"]) for row in others], rel=TRAINING_FLOAT32_LOSS
    )
    state, other = (RunFolder(folder / "training").load() for folder in (found, expected))
    for tensors, expected_tensors in ((state.weights, other.weights), (state.average, other.average)):
        assert tensors.keys() == expected_tensors.keys()
        errors = {name: relative_error(tensor, expected_tensors[name]) for name, tensor in tensors.items()}
        assert max(errors.values()) < TRAINING_FLOAT32, max(errors, key=lambda name: errors[name])
    assert load_file(found / "model.safetensors").keys() == load_file(expected / "model.safetensors").keys()


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "count"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)])
def test_processes_train_as_one_does(
    processes: ForkServerContext, data: Path, alone: Path, strategy: str, count: int
) -> None:
    options = run_options(data, data / f"{strategy}-{count}", STEPS)
    train(processes, replace(options, strategy=strategy), count)
    assert_close(options.output, alone)
    parts = list((options.output / "training" / f"step-{STEPS:06d}").glob("weights*.safetensors"))
    assert len(parts) == (count if strategy == "fsdp" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_state_of_four_processes_is_resumed_by_fewer(
    processes: ForkServerContext, data: Path, alone: Path, count: int
) -> None:
    four = run_options(data, data / "four", STEPS, (*CHANGES, "checkpoints.keep_last=9"))
    if not four.output.exists():
        train(processes, replace(four, strategy="fsdp"), 4)
    fewer = replace(four, output=data / f"four-then-{count}")
    shutil.copytree(four.output, fewer.output)
    (fewer.output / "config.json").unlink()
    (fewer.output / "training" / "current.json").write_text('{"folder": "step-000003"}')
    if count == 1:
        process = processes.Process(target=train_in_process, args=(fewer,))
        process.start()
        process.join(SECONDS)
        assert process.exitcode == 0, fewer.output.with_suffix(".err").read_text()
    else:
        train(processes, replace(fewer, strategy="fsdp"), count)
    assert_close(fewer.output, alone)


def test_rows_that_cannot_be_shared_and_processes_without_a_strategy_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = (torch.arange(12).view(6, 2), torch.arange(6))
    rows, labels = Ranks(rank=1, count=3).rows(batch)
    assert rows.tolist() == [[4, 5], [6, 7]] and labels.tolist() == [2, 3]
    assert Ranks(rank=1, count=2, context_count=2).stretch(batch[:1])[0].tolist() == [[2 * n + 1] for n in range(6)]
    with pytest.raises(InputError, match="6 rows, which 4 data ranks cannot share"):
        Ranks(rank=0, count=4).rows(batch)
    for name, value in (("TORCHELASTIC_RUN_ID", "test"), ("WORLD_SIZE", "4"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="4 processes were started: give --strategy"):
        check_strategy("single", 1)
    with pytest.raises(InputError, match="--context-ranks is 3, which does not divide 4"):
        check_strategy("ddp", 3)
    with pytest.raises(InputError, match="use one of single, ddp, fsdp"):
        check_strategy("zero", 1)


def wait_for_state(output: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not (output / "training" / "current.json").exists():
        assert time.monotonic() < deadline, output.with_suffix(".err").read_text()
        time.sleep(0.005)


def files_of(output: Path, steps: int) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors that a run leaves behind, by file."""
    paths = [output / "model.safetensors", *(output / "training" / f"step-{steps:06d}").glob("*.safetensors")]
    return {path.name: load_file(path) for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [(0, 1), (1,)], ids=["both", "one"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_that_are_preempted_save_together_and_exit_with_143(
    processes: ForkServerContext, data: Path, strategy: str, signalled: tuple[int, ...]
) -> None:
    steps = 60
    name = f"preempted-{strategy}-{len(signalled)}"
    whole = replace(run_options(data, data / f"{name}-whole", steps), strategy=strategy)
    train(processes, whole, 2)
    options = replace(whole, output=data / name)
    started = start_ranks(processes, train_in_process, options, 2)
    wait_for_state(options.output)
    for rank in signalled:
        os.kill(started[rank].pid, signal.SIGTERM)
    assert exit_codes(started) == [143, 143], options.output.with_suffix(".err").read_text()
    state = RunFolder(options.output / "training").load()
    assert 0 < state.step < steps
    assert int(read_metrics(options.output / "training" / "metrics.csv")[-1]["step"]) == state.step
    train(processes, options, 2)
    found, expected = files_of(options.output, steps), files_of(whole.output, steps)
    assert found.keys() == expected.keys()
    for file, tensors in found.items():
        assert [key for key in tensors if not torch.equal(tensors[key], expected[file][key])] == [], file


def torchrun(*arguments: object) -> list[str]:
    """A command line of two processes of `genomamba` on this machine."""
    program = Path(sys.executable).with_name("genomamba")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    return [*launcher, str(program), *map(str, arguments)]


@pytest.mark.slow
def test_torchrun_that_is_preempted_leaves_a_state_that_torchrun_goes_on_from(data: Path, tmp_path: Path) -> None:
    genomes = [part for number in range(2) for part in ("--genome", f"class{number}={data / f'{number}.fa'}")]
    command = torchrun(
        "train", *genomes, "--length", 128, "--holdout", "chr2", "--recipe", "tiny", "--steps", 400, "--threads", 1,
        "--strategy", "ddp", "--output", tmp_path / "model", "--resume",
    )  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "model.err").open("w") as errors:
        launcher = subprocess.Popen(command, env=environment, stderr=errors)
        wait_for_state(tmp_path / "model")
        launcher.send_signal(signal.SIGTERM)
        # Its own code is 1, whatever its processes say.
        assert launcher.wait(SECONDS) == 1
    state = RunFolder(tmp_path / "model" / "training").load()
    assert 0 < state.step < 400
    assert f"stopped after step {state.step}" in (tmp_path / "model.err").read_text()
    subprocess.run(command, env=environment, check=True, timeout=SECONDS)
    steps = [int(row["step"]) for row in read_metrics(tmp_path / "model" / "training" / "metrics.csv")]
    assert steps == list(range(1, 401))
    assert (tmp_path / "model" / "config.json").is_file()


def finetune_in_process(options: FinetuningOptions) -> None:
    save_every_step_and_report_to(options.output.with_suffix(".err"))
    finetune(options)


def train_waveforms_in_process(options: WaveformTrainingOptions) -> None:
    save_every_step_and_report_to(options.output.with_suffix(".err"))
    train_waveform_model(options)


def write_table(folder: Path) -> str:
    """Sequences of three classes of different composition, in all splits."""
    random = np.random.default_rng(4)
    lines = ["sequence\tclass\tsplit"]
    for row in range(60):
        label = row % 3
        share = [0.2, 0.5, 0.8][label] / 2
        letters = random.choice(list("ACGT"), 20 + row, p=[0.5 - share, share, share, 0.5 - share])
        lines.append(f"{''.join(letters)}\tclass{label}\t{('train', 'train', 'valid', 'test')[row % 4]}")
    (folder / "table.tsv").write_text("\n".join(lines) + "\n")
    return str(folder / "table.tsv")


def same_work(
    processes: ForkServerContext, work: Callable[[Any], None], options: Any, strategy: str
) -> tuple[Path, Path]:
    """Do the same work in two processes and in one; return their output folders."""
    alone = processes.Process(target=work, args=(options,))
    alone.start()
    assert exit_codes([alone]) == [0], options.output.with_suffix(".err").read_text()
    shared = replace(options, output=options.output.with_name(strategy), strategy=strategy)
    codes = exit_codes(start_ranks(processes, work, shared, 2))
    assert codes == [0, 0], shared.output.with_suffix(".err").read_text()
    return shared.output, options.output


def assert_same_model(processes: ForkServerContext, work: Callable[[Any], None], options: Any, strategy: str) -> Path:
    """Two processes publish the model that one does; returns their output folder."""
    outputs = same_work(processes, work, options, strategy)
    found, expected = (load_file(output / "model.safetensors") for output in outputs)
    errors = {name: relative_error(found[name], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) < TRAINING_FLOAT32, max(errors, key=lambda name: errors[name])
    return outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_fine_tune_and_choose_the_best_state_as_one_does(
    processes: ForkServerContext, tmp_path: Path, strategy: str
) -> None:
    options = FinetuningOptions(
        table=write_table(tmp_path), output=tmp_path / "alone", steps=STEPS, recipe="tiny", threads=1,
        # An even number of rows, which two processes can share.
        changes=[
            "optimizer.average_decay=0.8", "validation.every_fraction=0.3",
            "batch.bases_per_step=32", "batch.minimum_windows_per_step=20",
        ],
    )  # fmt: skip
    output = assert_same_model(processes, finetune_in_process, options, strategy)
    best = load_sequence_model(output)[1]["best_step"]
    assert best == load_sequence_model(options.output)[1]["best_step"]
    parts = list((output / "training" / f"step-{best:06d}").glob("weights*.safetensors"))
    assert len(parts) == (2 if strategy == "fsdp" else 1)
    assert (output / "metrics.tsv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_a_waveform_model_as_one_does(
    processes: ForkServerContext, tmp_path: Path, strategy: str
) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(12):
        tone = 0.4 * torch.sin(torch.arange(600 + 40 * number) * (0.2 + 0.03 * number))
        write_waveform(tmp_path / "clips" / f"{number:02d}.wav", tone, 8000)
    options = WaveformTrainingOptions(
        data=tmp_path / "clips", output=tmp_path / "alone", recipe="tiny", valid="0*.wav", steps=STEPS, threads=1,
        changes=["batch.clip_length=512", "drawn.clips=1"],
    )  # fmt: skip
    assert_same_model(processes, train_waveforms_in_process, options, strategy)


def train_classifier_in_process(options: ClassifierTrainingOptions) -> None:
    save_every_step_and_report_to(options.output.with_suffix(".err"))
    train_clip_classifier(options)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_a_clip_classifier_as_one_does(
    processes: ForkServerContext, tmp_path: Path, strategy: str
) -> None:
    """Its batch normalisation takes its means over the clips of both; test_shared_norm.py has its gradients in float64.

    Weights are not compared: Adam turns the rounding of gradients near 0 into steps of full size.
    """
    (tmp_path / "clips").mkdir()
    for number in range(24):
        tone = 0.4 * torch.sin(torch.arange(800 + 10 * number) * (0.1 + 0.5 * (number % 2) + 0.004 * number))
        write_waveform(tmp_path / "clips" / f"{number % 2}_{number:02d}.wav", tone, 8000)
    options = ClassifierTrainingOptions(
        data=tmp_path / "clips", output=tmp_path / "alone", recipe="tiny", sample_rate_hz=8000, clip_seconds=0.1,
        label_pattern="^([01])_", valid="*_2[0-3].wav", test="*_1[89].wav", steps=STEPS, threads=1,
    )  # fmt: skip
    losses = [
        [float(row["loss"]) for row in read_metrics(output / "training" / "metrics.csv")]
        for output in same_work(processes, train_classifier_in_process, options, strategy)
    ]
    assert len(losses[0]) == len(losses[1]) == STEPS
    assert losses[0][0] == pytest.approx(losses[1][0], rel=TRAINING_FLOAT32_LOSS)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def run_species_task_in_process(options: SpeciesProtocolOptions) -> None:
    save_every_step_and_report_to(options.output.with_suffix(".err"))
    run_species_task(options)


@pytest.mark.slow
def test_two_processes_train_on_a_species_task_as_one_does(processes: ForkServerContext, tmp_path: Path) -> None:
    write_assemblies(tmp_path, GREAT_APES, chromosome_bp=600)
    options = SpeciesProtocolOptions(
        task="great-apes", data=tmp_path, length=64, output=tmp_path / "alone", scale=0.001, lengths=[32, 64],
        per_class=4, baselines=["composition"], threads=1,
        changes=["protocol.windows_per_step=4", "protocol.epochs=5", "model.layers=1", "model.model_width=8"],
    )  # fmt: skip
    output = assert_same_model(processes, run_species_task_in_process, options, "ddp")
    assert (output / "accuracy.tsv").read_text() == (options.output / "accuracy.tsv").read_text()
