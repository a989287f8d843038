"""The native single step equals the operators that it stands for, whatever the options of the block."""

import copy

import pytest
import torch

from mambacore import use_backend
from mambacore.layers import ResidualBlock, ResidualStack, SelectiveMixer
from mambacore.layers.step import step_library
from mambacore.native_library import native_library
from mambacore.state import state_tensors
from tolerances import COMPLEX_FLOAT32, FLOAT64, relative_error

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without the native library")

WIDTH = 20
OPTIONS = {
    "as published": {},
    "odd sizes": {"state_size": 5, "kernel_width": 3, "expansion": 3, "step_rank": 2},
    "many states, no history": {"state_size": 40, "kernel_width": 1},
    "biases": {"linear_bias": True},
    "no bias at all": {"convolution_bias": False},
    "complex": {"complex_state": True, "state_size": 7},
}
DTYPES = {"float64": (torch.float64, FLOAT64), "float32": (torch.float32, COMPLEX_FLOAT32)}


def block_of(dtype, **options):
    torch.manual_seed(0)
    block = ResidualBlock(WIDTH, SelectiveMixer(WIDTH, **options))
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 1.5)
    return block.to(dtype)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_steps_equal_the_operators(options, dtype, tolerance, batch):
    block, sequence = block_of(dtype, **options), torch.randn(batch, 9, WIDTH, dtype=dtype)
    state = expected_state = None
    for piece in sequence.split(1, dim=1):
        expected, expected_state = block(piece, expected_state)  # with gradients: operator by operator
        with torch.inference_mode():
            assert step_library(block.norm, block.mixer, piece) is not None
            found, state = block(piece, state)
        assert relative_error(found, expected) < tolerance
        for one, other in zip(state_tensors(state), state_tensors(expected_state), strict=True):
            assert one.dtype == other.dtype
            assert relative_error(one, other) < tolerance


def test_a_step_follows_parameters_that_change_or_move():
    block, piece = block_of(torch.float64), torch.randn(1, 1, WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        block(piece)
    with torch.no_grad():
        block.mixer.log_decay_rate.add_(0.5)  # in place
        block.mixer.output_projection.weight = torch.nn.Parameter(
            torch.randn_like(block.mixer.output_projection.weight)
        )
    other = copy.deepcopy(block).float()
    for changed, dtype in ((block, torch.float64), (other, torch.float32)):
        expected, _ = changed(piece.to(dtype))
        with torch.inference_mode():
            assert relative_error(changed(piece.to(dtype))[0], expected) < DTYPES[str(dtype).removeprefix("torch.")][1]


@pytest.mark.parametrize("case", ["gradients", "two positions", "a large batch", "another backend", "autocast"])
def test_other_cases_are_left_to_the_operators(case):
    block = block_of(torch.float32)
    sequence = torch.randn(64 if case == "a large batch" else 1, 2 if case == "two positions" else 1, WIDTH)
    with (
        torch.set_grad_enabled(case == "gradients"),
        use_backend("torch" if case == "another backend" else "native"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
    ):
        assert step_library(block.norm, block.mixer, sequence) is None


def test_many_threads_give_the_same(monkeypatch):
    torch.manual_seed(1)
    stack = ResidualStack(512, ["selective"]).eval()  # wide enough for its projections to be shared out
    sequence = torch.randn(1, 1, 512)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                results.append(stack(sequence)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    monkeypatch.setattr(SelectiveMixer, "step", lambda *_: None)
    with torch.inference_mode():
        assert relative_error(results[0], stack(sequence)[0]) < COMPLEX_FLOAT32
