"""Blocks with the GPU's kernels can be traced without a device, forward and backward: fake tensors stand in."""

import importlib
import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mambacore import use_backend
from mambacore.layers import ResidualStack

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (on Linux it comes with torch)"
)

WIDTH, LENGTH = 8, 40
MIXERS = ["selective", {"name": "selective", "complex_state": True}]


def test_operators_of_fake_cuda_tensors_have_shapes_and_devices(monkeypatch):
    # As on a machine with a GPU. PyTorch itself wants a device for the backward pass of CUDA tensors, fake ones too.
    monkeypatch.setattr(importlib.import_module("mambacore.backends"), "_device_problem", lambda: None)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        outputs, state = ResidualStack(WIDTH, MIXERS)(torch.randn(2, LENGTH, WIDTH))
    assert outputs.shape == (2, LENGTH, WIDTH) and outputs.device.type == "cuda"
    assert state[0].scan.shape == (2, 2 * WIDTH, 16) and state[0].scan.dtype == torch.float32
    assert state[1].scan.shape == (2, 2 * WIDTH, 16) and state[1].scan.dtype == torch.complex64


def test_gradients_of_fake_tensors_have_the_shapes_of_the_parameters(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with FakeTensorMode(), use_backend("triton"):
        stack, sequence = ResidualStack(WIDTH, MIXERS), torch.randn(2, LENGTH, WIDTH, requires_grad=True)
        stack(sequence)[0].sum().backward()
        assert sequence.grad.shape == sequence.shape
        assert all(parameter.grad.shape == parameter.shape for parameter in stack.parameters())
