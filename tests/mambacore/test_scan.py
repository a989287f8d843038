"""The fast scans equal the reference, with all gradients; the operator keeps PyTorch's rules."""

import pytest
import torch

from gradients import gradients_of
from mambacore import selective_scan, use_backend
from mambacore.layout import INTERVAL
from mambacore.native_library import native_library
from mambacore.scan import selective_scan_reference
from scan_cases import leaves, scan_arguments
from tolerances import FLOAT32, FLOAT64, OF_DTYPE, PIECES_FLOAT64, relative_error

BACKENDS = ["native", "torch"]
needs_native = pytest.mark.skipif(native_library() is None, reason="installed without the native library")


def backend_or_skip(name: str):
    if name == "native" and native_library() is None:
        pytest.skip("installed without the native library")
    return use_backend(name)


def scan_with_state(**arguments):
    return selective_scan(**arguments, return_final_state=True)


SHAPES = {
    "one position": (2, 1, 16, 16, 1),
    "one short of an interval": (1, INTERVAL - 1, 24, 5, 2),
    "one interval": (1, INTERVAL, 5, 1, 1),
    "one past an interval": (2, INTERVAL + 1, 20, 16, 1),
    "ragged channels, odd states": (1, 200, 7, 13, 1),
    "groups": (2, 150, 48, 8, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_scan_and_all_gradients_equal_the_reference(shape, dtype, reverse, backend):
    batch, length, channels, state_size, groups = shape
    arguments = scan_arguments(batch, length, channels, state_size, groups)
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, step_softplus=True, reverse=reverse)
    with backend_or_skip(backend):
        found = gradients_of(scan_with_state, arguments, dtype, step_softplus=True, reverse=reverse)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < OF_DTYPE[dtype], errors


@needs_native
@pytest.mark.parametrize("length", [1000, 1024, 1025])
def test_native_scan_equals_the_reference_at_length(length):
    arguments = scan_arguments(1, length, 32, 16)
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, step_softplus=True)
    found = gradients_of(scan_with_state, arguments, torch.float32, step_softplus=True)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < FLOAT32, errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_inputs_keep_a_float32_state(backend):
    arguments = {name: tensor.bfloat16().double() for name, tensor in scan_arguments(2, 130, 20, 8).items()}
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, step_softplus=True)
    mixed = {name: tensor.float() for name, tensor in arguments.items()}
    with backend_or_skip(backend):
        inputs = {name: tensor.clone().requires_grad_() for name, tensor in mixed.items()}
        for name in ("inputs", "step_size", "gate"):
            inputs[name] = mixed[name].bfloat16().requires_grad_()
        outputs, state = scan_with_state(**inputs, step_softplus=True)
    assert outputs.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert relative_error(outputs, expected["outputs"]) < OF_DTYPE[torch.bfloat16]
    assert relative_error(state, expected["final_state"]) < FLOAT32
    torch.autograd.backward([outputs, state], [torch.ones_like(outputs), torch.ones_like(state)])
    assert inputs["inputs"].grad.dtype == torch.bfloat16 and inputs["state_matrix"].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "present",
    [(), ("gate",), ("skip_weight",), ("step_bias",), ("initial_state",), ("gate", "initial_state")],
    ids=lambda names: "+".join(names) or "none",
)
def test_every_optional_argument_can_be_absent(present, backend):
    arguments = scan_arguments(1, 70, 18, 4, everything=False)
    everything = scan_arguments(1, 70, 18, 4)
    arguments |= {name: everything[name] for name in present}
    arguments["step_size"] = arguments["step_size"].abs()
    expected = gradients_of(selective_scan_reference, arguments, torch.float64)
    with backend_or_skip(backend):
        found = gradients_of(scan_with_state, arguments, torch.float64)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < FLOAT64, errors


def test_matrices_without_groups_and_a_single_return_value():
    arguments = scan_arguments(2, 20, 6, 3, everything=False)
    expected = selective_scan(**arguments)
    without_groups = {**arguments, "input_matrix": arguments["input_matrix"][:, :, 0]}
    assert torch.equal(selective_scan(**without_groups), expected)


