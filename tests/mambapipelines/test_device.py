"""Where a command computes: every machine is imitated, because none of the tests' has a GPU."""

import os
from collections.abc import Callable

import pytest
import torch

from mambacore.errors import InputError
from mambapipelines.device import Placement, choose, local_rank

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
    with pytest.raises(InputError, match=r"--device is cuda:2, and this machine has cuda:0 to cuda:1"):
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
    with pytest.raises(InputError, match="use cuda, and each takes its own"):
        choose("cuda:1")
    monkeypatch.setenv(variable, "2")
    with pytest.raises(InputError, match="process 3 on this machine has no GPU, of which there are 2"):
        choose("auto")
    # A scheduler that shows each process its own device alone calls it cuda:0.
    machine(1)
    assert choose("auto").device == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cuda", "auto", "--device is cuda, and PyTorch sees no CUDA device here"),
        ("gpu", "auto", "--device is 'gpu': use auto, cpu, cuda or cuda:N"),
        ("xpu", "auto", "--device is 'xpu', which this machine lacks"),
        ("mps", "auto", "--device mps is not supported"),
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
