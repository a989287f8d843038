"""Where a command computes: every machine is imitated, because none of the tests' has a GPU."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from mambacore.devices import wide_dtype
from mambacore.errors import InputError
from mambapipelines.cli.program import run_program
from mambapipelines.device import Placement, choose, deterministic_algorithms, local_rank
from mambapipelines.training import sharding
from mambapipelines.training.module import StepBatches, TrainingModule
from mambapipelines.training.ranks import join_ranks
from mambapipelines.training.recipe import OptimizerRecipe
from mambapipelines.training.run import placed
from mambapipelines.training.session import TrainingSession

Machine = Callable[[int, tuple[int, int]], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with so many GPUs of a compute capability."""

    def imitate(count: int, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Imitation")
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    chosen: list[torch.device] = []
    imitate.chosen = chosen  # type: ignore[attr-defined]
    for name in [name for name in os.environ if name.startswith("SLURM_") or name == "LOCAL_RANK"]:
        monkeypatch.delenv(name)
    return imitate


def test_auto_without_a_gpu_is_the_cpu_and_says_why(machine: Machine) -> None:
    machine(0)
    placement = choose("auto", "float32")
    assert placement == Placement(torch.device("cpu"), "float32", "PyTorch sees no CUDA device")
    assert choose("cpu", "float32").reason is None


def test_auto_takes_a_gpu_that_multiplies_in_bfloat16(machine: Machine) -> None:
    machine(1)
    placement = choose()
    assert placement == Placement(torch.device("cuda:0"), "bfloat16")
    assert machine.chosen == [torch.device("cuda:0")]  # type: ignore[attr-defined]
    assert placement.describe() == "cuda:0 (Imitation), bfloat16"


def test_auto_leaves_a_gpu_that_is_too_old(machine: Machine) -> None:
    machine(1, (7, 5))
    placement = choose("auto", "float32")
    assert placement.device.type == "cpu"
    assert placement.reason == "Imitation has compute capability 7.5, below 8.0"
    # Asked for by name it is taken, in the precision that it has.
    assert choose("cuda") == Placement(torch.device("cuda:0"), "float32")


def test_one_of_several_gpus_is_taken_by_number(machine: Machine) -> None:
    machine(2)
    assert choose("cuda:1").device == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"--device is cuda:2, but this machine has cuda:0 to cuda:1"):
        choose("cuda:2")


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_processes_of_torchrun_and_slurm_take_a_gpu_each(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    machine(2)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for rank in (0, 1):
        monkeypatch.setenv(variable, str(rank))
        assert local_rank() == rank
        assert choose("auto").device == choose("cuda").device == torch.device("cuda", rank)
    with pytest.raises(InputError, match="use cuda, and each uses its own"):
        choose("cuda:1")
    monkeypatch.setenv(variable, "2")
    with pytest.raises(InputError, match="process 3 on this machine has no GPU, as there are only 2"):
        choose("auto")
    # A scheduler that shows each process its own device alone calls it cuda:0.
    machine(1)
    assert choose("auto").device == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cuda", "auto", "--device is cuda, but PyTorch finds no CUDA device"),
        ("gpu", "auto", "--device is 'gpu': use auto, cpu, cuda, cuda:N or mps"),
        ("xpu", "auto", "--device is 'xpu', which is not available"),
        ("mps", "auto", "--device is mps, but PyTorch finds no Apple GPU"),
        ("cpu", "float16", "--precision is 'float16': use one of auto, float32, bfloat16"),
    ],
)
def test_what_is_not_there_is_one_sentence(machine: Machine, device: str, precision: str, expected: str) -> None:
    machine(0)
    with pytest.raises(InputError, match=expected):
        choose(device, precision)


def test_precision_auto_is_that_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert choose("cpu", "auto").precision == expected
        assert choose("cpu", "float32").precision == "float32"


