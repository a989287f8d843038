"""The registered steps of Mamba-2 and Mamba-3 equal the operators that they stand for, whatever the block's options."""

import copy

import pytest
import torch
from torch import nn

from mambacore import use_backend
from mambacore.layers import (
    Mamba2Mixer,
    Mamba3Mixer,
    ResidualBlock,
    RootMeanSquareNorm,
    dual_blocks,
    mamba2_step,
    mamba3_step,
)
from mambacore.native_library import native_library
from mambacore.state import state_tensors
from tolerances import BFLOAT16_LAYERS, COMPLEX_FLOAT32, FLOAT64, relative_error

pytestmark = pytest.mark.skipif(
    native_library() is None or not native_library().has_dual_step,
    reason="installed without the native library, or with one built before these steps",
)

WIDTH = 20
MIXERS = {
    "mamba2": lambda: Mamba2Mixer(WIDTH),
    "mamba2, odd sizes": lambda: Mamba2Mixer(
        WIDTH, state_size=5, head_width=10, kernel_width=3, groups=2, linear_bias=True, step_limits=(0.01, 0.05)
    ),
    "mamba2, no history": lambda: Mamba2Mixer(WIDTH, state_size=18, kernel_width=1, convolution_bias=False),
    "mamba3": lambda: Mamba3Mixer(WIDTH),
    "mamba3 of rank 3": lambda: Mamba3Mixer(
        WIDTH, state_size=6, head_width=10, groups=2, rank=3, rotated_share=1.0, output_norm=True
    ),
    "mamba3, real": lambda: Mamba3Mixer(WIDTH, state_size=5, head_width=4, rotated_share=0, trapezoidal=False),
}
DTYPES = {"float64": (torch.float64, FLOAT64), "float32": (torch.float32, COMPLEX_FLOAT32)}
LIKE_STEP = {**DTYPES, "bfloat16": (torch.bfloat16, BFLOAT16_LAYERS)}


def block_of(mixer, dtype=torch.float32):
    torch.manual_seed(0)
    block = ResidualBlock(WIDTH, MIXERS[mixer]()).eval()
    with torch.no_grad():  # norms, biases and weights of ranks start as constants
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.rand_like(parameter))
    return block.to(dtype)


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operator_and_arguments(block, batch, dtype):
    """The registered operator, the function that defines it, and its arguments for a state that has come far."""
    norm, mixer = block.norm, block.mixer
    _, state = block(normal(batch, 9, WIDTH, dtype=dtype))
    sequence = normal(batch, 1, WIDTH, seed=2, dtype=dtype)
    state = tuple(tensor.detach() for tensor in state)
    if isinstance(mixer, Mamba2Mixer):
        sizes = (mixer.groups, norm.epsilon, mixer.gate_norm.epsilon, mixer.step_limits)
        parameters = dual_blocks.mamba2_parameters(norm, mixer)
        return mamba2_step.mamba2_step, mamba2_step.by_operators, (sequence, *state, *sizes, parameters)
    arguments = (dual_blocks.Mamba3States(*state), dual_blocks.mamba3_choices(norm, mixer))
    parameters = dual_blocks.mamba3_parameters(norm, mixer)
    return mamba3_step.mamba3_step, mamba3_step.by_operators, (sequence, *arguments, parameters)


def first_rows(arguments, batch):
    """The arguments for the first sequences of a batch."""

    def cut(value):
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return value._make(map(cut, value)) if "angle" in value._fields else value
        return value[:batch] if isinstance(value, torch.Tensor) else value

    return tuple(cut(value) for value in arguments)


