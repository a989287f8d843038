"""The norm after a gate equals its formula, with all gradients, and keeps PyTorch's rules."""

import pytest
import torch
from torch.nn import functional as F

from mambacore import use_backend
from mambacore.layers.gated_norm import _backward, _forward, gated_norm, norm_after_gate
from mambacore.layers.norm import RootMeanSquareNorm
from tolerances import BFLOAT16, FLOAT32, FLOAT64, relative_error

TOLERANCES = {torch.float64: FLOAT64, torch.float32: FLOAT32, torch.bfloat16: 2 * BFLOAT16}


def sequences(shape, dtype=torch.float64, beside=0):
    """Inputs, a gate that is a part of wider rows, and a weight."""
    generator = torch.Generator().manual_seed(0)
    inputs, gate, weight = (
        torch.randn(size, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
        for size in (shape, (*shape[:-1], shape[-1] + beside), shape[-1:])
    )
    return inputs.requires_grad_(), gate[..., : shape[-1]].requires_grad_(), weight.requires_grad_()


def formula(inputs, gate, weight, groups, epsilon):
    gated = (inputs * gate * torch.sigmoid(gate)).unflatten(-1, (groups, -1))
    return (gated / (gated.square().mean(-1, keepdim=True) + epsilon).sqrt()).flatten(-2) * weight


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 70, 128), (3, 5, 34)], ids=str)
def test_it_equals_the_formula_with_all_gradients(shape, dtype, groups, backend):
    norm = norm_after_gate(shape[-1], groups, 1e-3).to(dtype)
    inputs, gate, weight = sequences(shape, dtype, beside=6)
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    with use_backend(backend):
        outputs = gated_norm(inputs, gate, norm)
        found = torch.autograd.grad(outputs.double().square().sum(), [inputs, gate, norm.weight])
    wide = [tensor.detach().double().requires_grad_() for tensor in (inputs, gate, weight)]
    expected = formula(*wide, groups, norm.epsilon)
    grads = torch.autograd.grad(expected.square().sum(), wide)
    assert outputs.dtype == dtype
    assert relative_error(outputs, expected) < TOLERANCES[dtype]
    for one, other in zip(found, grads, strict=True):
        assert relative_error(one, other) < 4 * TOLERANCES[dtype]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_operator_has_its_gradients_and_fakes(backend):
    inputs, gate, weight = sequences((2, 5, 6), torch.float64, beside=4)
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *tensors: _forward(*tensors, 1e-3)[0], (inputs, gate, weight))
        torch.library.opcheck(_forward, (inputs, gate, weight, 1e-3))
        outputs, inverse = _forward(inputs, gate, weight, 1e-3)
        plain = [tensor.detach() for tensor in (inputs, gate, weight, inverse)]
        torch.library.opcheck(_backward, (torch.ones_like(outputs), *plain, 1e-3))


def test_a_gate_of_large_numbers_stays_finite():
    norm = RootMeanSquareNorm(4)
    gate = torch.tensor([[[-1e4, -90.0, 90.0, 1e4]]], requires_grad=True)
    outputs = gated_norm(torch.ones(1, 1, 4), gate, norm)
    outputs.sum().backward()
    assert torch.isfinite(outputs).all() and torch.isfinite(gate.grad).all()
    assert relative_error(outputs, norm(F.silu(gate.detach()))) < FLOAT32
