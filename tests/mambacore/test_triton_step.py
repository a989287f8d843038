"""The GPU's single step, interpreted on CPU tensors, equals the block in float64, whatever its options."""

import copy
import importlib.util

import pytest
import torch

from mambacore import use_backend
from mambacore.layers import ResidualBlock, ResidualStack, SelectiveMixer
from mambacore.layers.selective import SelectiveState
from mambacore.layers.step import states_in_place, steps_on_device
from mambacore.state import state_tensors
from tolerances import BFLOAT16_LAYERS, COMPLEX_FLOAT32, FLOAT16_LAYERS, relative_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (on Linux it comes with torch)"
)

WIDTH = 20
OPTIONS = {
    "as published": {},
    "odd sizes": {"state_size": 5, "kernel_width": 3, "expansion": 3, "step_rank": 2},
    "many states, no history": {"state_size": 40, "kernel_width": 1},
    "biases": {"linear_bias": True},
    "no bias at all": {"convolution_bias": False},
    "complex": {"complex_state": True, "state_size": 7},
}
DTYPES = {
    "float32": (torch.float32, COMPLEX_FLOAT32),
    "bfloat16": (torch.bfloat16, BFLOAT16_LAYERS),
    "float16": (torch.float16, FLOAT16_LAYERS),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        yield


def block_of(dtype, **options):
    torch.manual_seed(0)
    block = ResidualBlock(WIDTH, SelectiveMixer(WIDTH, **options))
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 1.5)
        block.mixer.skip_weight.uniform_(0.5, 1.5)
    return block.to(dtype)


def in_float64(block, sequence):
    """Outputs (batch, length, model_width) and the state after the last position, operator by operator."""
    with use_backend("torch"), torch.no_grad():
        wide = copy.deepcopy(block).double()
        return wide.mixer(wide.norm(sequence.double())), sequence.double()


def walked(block, sequence, state=None):
    """Position by position through the kernels."""
    outputs = []
    with torch.no_grad():
        for piece in sequence.split(1, dim=1):
            assert steps_on_device(piece)
            found, state = block(piece, state)
            outputs.append(found)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_steps_equal_the_block_in_float64(options, dtype, tolerance):
    block, sequence = block_of(dtype, **options), torch.randn(2, 5, WIDTH).to(dtype)
    (mixed, expected_state), residual = in_float64(block, sequence)
    found, state = walked(block, sequence)
    assert found.dtype == dtype and state.convolution.dtype == dtype
    assert state.scan.dtype == (torch.complex64 if block.mixer.complex_state else torch.float32)
    assert relative_error(found, residual + mixed) < tolerance
    for one, other in zip(state, expected_state, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("options", [{}, {"complex_state": True, "state_size": 3}], ids=["real", "complex"])
def test_states_are_overwritten_when_asked_and_only_then(options):
    block, sequence = block_of(torch.float32, **options), torch.randn(3, 4, WIDTH)
    _, state = walked(block, sequence[:, :1])
    kept = SelectiveState(*(tensor.clone() for tensor in state))
    expected, expected_state = walked(block, sequence[:, 1:], state)
    assert all(torch.equal(one, other) for one, other in zip(state, kept, strict=True))
    with states_in_place():
        found, same = walked(block, sequence[:, 1:], state)
    assert all(one is other for one, other in zip(same, state, strict=True))
    assert torch.equal(found, expected)
    assert all(torch.equal(one, other) for one, other in zip(state, expected_state, strict=True))


def test_several_programs_share_the_channels(monkeypatch):
    from mambacore.layers import triton_step as step  # noqa: PLC0415  skipped where there is no Triton

    block, sequence = block_of(torch.float32, state_size=3), torch.randn(2, 2, WIDTH)
    expected, _ = walked(block, sequence)
    monkeypatch.setattr(step, "CONVOLVE_CHANNELS", 16)
    monkeypatch.setattr(step, "ADVANCE_ELEMENTS", 64)  # 16 channels of 4 states, for 40 channels
    assert relative_error(walked(block, sequence)[0], expected) < COMPLEX_FLOAT32


def test_under_autocast_steps_equal_the_operators(monkeypatch):
    stack, sequence = ResidualStack(WIDTH, ["selective"]), torch.randn(2, 1, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, state = stack(sequence)
        monkeypatch.setattr("mambacore.layers.step.steps_on_device", lambda *_: False)
        expected, expected_state = stack(sequence)
    assert found.dtype == expected.dtype
    assert relative_error(found, expected) < BFLOAT16_LAYERS
    for one, other in zip(state_tensors(state), state_tensors(expected_state), strict=True):
        assert one.dtype == other.dtype and relative_error(one, other) < BFLOAT16_LAYERS


@pytest.mark.parametrize("case", ["gradients", "two positions", "an empty batch", "another backend"])
def test_other_cases_are_left_to_the_operators(case):
    sequence = torch.randn(0 if case == "an empty batch" else 1, 2 if case == "two positions" else 1, WIDTH)
    with torch.set_grad_enabled(case == "gradients"), use_backend("torch" if case == "another backend" else "triton"):
        assert not steps_on_device(sequence)


def test_a_state_of_another_batch_is_refused():
    block = block_of(torch.float32)
    _, state = walked(block, torch.randn(2, 1, WIDTH))
    with pytest.raises(ValueError, match=r"initial_state must have shape \(3, 3, 40\)"):
        walked(block, torch.randn(3, 1, WIDTH), state)
