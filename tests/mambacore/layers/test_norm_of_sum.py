"""The norm's kernel that adds a residual branch on the way, interpreted, and the stacks that leave their sums to it."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F

from mambacore import use_backend
from mambacore.layers import ResidualBlock, ResidualStack, SelectiveMixer
from mambacore.layers.norm import RootMeanSquareNorm, norm_of_sum
from scan_cases import random_starts
from small_operators import launches_instead_of_kernels
from tolerances import BFLOAT16, FLOAT32, OF_DTYPE, relative_error

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
EPSILON = 1e-3
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def reference(inputs, branch, weight):
    sums = inputs + branch
    return F.rms_norm(sums, sums.shape[-1:], weight, EPSILON), sums


@pytest.mark.parametrize(
    ("shape", "dtypes", "used"),
    [(shape, dtypes, "both") for shape in ((1, 1, 16), (2, 33, 60), (700, 5)) for dtypes in DTYPES]
    + [((3, 7, 16), dtypes, used) for dtypes in DTYPES[:2] for used in ("outputs", "sum")],
    ids=str,
)
def test_both_outputs_and_all_gradients_are_those_of_float64(shape, dtypes, used):
    """Of inputs that both dtypes hold, so that only the arithmetic differs."""
    inputs, branch = (numbers(*shape).bfloat16().double().roll(number) for number in range(2))
    weight, seeds = numbers(shape[-1]), (numbers(*shape), 1.5 * numbers(*shape).flip(-1))

    def run(function, kinds, wide):
        leaves = [one.to(kind).requires_grad_() for one, kind in zip((inputs, branch, weight), kinds, strict=True)]
        chosen = slice(0, 1) if used == "outputs" else slice(1, 2) if used == "sum" else slice(0, 2)
        outputs = function(*leaves)[chosen]
        of_outputs = [seed.to(one.dtype) for seed, one in zip(seeds[chosen], outputs, strict=True)]
        grads = torch.autograd.grad(outputs, leaves, of_outputs, allow_unused=True)
        assert [one.dtype for one in grads if one is not None] == list(kinds[: 2 + (used != "sum")])
        assert all(one.dtype == torch.promote_types(*kinds[:2]) for one in outputs) or wide
        return [*outputs, *(one for one in grads if one is not None)]

    expected = run(reference, (torch.float64,) * 3, wide=True)
    with use_backend("triton"):
        found = run(lambda *one: norm_of_sum(*one, epsilon=EPSILON), (*dtypes, torch.float32), wide=False)
    assert len(found) == len(expected) >= 3
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    assert max(errors) < max(OF_DTYPE[kind] for kind in dtypes), errors


def test_the_operators_pass_pytorchs_checks():
    inputs, branch = (numbers(2, 3, 8).float().requires_grad_() for _ in range(2))
    weight = torch.ones(8, requires_grad=True)
    with use_backend("triton"):
        for dtype in (None, torch.bfloat16):
            arguments = (inputs, branch.detach().bfloat16().requires_grad_(), weight, EPSILON, dtype)
            torch.library.opcheck(torch.ops.mambacore.norm_of_sum_forward.default, arguments)


def test_a_norm_rounds_for_the_linear_layer_after_it():
    """As it does without a branch: autocast would cast its outputs, and nothing else reads them."""
    norm = RootMeanSquareNorm(8)
    sequence, branch = numbers(2, 3, 8).float(), numbers(2, 3, 8).flip(0).bfloat16()
    for before_linear, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        norm.before_linear = before_linear
        with use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
            normalised, sums = norm.of_sum(sequence, branch)
            assert torch.equal(sums, sequence + branch) and sums.dtype == torch.float32
            assert torch.equal(normalised, norm(sums)) and normalised.dtype == dtype


def gradients_of(stack, sequence, starts, low):
    """Outputs, states and all gradients, with the GPU's kernels."""
    stack.zero_grad()
    inputs = sequence.clone().requires_grad_()
    with use_backend("triton"):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            outputs, state = stack(inputs, None, starts)
        (outputs * numbers(*outputs.shape).float()).sum().backward()
    found = {"outputs": outputs.detach(), "inputs": inputs.grad}
    found |= {f"state {number}": one.scan.detach() for number, one in enumerate(state)}
    return found | {name: one.grad.clone() for name, one in stack.named_parameters()}


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("feed_forward_width", [None, 12])
def test_a_stack_that_leaves_sums_to_its_norms_is_the_stack_that_makes_them(feed_forward_width, low):
    torch.manual_seed(0)
    mixers = [{"name": "selective", "state_size": 2}] * 2
    stack = ResidualStack(8, mixers, feed_forward_width=feed_forward_width)
    sequence, starts = numbers(2, 4, 8).float(), random_starts(2, 4, 0.3)
    found = gradients_of(stack, sequence, starts, low)
    for block in stack.blocks:  # a hook has to see each block's own outputs
        block.register_forward_hook(lambda *_: None)
    expected = gradients_of(stack, sequence, starts, low)
    assert found.keys() == expected.keys()
    for name in ("outputs", "state 0", "state 1"):  # the same arithmetic
        assert torch.equal(found[name], expected[name]), name
    errors = {name: relative_error(found[name], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) < (BFLOAT16 if low else FLOAT32), errors


def test_hooks_and_adapters_get_what_they_would(monkeypatch):
    """Only plain blocks and norms are gone past; the outputs of a block are its own for whoever looks at them."""
    started = launches_instead_of_kernels(monkeypatch)
    stack = ResidualStack(8, [{"name": "selective", "state_size": 2}] * 2)
    sequence = torch.zeros(1, 5, 8)

    def sums():
        started.clear()
        seen = []
        handle = stack.blocks[0].register_forward_hook(lambda *one: seen.append(one)) if watched else None
        norms = [norm.register_forward_hook(lambda *_: None) for norm in watched_norms]
        with use_backend("triton"):
            stack(sequence)
        for one in (handle, *norms):
            if one is not None:
                one.remove()
        return len(seen)

    watched, watched_norms = False, []
    assert sums() == 0 and started.count("normalise") == 3
    watched = True
    assert sums() == 1
    watched, watched_norms = False, [stack.blocks[1].norm, stack.final_norm]
    assert sums() == 0 and started.count("normalise") == 3

    class Own(ResidualBlock):
        def forward(self, sequence, state=None, sequence_starts=None):
            return torch.full_like(sequence, 7), state  # whatever kernels that were not run left in the sequence

    stack.blocks[1] = Own(8, SelectiveMixer(8, state_size=2))
    stack.final_norm = torch.nn.Identity()
    with use_backend("torch"):
        outputs, _ = stack._walk(sequence, None, None)
    with use_backend("triton"):
        assert torch.equal(stack._walk(sequence, None, None)[0], outputs)
    assert torch.equal(outputs, torch.full_like(outputs, 7))
