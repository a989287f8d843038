"""The gradients of a narrow linear layer are those of the layer, also for adapters, and can be differentiated again."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from mambacore.layers.narrow_linear import narrow_linear
from tolerances import FLOAT32, relative_error


def parts(dtype=torch.float32):
    torch.manual_seed(0)
    # A slice of a wider tensor, as the selection gives it.
    return nn.Linear(3, 20, bias=False, dtype=dtype), torch.randn(2, 9, 7, dtype=dtype, requires_grad=True)


def test_outputs_and_gradients_equal_those_of_the_layer():
    layer, wide = parts()
    found, expected = narrow_linear(layer, wide[..., 2:5]), layer(wide[..., 2:5])
    assert torch.equal(found, expected)
    given = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (wide, layer.weight), given),
        torch.autograd.grad(expected, (wide, layer.weight), given),
        strict=True,
    ):
        assert relative_error(one, other) < FLOAT32


def test_gradients_can_be_checked_and_differentiated_again():
    layer, wide = parts(torch.float64)
    inputs = wide[..., :3].detach().requires_grad_()
    assert gradcheck(lambda inputs: narrow_linear(layer, inputs), (inputs,))
    assert gradgradcheck(lambda inputs: narrow_linear(layer, inputs), (inputs,))


@pytest.mark.parametrize("frozen", ["inputs", "weight"])
def test_what_is_frozen_has_no_gradient(frozen):
    layer, wide = parts()
    inputs = wide[..., :3].detach().requires_grad_(frozen != "inputs")
    layer.weight.requires_grad_(frozen != "weight")
    narrow_linear(layer, inputs).sum().backward()
    assert (inputs.grad is None) == (frozen == "inputs")
    assert (layer.weight.grad is None) == (frozen == "weight")


def test_a_changed_layer_is_called():
    layer, wide = parts()
    layer.register_forward_hook(lambda _, __, outputs: outputs + 1)
    assert torch.equal(narrow_linear(layer, wide[..., :3]), wide[..., :3] @ layer.weight.t() + 1)
    biased = nn.Linear(3, 4)
    assert torch.equal(narrow_linear(biased, wide[..., :3]), biased(wide[..., :3]))
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow_linear(nn.Linear(3, 4, bias=False), wide[..., :3]).dtype == torch.bfloat16
