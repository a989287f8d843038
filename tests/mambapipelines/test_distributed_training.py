"""Several processes train as one does: the same losses and parameters to rounding, states for any number of them."""

import multiprocessing
import shutil
import socket
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mambacore.errors import InputError
from mambapipelines.run_state import RunFolder, read_metrics
from mambapipelines.training.ranks import Ranks, check_strategy
from mambapipelines.training_options import TrainingOptions
from tolerances import relative_error
from training_runs import CHANGES, run_options, train_as_rank, train_in_process, write_genomes

STEPS = 6
SECONDS = 200
# AdamW divides by the gradient's size, so roundings of small gradients weigh as much as those of large ones.
AFTER_STEPS = 2e-3


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mambapipelines.species_training", "torch.utils.tensorboard"])
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


def train(processes: ForkServerContext, options: TrainingOptions, count: int) -> None:
    """Train in `count` processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = [processes.Process(target=train_as_rank, args=(options, rank, count, port)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * count, options.output.with_suffix(".err").read_text()


def assert_close(found: Path, expected: Path) -> None:
    """Losses, weights and averages of two runs agree to rounding."""
    rows, others = (read_metrics(folder / "training" / "metrics.csv") for folder in (found, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in others] == [str(n) for n in range(1, STEPS + 1)]
    assert [float(row["loss"]) for row in rows] == pytest.approx([float(row["loss"]) for row in others], rel=1e-4)
    state, other = (RunFolder(folder / "training").load() for folder in (found, expected))
    for tensors, expected_tensors in ((state.weights, other.weights), (state.average, other.average)):
        assert tensors.keys() == expected_tensors.keys()
        errors = {name: relative_error(tensor, expected_tensors[name]) for name, tensor in tensors.items()}
        assert max(errors.values()) < AFTER_STEPS, max(errors, key=lambda name: errors[name])
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
    import torch  # noqa: PLC0415

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
