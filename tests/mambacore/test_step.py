"""The native single step equals the operators that it stands for, whatever the options of the block."""

import copy

import pytest
import torch

from mambacore import use_backend
from mambacore.layers import ResidualBlock, ResidualStack, SelectiveMixer
from mambacore.layers.step import by_operators, parameters_of, selective_step, step_block
from mambacore.layers.step_program import can_step
from mambacore.native_library import native_library
from mambacore.state import state_tensors
from tolerances import BFLOAT16_LAYERS, COMPLEX_FLOAT32, FLOAT64, relative_error

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
LIKE_STEP = {**DTYPES, "bfloat16": (torch.bfloat16, BFLOAT16_LAYERS)}


def block_of(dtype, **options):
    torch.manual_seed(0)
    block = ResidualBlock(WIDTH, SelectiveMixer(WIDTH, **options))
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 1.5)
    return block.to(dtype)


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), LIKE_STEP.values(), ids=LIKE_STEP.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_steps_equal_the_operators(options, dtype, tolerance, batch):
    block, sequence = block_of(dtype, **options), torch.randn(batch, 9, WIDTH, dtype=dtype)
    state = expected_state = None
    for piece in sequence.split(1, dim=1):
        expected, expected_state = block(piece, expected_state)  # with gradients: operator by operator
        with torch.inference_mode():
            assert block.mixer.step(block.norm, piece, state) is not None
            found, state = block(piece, state)
        assert relative_error(found, expected) < tolerance
        for one, other in zip(state_tensors(state), state_tensors(expected_state), strict=True):
            assert one.dtype == other.dtype
            assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("selective", [[], ["step"], ["input", "output"]], ids=lambda names: "-".join(names) or "none")
def test_a_mixer_that_is_not_fully_selective_steps_by_operators(selective):
    block, sequence = block_of(torch.float64, selective=selective), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    expected, state = block(sequence)[0], None
    with torch.inference_mode():
        for position, piece in enumerate(sequence.split(1, dim=1)):
            assert block.mixer.step(block.norm, piece, state) is None
            found, state = block(piece, state)
            assert relative_error(found, expected[:, position : position + 1]) < FLOAT64
    assert not can_step(block)


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
    sequence = torch.randn(65 if case == "a large batch" else 1, 2 if case == "two positions" else 1, WIDTH)
    with (
        torch.set_grad_enabled(case == "gradients"),
        use_backend("torch" if case == "another backend" else "native"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
    ):
        assert step_block(block.norm, block.mixer, sequence, None) is None


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


def arguments_of(block, batch, dtype):
    """All arguments of the operator for a block, states included."""
    generator = torch.Generator().manual_seed(1)
    mixer = block.mixer
    history, inner = mixer.convolution_weight.shape[1] - 1, mixer.inner_width
    sequence = torch.randn(batch, 1, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    convolution = torch.randn(batch, history, inner, generator=generator, dtype=torch.float64).to(dtype)
    of_scan = torch.complex128 if mixer.complex_state else torch.float64
    scan = torch.randn(batch, inner, mixer.state_size, generator=generator, dtype=of_scan)
    if dtype != torch.float64:
        scan = scan.to(torch.complex64 if mixer.complex_state else torch.float32)
    return sequence, convolution, scan, block.norm.epsilon, parameters_of(block.norm, block.mixer)


def test_a_sequence_is_the_same_in_any_batch_and_on_any_number_of_threads():
    block, before = block_of(torch.float32), torch.get_num_threads()
    sequence, convolution, scan, epsilon, parameters = arguments_of(block, 64, torch.float32)
    with torch.no_grad():
        expected = selective_step(sequence, convolution, scan, epsilon, parameters)
        try:
            for batch, threads in ((1, 1), (2, 3), (5, 1), (7, 2), (33, 3)):
                torch.set_num_threads(threads)
                found = selective_step(sequence[:batch], convolution[:batch], scan[:batch], epsilon, parameters)
                assert all(torch.equal(one, other[:batch]) for one, other in zip(found, expected, strict=True))
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("options", ["odd sizes", "many states, no history", "complex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_instruction_set_equals_the_operators(instruction_set, options, dtype):
    native = native_library()
    before = native.instruction_set
    try:
        native.use_instruction_set(instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        arguments = arguments_of(block_of(dtype, **OPTIONS[options]), 7, dtype)
        with torch.no_grad():
            wide = [tensor.double() if tensor.dtype == torch.bfloat16 else tensor for tensor in arguments[:3]]
            found = selective_step(*arguments)
            if dtype == torch.bfloat16:  # what is not rounded after each operator
                block = block_of(dtype, **OPTIONS[options]).double()
                wide = [tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) for tensor in wide]
                expected = by_operators(*wide, block.norm.epsilon, parameters_of(block.norm, block.mixer))
            else:
                expected = by_operators(*arguments)
    finally:
        native.use_instruction_set(before)
    tolerance = 2**-8 if dtype == torch.bfloat16 else DTYPES[str(dtype).removeprefix("torch.")][1]
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < tolerance


def test_the_operator_passes_opcheck_and_refuses_gradients():
    sequence, convolution, scan, epsilon, parameters = arguments_of(block_of(torch.float32), 2, torch.float32)
    detached = [None if parameter is None else parameter.detach() for parameter in parameters]
    operator = torch.ops.mambacore.selective_step.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (sequence, convolution, scan, epsilon, *detached), test_utils=tests)
    with pytest.raises(RuntimeError, match="computes no gradients but one of its tensors requires one; call the block"):
        selective_step(sequence, convolution, scan, epsilon, parameters)


def test_parameters_of_several_dtypes_are_refused():
    sequence, convolution, scan, epsilon, parameters = arguments_of(block_of(torch.float32), 2, torch.float32)
    assert parameters.input_bias is None  # which has no dtype
    mixed = parameters._replace(step_bias=parameters.step_bias.double())
    with torch.no_grad(), pytest.raises(TypeError, match="step_bias must have the dtype of the sequence"):
        selective_step(sequence, convolution, scan, epsilon, mixed)