def widened(given, wide):
    """A tensor, or the tensors of a state, in float64; of anything else what belongs to the block in float64."""
    if isinstance(given, dual_blocks.Mamba3States):
        return given._make(state.double() for state in given)
    return given.double() if isinstance(given, torch.Tensor) else wide


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), LIKE_STEP.values(), ids=LIKE_STEP.keys())
@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_equal_the_operators(mixer, dtype, tolerance, batch):
    block, sequence = block_of(mixer, dtype), normal(batch, 9, WIDTH, dtype=dtype)
    state = expected_state = None
    for piece in sequence.split(1, dim=1):
        expected, expected_state = block(piece, expected_state)  # with gradients: operator by operator
        with torch.inference_mode():
            assert block.mixer.step(block.norm, piece, state) is not None
            found, state = block(piece, state)
        assert relative_error(found, expected) < tolerance
        assert type(state) is type(expected_state)
        for name, one, other in zip(state._fields, state, expected_state, strict=True):
            assert one.dtype == other.dtype
            # Angles are the same when they differ by a turn.
            found_part, expected_part = (one.cos(), other.cos()) if name == "angle" else (one, other)
            assert relative_error(found_part, expected_part) < tolerance, name


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_instruction_set_equals_the_definition(mixer, dtype, instruction_set):
    native = native_library()
    before = native.instruction_set
    try:
        native.use_instruction_set(instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        block = block_of(mixer, dtype)
        with torch.no_grad():
            operator, definition, arguments = operator_and_arguments(block, 3, dtype)
            found = operator(*arguments)
            if dtype == torch.bfloat16:  # what is not rounded after each operator
                wide = operator_and_arguments(copy.deepcopy(block).double(), 3, torch.float64)[2]
                arguments = tuple(widened(given, other) for given, other in zip(arguments, wide, strict=True))
            expected = definition(*arguments)
    finally:
        native.use_instruction_set(before)
    tolerance = 2**-8 if dtype == torch.bfloat16 else DTYPES[str(dtype).removeprefix("torch.")][1]
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("mixer", MIXERS)
def test_without_a_state_is_with_zeros(mixer):
    block = block_of(mixer)
    with torch.no_grad():
        operator, definition, (sequence, *arguments) = operator_and_arguments(block, 2, torch.float32)
        if isinstance(block.mixer, Mamba2Mixer):
            nothing, zeros = [None, None], [torch.zeros_like(state) for state in arguments[:2]]
            nothing, zeros = [*nothing, *arguments[2:]], [*zeros, *arguments[2:]]
        else:
            states = arguments[0]
            nothing = [dual_blocks.Mamba3States(*(None,) * 4), *arguments[1:]]
            zeros = [states._make(map(torch.zeros_like, states)), *arguments[1:]]
        for function in (operator, definition):
            for one, other in zip(function(sequence, *nothing), function(sequence, *zeros), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba3 of rank 3"])
def test_a_sequence_is_the_same_in_any_batch_and_on_any_number_of_threads(mixer):
    block, before = block_of(mixer), torch.get_num_threads()
    with torch.no_grad():
        operator, _, arguments = operator_and_arguments(block, 70, torch.float32)
        expected = operator(*arguments)
        try:
            for batch, threads in ((1, 1), (2, 3), (7, 2), (65, 3)):
                torch.set_num_threads(threads)
                found = operator(*first_rows(arguments, batch))
                assert all(torch.equal(one, other[:batch]) for one, other in zip(found, expected, strict=True))
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("case", ["gradients", "two positions", "a large batch", "another backend", "autocast"])
@pytest.mark.parametrize("mixer", ["mamba2", "mamba3"])
def test_other_cases_are_left_to_the_operators(mixer, case):
    block = block_of(mixer)
    sequence = torch.randn(65 if case == "a large batch" else 1, 2 if case == "two positions" else 1, WIDTH)
    with (
        torch.set_grad_enabled(case == "gradients"),
        use_backend("torch" if case == "another backend" else "native"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
    ):
        assert block.mixer.step(block.norm, sequence, None) is None


class Louder(RootMeanSquareNorm):
    """A norm with a forward of its own."""

    def forward(self, sequence):
        return 2 * super().forward(sequence)


def make_louder(path):
    def change(block):
        block.get_submodule(path).__class__ = Louder

    return change


def hook_on(path):
    def change(block):
        block.get_submodule(path).register_forward_hook(lambda _, __, outputs: outputs + 1)

    return change


def with_bias(block):
    layer = block.mixer.output_projection
    layer.bias = nn.Parameter(torch.ones(layer.out_features))


CHANGES = {
    "hook on a projection": ("mamba2", hook_on("mixer.input_projection")),
    "subclass of the norm after the gate": ("mamba2", make_louder("mixer.gate_norm")),
    "hook on the norm after the gate": ("mamba2", hook_on("mixer.gate_norm")),
    "hook on a projection of Mamba-3": ("mamba3", hook_on("mixer.output_projection")),
    "subclass of the norm of a matrix": ("mamba3", make_louder("mixer.output_matrix_norm")),
    "hook on the norm of a matrix": ("mamba3", hook_on("mixer.input_matrix_norm")),
    "a projection with a bias": ("mamba3", with_bias),
    "two epsilons": ("mamba3", lambda block: setattr(block.mixer.input_matrix_norm, "epsilon", 0.5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_called_when_it_steps(change):
    mixer, apply = CHANGES[change]
    block, sequence = block_of(mixer), normal(2, 2, WIDTH, dtype=torch.float32)
    with torch.no_grad():
        before, _ = block(sequence)
        apply(block)
        expected, _ = block(sequence)
        first, state = block(sequence[:, :1])
        second, _ = block(sequence[:, 1:], state)
    assert relative_error(expected, before) > 1e-3
    assert relative_error(torch.cat([first, second], dim=1), expected) < COMPLEX_FLOAT32


def test_a_step_follows_parameters_that_change():
    for mixer in ("mamba2", "mamba3"):
        block, piece = block_of(mixer), normal(1, 1, WIDTH, dtype=torch.float32)
        with torch.no_grad():
            block(piece)
            block.mixer.step_bias.add_(0.5)
            found, _ = block(piece)
        assert relative_error(found, block(piece)[0]) < COMPLEX_FLOAT32


@pytest.mark.parametrize("mixer", ["mamba2, odd sizes", "mamba3 of rank 3"])
def test_the_operator_passes_opcheck_and_refuses_gradients(mixer):
    operator, _, (sequence, *arguments) = operator_and_arguments(block_of(mixer), 2, torch.float32)
    name = "mamba2_step" if mixer.startswith("mamba2") else "mamba3_step"
    flat = [
        part for given in arguments for part in (given if hasattr(given, "_fields") else [given])
    ]  # named tuples are several arguments
    detached = [part.detach() if isinstance(part, torch.Tensor) else part for part in flat]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    registered = getattr(torch.ops.mambacore, name).default
    torch.library.opcheck(registered, (sequence, *detached), test_utils=tests)
    with pytest.raises(RuntimeError, match=f"{name} computes no gradients but one of its tensors requires one; call"):
        operator(sequence, *arguments)


def test_sizes_that_do_not_belong_together_are_refused():
    step, _, (sequence, *states, groups, epsilon, gate_epsilon, limits, parameters) = operator_and_arguments(
        block_of("mamba2, odd sizes"), 2, torch.float32
    )
    with torch.no_grad():
        for wrong in (0, -1, 3):
            with pytest.raises(ValueError, match=r"groups, .* heads, .* must be those of one block"):
                step(sequence, *states, wrong, epsilon, gate_epsilon, limits, parameters)
        for wrong in ((0.1,), (0.2, 0.1), (-1.0, 0.1)):
            with pytest.raises(ValueError, match="step_limits must be two increasing non-negative numbers"):
                step(sequence, *states, groups, epsilon, gate_epsilon, wrong, parameters)
        step, _, (sequence, states, choices, parameters) = operator_and_arguments(
            block_of("mamba3 of rank 3"), 2, torch.float32
        )
        for wrong in ({"groups": 0}, {"groups": 3}, {"angles": -1}, {"angles": 4}):
            with pytest.raises(ValueError, match=r"groups, .* angles and 6 states must be those of one block"):
                step(sequence, states, choices._replace(**wrong), parameters)
        with pytest.raises(ValueError, match="rank_inputs, rank_gates and rank_outputs must all be absent at rank 1"):
            step(sequence, states, choices, parameters._replace(rank_gates=None))
        with pytest.raises(ValueError, match=r"input_weight must have shape .* take the parameters of one block"):
            step(sequence, states, choices._replace(trapezoidal=False), parameters)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba3"])
def test_a_state_that_does_not_fit_is_refused(mixer):
    block = block_of(mixer)
    with torch.no_grad():
        _, of_one = block(normal(1, 1, WIDTH, dtype=torch.float32))
        for batch in (4, 7):
            with pytest.raises(ValueError, match=r"state.* must have shape"):
                block(normal(batch, 1, WIDTH, dtype=torch.float32), of_one)
    assert all(tensor.shape[0] == 1 for tensor in state_tensors(of_one))
