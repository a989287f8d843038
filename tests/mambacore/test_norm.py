"""The root-mean-square norm equals PyTorch's own, with gradients."""

import copy
import importlib.util

import pytest
import torch
from torch.nn import functional as F

from mambacore import use_backend
from mambacore.layers import ResidualStack
from mambacore.layers.norm import root_mean_square_norm
from mambacore.native_library import native_library
from tolerances import FLOAT16, FLOAT16_LAYERS, OF_DTYPE, relative_error

BACKENDS = [
    pytest.param(
        "native", marks=pytest.mark.skipif(native_library() is None, reason="installed without the native library")
    ),
    "torch",
    pytest.param(
        "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
    ),
]
EPSILON = 1e-3


def run(function, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs, weight, seeds = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[-1:], shape)
    )
    inputs, weight = (
        inputs.to(dtype).requires_grad_(),
        weight.to(torch.float64 if dtype == torch.float64 else torch.float32),
    )
    weight.requires_grad_()
    outputs = function(inputs, weight)
    return [outputs, *torch.autograd.grad(outputs, [inputs, weight], seeds.to(dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", OF_DTYPE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 33, 64), (3000, 100), (5, 7)], ids=str)
def test_outputs_and_gradients_equal_pytorchs(shape, dtype, backend, monkeypatch):
    if backend == "triton":
        if dtype == torch.float64:
            pytest.skip("the GPU's kernels compute in float32")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    expected = run(lambda inputs, weight: F.rms_norm(inputs, shape[-1:], weight, EPSILON), shape, torch.float64)
    with use_backend(backend):
        found = run(lambda inputs, weight: root_mean_square_norm(inputs, weight, EPSILON), shape, dtype)
    assert found[0].dtype == dtype
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    assert max(errors) < OF_DTYPE[dtype], errors


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_gradcheck_and_opcheck(backend):
    inputs = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        assert torch.autograd.gradcheck(root_mean_square_norm, (inputs, weight))
        torch.library.opcheck(torch.ops.mambacore.root_mean_square_norm_forward.default, (inputs, weight, EPSILON))


def test_a_row_of_zeros_stays_zero_and_finite():
    inputs = torch.zeros(2, 8, requires_grad=True)
    outputs = root_mean_square_norm(inputs, torch.ones(8))
    outputs.sum().backward()
    assert torch.equal(outputs, torch.zeros(2, 8)) and torch.isfinite(inputs.grad).all()


def test_float16_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    inputs = (2000 * torch.randn(3, 33, generator=generator)).half()  # whose squares float16 cannot hold
    outputs, *grads = run_from(inputs, lambda values, weight: root_mean_square_norm(values, weight, EPSILON))
    expected, *expected_grads = run_from(
        inputs.double(), lambda values, weight: F.rms_norm(values, (33,), weight, EPSILON)
    )
    assert outputs.dtype == grads[0].dtype == torch.float16
    assert relative_error(outputs, expected) < FLOAT16
    assert relative_error(grads[1], expected_grads[1]) < FLOAT16


def run_from(inputs, function):
    weight = torch.ones(inputs.shape[-1], dtype=torch.promote_types(inputs.dtype, torch.float32), requires_grad=True)
    inputs = inputs.clone().requires_grad_()
    outputs = function(inputs, weight)
    return [outputs, *torch.autograd.grad(outputs.sum(), [inputs, weight])]


@pytest.mark.parametrize("mixer", ["selective", {"name": "selective", "complex_state": True}], ids=["real", "complex"])
def test_a_whole_stack_works_in_float16(mixer):
    torch.manual_seed(0)
    stack = ResidualStack(16, [mixer] * 2).half()
    sequence = torch.randn(2, 9, 16).half()
    outputs, _ = stack(sequence)
    seeds = torch.randn(2, 9, 16)
    outputs.backward(seeds.half())
    wide = copy.deepcopy(stack).double()
    wide.zero_grad()
    expected, _ = wide(sequence.double())
    expected.backward(seeds.double())
    assert outputs.dtype == torch.float16 and relative_error(outputs, expected) < FLOAT16_LAYERS
    for (name, found), (_, wanted) in zip(stack.named_parameters(), wide.named_parameters(), strict=True):
        assert found.grad.dtype == torch.float16
        assert relative_error(found.grad, wanted.grad) < FLOAT16_LAYERS, name


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\) to fit the inputs"):
        root_mean_square_norm(torch.zeros(2, 8), torch.ones(7))