def test_an_apple_gpu_is_taken_when_asked_for_and_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose("auto", "float32").device.type != "mps"
    assert choose("mps") == Placement(torch.device("mps"), "float32")
    assert wide_dtype(torch.device("mps")) == wide_dtype("mps:0") == torch.float32
    assert wide_dtype("cuda:1") == wide_dtype(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_several_processes_meets_the_others_from_its_own_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, strategy: str, rank: int
) -> None:
    machine(2)
    started: list[tuple[str, dict[str, Any]]] = []
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    for name, value in (launched | {"TORCHELASTIC_RUN_ID": "run", "MASTER_ADDR": "here", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **more: started.append((backend, more)))
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    placement = choose()
    assert placement.device == torch.device("cuda", rank)
    assert machine.chosen == [placement.device]  # type: ignore[attr-defined]
    ranks = join_ranks(strategy, 1, placement.device)
    assert (ranks.rank, ranks.count, ranks.sharded) == (rank, 2, strategy == "fsdp")
    (backend, more), *others = started
    # Gradients and states travel between the GPUs, numbers that the processes agree on between the CPUs.
    assert backend == "cpu:gloo,cuda:nccl"
    assert (more["rank"], more["world_size"], others) == (rank, 2, [])


def test_parameters_are_divided_on_a_mesh_of_the_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    meshes: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(sharding, "init_device_mesh", lambda kind, shape: meshes.append((kind, shape)))
    monkeypatch.setattr(sharding, "fully_shard", lambda module, **_: module)
    sharding.shard(torch.nn.Linear(2, 2), torch.device("cuda", 1))
    assert meshes == [("cuda", (2,))]


def test_deterministic_algorithms_are_for_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("kind", "fused"), [("cuda", True), ("cpu", None)])
def test_a_gpu_updates_its_weights_in_one_kernel(kind: str, fused: bool | None) -> None:
    module = SimpleNamespace(
        recipe=SimpleNamespace(optimizer=OptimizerRecipe()),
        task=SimpleNamespace(parameter_groups=lambda decay: [{"params": [torch.nn.Parameter(torch.zeros(2))]}]),
        placement=Placement(torch.device(kind), "float32"), _own=lambda groups: groups, _restored_tensors=None,
    )  # fmt: skip
    optimizer = TrainingModule.configure_optimizers(module)  # type: ignore[arg-type]
    assert optimizer.defaults["fused"] is fused


@pytest.mark.parametrize(("kind", "ahead"), [("cuda", [0, 1]), ("cpu", [0])])
def test_the_next_batch_is_made_and_pinned_while_a_device_computes(
    kind: str, ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(int(self)) or self)
    task = SimpleNamespace(batch=lambda step: (made.append(step), (torch.tensor(step),))[1])
    batches = StepBatches(task, 0, Placement(torch.device(kind), "float32"))  # type: ignore[arg-type]
    steps = iter(batches)
    assert int(next(steps)[0]) == 0
    batches.prepare_next()
    assert made == ahead
    assert [int(next(steps)[0]), int(next(steps)[0]), *made] == [1, 2, 0, 1, 2]
    assert pinned == ([0, 1, 2] if kind == "cuda" else [])


def test_a_run_that_goes_on_elsewhere_says_what_changed() -> None:
    said: list[str] = []
    now = Placement(torch.device("cpu"), "float32")
    state = SimpleNamespace(
        step=3, schedule=SimpleNamespace(total_steps=9), threads=torch.get_num_threads(),
        placed={"device": "cuda", "precision": "bfloat16", "processes": "4"},
    )  # fmt: skip
    session = SimpleNamespace(
        state=state, placement=now, progress=SimpleNamespace(note=said.append), _placed=lambda: placed(now)
    )
    TrainingSession._introduce_state(session)  # type: ignore[arg-type]
    assert said[1:] == [
        "resuming after step 3 of 9",
        "device was cuda and is now cpu; precision was bfloat16 and is now float32; processes was 4 and is now 1: the "
        "numbers may differ from an uninterrupted run",
    ]
    state.placed = placed(now)
    said.clear()
    TrainingSession._introduce_state(session)  # type: ignore[arg-type]
    assert said[1:] == ["resuming after step 3 of 9"]


def test_a_device_that_is_full_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def application(**_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    assert run_program(application, "genomamba", []) == 2
    assert capsys.readouterr().err == (
        "genomamba: error: the memory of the device is too small for this: use --device cpu.\n"
    )
