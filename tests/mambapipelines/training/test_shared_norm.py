"""Batch normalisation over all processes: outputs, gradients and running means are those of one process."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mambapipelines.training.shared_norm import share_batch_norms
from training_runs import exit_codes, start_ranks

ROWS = 6


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)]
    return nn.Sequential(*layers).double()


def _material() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(ROWS, 1, 6, 6, generator=generator, dtype=torch.float64),
        torch.randn(ROWS, 3, 2, 2, generator=generator, dtype=torch.float64),
    )


def _results(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    inputs, targets = _material()
    ((model(inputs[rows]) - targets[rows]) ** 2).mean().backward()
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in plain.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in (gradients | dict(plain.named_buffers())).items()}


def _half(output: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = _model()
    share_batch_norms(model)
    found = _results(DistributedDataParallel(model), slice(rank * ROWS // 2, (rank + 1) * ROWS // 2))
    torch.save(found, output / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    assert exit_codes(start_ranks(context, _half, tmp_path, 2)) == [0, 0]
    expected = _results(_model(), slice(None))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].numpy() == pytest.approx(tensor.numpy(), rel=1e-10, abs=1e-12), name