@needs_native
def test_strided_inputs_give_the_same_as_copies():
    arguments = scan_arguments(2, 90, 32, 8, everything=False)
    expected = selective_scan(**arguments, step_softplus=True)
    wide = torch.cat([arguments["inputs"], arguments["step_size"]], dim=-1)
    arguments["inputs"], arguments["step_size"] = wide.chunk(2, dim=-1)
    assert torch.equal(selective_scan(**arguments, step_softplus=True), expected)
    arguments["inputs"] = arguments["inputs"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(selective_scan(**arguments, step_softplus=True), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
def test_pieces_equal_the_whole_with_gradients_through_the_state(backend, reverse):
    arguments = scan_arguments(2, 150, 10, 4)

    def in_pieces(initial_state, skip_weight, step_bias, state_matrix, **sequences):
        pieces = [
            dict(zip(sequences, parts, strict=True))
            for parts in zip(*(s.split([1, 70, 64, 15], 1) for s in sequences.values()), strict=True)
        ]
        state, outputs = initial_state, []
        for piece in reversed(pieces) if reverse else pieces:
            output, state = scan_with_state(
                **piece, state_matrix=state_matrix, skip_weight=skip_weight, step_bias=step_bias, initial_state=state,
                step_softplus=True, reverse=reverse,
            )  # fmt: skip
            outputs.append(output)
        return torch.cat(outputs[::-1] if reverse else outputs, dim=1), state

    with backend_or_skip(backend):
        whole = gradients_of(scan_with_state, arguments, torch.float64, step_softplus=True, reverse=reverse)
        pieces = gradients_of(in_pieces, arguments, torch.float64)
    errors = {name: relative_error(pieces[name], whole[name]) for name in whole}
    assert max(errors.values()) < PIECES_FLOAT64, errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_reaches_an_output_from_a_later_input(backend):
    arguments = leaves(scan_arguments(1, 130, 4, 3), torch.float64)
    with backend_or_skip(backend):
        outputs = selective_scan(**arguments, step_softplus=True)
        outputs[:, 70].sum().backward()
    for name in ("inputs", "step_size", "input_matrix", "output_matrix", "gate"):
        grad = arguments[name].grad
        assert grad[:, 71:].abs().max() == 0 and grad[:, 70].abs().max() > 0, name


@needs_native
@pytest.mark.parametrize("channels", [256, 16], ids=["threads over channels", "threads over the length"])
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
def test_threads_agree_and_repeat_bit_for_bit(channels, reverse):
    arguments = scan_arguments(1, 4000, channels, 8)  # enough for every thread to be used
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results[threads] = gradients_of(
                scan_with_state, arguments, torch.float32, step_softplus=True, reverse=reverse
            )
            again = gradients_of(scan_with_state, arguments, torch.float32, step_softplus=True, reverse=reverse)
            assert all(torch.equal(results[threads][name], again[name]) for name in again)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 5):
        errors = {name: relative_error(results[threads][name], results[1][name]) for name in results[1]}
        assert max(errors.values()) < FLOAT32, errors


@needs_native
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_the_reference(instruction_set):
    native = native_library()
    before = native.instruction_set
    try:
        native.use_instruction_set(instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        arguments = scan_arguments(1, 130, 37, 11)
        for dtype in (torch.float32, torch.float64):
            expected = gradients_of(selective_scan_reference, arguments, torch.float64, step_softplus=True)
            found = gradients_of(scan_with_state, arguments, dtype, step_softplus=True)
            errors = {name: relative_error(found[name], expected[name]) for name in expected}
            assert max(errors.values()) < OF_DTYPE[dtype], errors
    finally:
        native.use_instruction_set(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_where_it_belongs(backend):
    arguments = scan_arguments(1, 100, 20, 4)
    arguments["inputs"][0, 40, 3] = float("nan")
    with backend_or_skip(backend):
        outputs = selective_scan(**{name: tensor.float() for name, tensor in arguments.items()}, step_softplus=True)
    assert torch.isnan(outputs[0, 40:, 3]).all()
    assert torch.isfinite(outputs[0, :40]).all() and torch.isfinite(outputs[0, :, 4:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_steps_stay_finite(backend):
    arguments = scan_arguments(1, 64, 16, 4)
    arguments["step_size"] = (
        torch.linspace(-200, 200, 64, dtype=torch.float64)[None, :, None].expand(1, 64, 16).contiguous()
    )
    with backend_or_skip(backend):
        found = gradients_of(scan_with_state, arguments, torch.float32, step_softplus=True)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequence_hands_the_state_through(backend):
    arguments = scan_arguments(2, 0, 6, 3)
    with backend_or_skip(backend):
        outputs, state = scan_with_state(**arguments)
    assert outputs.shape == (2, 0, 6) and torch.equal(state, arguments["initial_state"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    arguments = leaves(scan_arguments(1, 5, 3, 2), torch.float64)
    names = list(arguments)

    def function(*tensors):
        return scan_with_state(**dict(zip(names, tensors, strict=True)), step_softplus=True)

    with backend_or_skip(backend):
        assert torch.autograd.gradcheck(function, tuple(arguments.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("everything", [True, False], ids=["all arguments", "required arguments"])
def test_operator_passes_opcheck(everything, backend):
    arguments = leaves(scan_arguments(1, 70, 8, 4, everything=everything), torch.float32)
    optional = [arguments.get(name) for name in ("skip_weight", "gate", "step_bias", "initial_state")]
    required = [arguments[name] for name in ("inputs", "step_size", "state_matrix", "input_matrix", "output_matrix")]
    with backend_or_skip(backend):
        torch.library.opcheck(
            torch.ops.mambacore.selective_scan_forward.default, (*required, *optional, None, True, False, True)
        )


def test_compiles_into_one_graph_with_equal_gradients():
    arguments = scan_arguments(1, 70, 8, 4)

    def function(**tensors):
        return scan_with_state(**tensors, step_softplus=True)

    expected = gradients_of(function, arguments, torch.float32)
    found = gradients_of(torch.compile(function, fullgraph=True, backend="aot_eager"), arguments, torch.float32)
    assert all(relative_error(found[name], expected[name]) < FLOAT32 for name in expected)


BAD_SHAPES = {
    "inputs": ((2, 5), "inputs must be"),
    "step_size": ((1, 5, 5), "step_size must have shape"),
    "state_matrix": ((5, 3), "state_matrix must be"),
    "input_matrix": ((1, 5, 4, 3), "input_matrix must be"),
    "output_matrix": ((1, 4, 3), "output_matrix must be"),
    "skip_weight": ((5,), "skip_weight must have shape"),
    "gate": ((1, 5), "gate must have shape"),
    "initial_state": ((1, 3, 6), "initial_state must have shape"),
}


@pytest.mark.parametrize(("name", "shape", "message"), [(k, *v) for k, v in BAD_SHAPES.items()], ids=BAD_SHAPES)
def test_shapes_that_do_not_fit_are_named(name, shape, message):
    arguments = scan_arguments(1, 5, 6, 3)
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**arguments, name: torch.zeros(shape, dtype=torch.float64)})


def test_unsupported_dtype_is_named():
    arguments = scan_arguments(1, 5, 6, 3)
    with pytest.raises(TypeError, match="int32"):
        selective_scan(**{**arguments, "inputs": arguments["inputs"].int()})
