"""The published algorithm that the GPU benchmark measures beside ours computes the same scan."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mambacore.scan import selective_scan_reference
from scan_cases import leaves, scan_arguments
from tolerances import FLOAT32, relative_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (on Linux it comes with torch)"
)

FILE = Path(__file__).parents[2] / "kernels" / "benchmarks" / "gpu_peer.py"
SEQUENCES = ("inputs", "step_size", "gate")
MATRICES = ("input_matrix", "output_matrix")


def test_the_published_algorithm_equals_the_reference_with_all_gradients(monkeypatch):
    specification = importlib.util.spec_from_file_location("gpu_peer", FILE)
    gpu_peer = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(gpu_peer)
    monkeypatch.setattr(gpu_peer, "SHORTEST_CHUNK", 4)
    monkeypatch.setattr(gpu_peer, "LONGEST_CHUNK", 4)
    arguments = scan_arguments(2, 7, 2, 2)
    del arguments["initial_state"]
    wide, narrow = leaves(arguments, torch.float64), leaves(arguments, torch.float32)
    expected, _ = selective_scan_reference(**wide, step_softplus=True)
    seeds = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(seeds)
    turned = {name: narrow[name].transpose(1, 2) for name in SEQUENCES}
    turned |= {name: narrow[name].squeeze(2).transpose(1, 2) for name in MATRICES}
    found = gpu_peer.published_scan(**narrow | turned).transpose(1, 2)
    found.backward(seeds.float())
    assert relative_error(found, expected) < FLOAT32
    for name, tensor in narrow.items():
        assert relative_error(tensor.grad, wide[name].grad) < FLOAT32, name
