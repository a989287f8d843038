"""A causal model whose windows lie on several processes is trained as by one: the same losses and parameters."""

import json
import multiprocessing
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from mambacore.errors import InputError
from mambapipelines.finetuning.train import FinetuningOptions
from mambapipelines.language.recipe import PretrainingRecipe
from mambapipelines.language.task import CausalTask, MaskedTask
from mambapipelines.language.train import PretrainingOptions
from mambapipelines.training.options import check_options
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.run import run_folder
from mambapipelines.training.state import RunFolder
from pretraining_ranks import pretrain_in_float64, pretraining_options, write_reference
from tolerances import TRAINING_FLOAT64, relative_error
from training_runs import exit_codes, start_ranks

STEPS = 6
SECONDS = 200


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mambapipelines.language.train", "torch.utils.tensorboard"])
    return context


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genome")
    write_reference(folder)
    return folder


@pytest.fixture(scope="module")
def alone(data: Path, processes: ForkServerContext) -> Path:
    """A run of one process, which reads its windows in pieces."""
    options = pretraining_options(data, "alone", STEPS)
    process = processes.Process(target=pretrain_in_float64, args=(options,))
    process.start()
    assert exit_codes([process]) == [0], errors_of(options)
    return options.output


def errors_of(options: PretrainingOptions) -> str:
    return options.output.with_suffix(".err").read_text()


def assert_same_run(found: Path, expected: Path) -> None:
    """Losses, weights and averages of two runs in float64 agree to rounding."""
    losses, others = (json.loads(folder.with_suffix(".json").read_text()) for folder in (found, expected))
    assert len(losses) == STEPS
    assert losses == pytest.approx(others, rel=TRAINING_FLOAT64)
    state, other = (RunFolder(folder / "training").load() for folder in (found, expected))
    for tensors, expected_tensors in ((state.weights, other.weights), (state.average, other.average)):
        assert tensors.keys() == expected_tensors.keys()
        assert all(tensor.dtype == torch.float64 for tensor in tensors.values())
        errors = {name: relative_error(tensor, expected_tensors[name]) for name, tensor in tensors.items()}
        assert max(errors.values()) < TRAINING_FLOAT64, max(errors, key=lambda name: errors[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "count", "context_ranks"),
    [("ddp", 2, 2), ("ddp", 4, 4), ("ddp", 4, 2), ("fsdp", 2, 2), ("fsdp", 4, 2)],
)
def test_windows_over_ranks_train_as_one_process_does(
    processes: ForkServerContext, data: Path, alone: Path, strategy: str, count: int, context_ranks: int
) -> None:
    options = replace(
        pretraining_options(data, f"{strategy}-{count}-{context_ranks}", STEPS),
        strategy=strategy,
        context_ranks=context_ranks,
    )
    codes = exit_codes(start_ranks(processes, pretrain_in_float64, options, count))
    assert codes == [0] * count, errors_of(options)
    assert_same_run(options.output, alone)


@pytest.mark.slow
def test_a_run_over_context_ranks_is_resumed_by_one_process(
    processes: ForkServerContext, data: Path, alone: Path
) -> None:
    options = pretraining_options(data, "over-ranks", STEPS)
    over_ranks = replace(options, strategy="ddp", context_ranks=2)
    codes = exit_codes(start_ranks(processes, pretrain_in_float64, over_ranks, 2))
    assert codes == [0, 0], errors_of(options)
    (options.output / "config.json").unlink()
    (options.output / "training" / "current.json").write_text('{"folder": "step-000003"}')
    process = processes.Process(target=pretrain_in_float64, args=(options,))
    process.start()
    assert exit_codes([process]) == [0], errors_of(options)
    losses = json.loads(options.output.with_suffix(".json").read_text())
    expected = json.loads(alone.with_suffix(".json").read_text())
    assert losses == pytest.approx(expected[3:], rel=TRAINING_FLOAT64)


def test_models_that_read_both_sides_refuse_context_ranks_before_any_file_is_read(tmp_path: Path) -> None:
    options = replace(pretraining_options(tmp_path, "none", STEPS), strategy="ddp", context_ranks=2)
    recipe = load_task_recipe(PretrainingRecipe, "tiny")
    assert run_folder(options, CausalTask, recipe).path == options.output / "training"
    with pytest.raises(InputError, match="--context-ranks splits sequences, but this model needs whole ones"):
        run_folder(options, MaskedTask, recipe)


def test_lengths_are_refused_in_the_unit_of_the_task(tmp_path: Path) -> None:
    for unit in ("bases", "samples"):
        with pytest.raises(InputError, match=f"--length is 0 {unit}: use 1 or more"):
            check_options(FinetuningOptions("table", tmp_path, length=0), unit)
