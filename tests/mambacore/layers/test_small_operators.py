"""How many small operators stand beside the kernels and products of a selective layer on a GPU, counted without one."""

import importlib.util

import pytest
import torch

from mambacore import use_backend
from mambacore.layers import ResidualBlock, ResidualStack, SelectiveMixer
from scan_cases import random_starts
from small_operators import launches_instead_of_kernels, small_operators
from tolerances import BFLOAT16_LAYERS, relative_error

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Counted the same way before the norm was a kernel, matrices were converted inside of the scan's kernels and the norms'
# added the branches: 62, 25 of them copies, of which 8 cast weights and their gradients (autocast keeps the weights).
MOST_OPERATORS, MOST_COPIES = 27, 12
KERNELS = [
    "normalise", "convolve", "walk", "retreat", "add_up", "grad_before_activation", "grad_of_inputs", "normalise_back",
]  # fmt: skip


def test_a_layer_under_autocast_starts_half_of_the_operators_it_did(monkeypatch):
    started = launches_instead_of_kernels(monkeypatch)
    sequence = torch.randn(2, 40, 32, requires_grad=True)

    def counted(layers):
        stack = ResidualStack(32, ["selective"] * layers)

        def run():
            stack.zero_grad()
            with use_backend("triton"):
                with torch.autocast("cpu", torch.bfloat16):
                    outputs, _ = stack(sequence)
                outputs.sum().backward()

        run()
        started.clear()
        found = small_operators(run)
        assert sorted(started) == sorted(layers * KERNELS + ["normalise", "normalise_back"])  # the last of the stack
        return found

    # What another layer adds.
    found = counted(3)
    found.subtract(counted(1))
    assert found["copy_"] <= 2 * MOST_COPIES, found
    assert found.total() <= 2 * MOST_OPERATORS, found


@pytest.mark.parametrize("packed", [False, True], ids=["one record", "many records"])
def test_under_autocast_the_block_and_its_gradients_are_those_of_float64(packed, monkeypatch):
    """What is converted inside of kernels is what was converted before them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    block = ResidualBlock(12, SelectiveMixer(12, state_size=4))
    sequence, weight = torch.randn(2, 37, 12), torch.randn(2, 37, 12)
    starts = random_starts(2, 37, 0.1) if packed else None

    def run(module, backend, dtype, low):
        module.zero_grad()
        with use_backend(backend):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                outputs, _ = module(sequence.to(dtype), None, starts)
            (outputs * weight.to(dtype)).sum().backward()
        return {"outputs": outputs.detach()} | {name: one.grad.clone() for name, one in module.named_parameters()}

    found = run(block, "triton", torch.float32, True)
    expected = run(block.double(), "torch", torch.float64, False)
    errors = {name: relative_error(found[name], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) < BFLOAT16_LAYERS, errors
