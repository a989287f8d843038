"""Complex states, matrices that do not depend on time, and several records in a row: all equal the reference."""

import pytest
import torch

from gradients import gradients_of
from mambacore import selective_scan, use_backend
from mambacore.layout import INTERVAL
from mambacore.native_library import native_library
from mambacore.packing import starts_from_cumulative_lengths, starts_from_lengths
from mambacore.scan import selective_scan_reference
from scan_cases import complex_scan_arguments, leaves, random_starts, scan_arguments, time_invariant
from tolerances import COMPLEX_FLOAT32, FLOAT64, LONG_PHASE_FLOAT32, OF_DTYPE, PIECES_FLOAT64, relative_error

BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(native_library() is None, reason="no native library")),
    "torch",
]
CASES = {"real": scan_arguments, "complex": complex_scan_arguments}
MATRICES = {
    "both change": (),
    "input fixed": ("input_matrix",),
    "output fixed": ("output_matrix",),
    "both fixed": ("input_matrix", "output_matrix"),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def scan_with_state(**arguments):
    return selective_scan(**arguments, return_final_state=True)


def assert_equal(found, expected, tolerance):
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("fixed", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("packed", [False, True], ids=["one record", "many records"])
def test_scan_and_all_gradients_equal_the_reference(case, fixed, dtype, reverse, packed, backend):
    batch, length = 2, INTERVAL + 7
    arguments = time_invariant(case(batch, length, 21, 6, groups=1 if fixed else 3), fixed)
    options = {"step_softplus": True, "reverse": reverse}
    if packed:
        options["sequence_starts"] = random_starts(batch, length, share=0.1)
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, **options)
    with use_backend(backend):
        found = gradients_of(scan_with_state, arguments, dtype, **options)
    assert_equal(found, expected, OF_DTYPE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 63, 1000, 1025])
def test_complex_scan_equals_the_reference_at_length(length, backend):
    arguments = complex_scan_arguments(1, length, 17, 16)
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, step_softplus=True)
    with use_backend(backend):
        found = gradients_of(scan_with_state, arguments, torch.float32, step_softplus=True)
    assert_equal(found, expected, COMPLEX_FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fixed", [(), ("input_matrix", "output_matrix")], ids=["both change", "both fixed"])
def test_gradcheck_of_a_complex_packed_scan(fixed, backend):
    arguments = time_invariant(complex_scan_arguments(2, 5, 3, 2), fixed)
    names = list(arguments)
    starts = torch.tensor([[False, False, True, False, False], [True, False, False, True, True]])

    def function(*tensors):
        outputs, state = scan_with_state(
            **dict(zip(names, tensors, strict=True)), step_softplus=True, sequence_starts=starts
        )
        return outputs, torch.view_as_real(state)

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, tuple(leaves(arguments, torch.float64).values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fixed", [(), ("input_matrix", "output_matrix")], ids=["both change", "both fixed"])
def test_complex_packed_operator_passes_opcheck(fixed, backend):
    arguments = leaves(time_invariant(complex_scan_arguments(1, 70, 8, 4), fixed), torch.float32)
    starts = random_starts(1, 70)
    with use_backend(backend):
        torch.library.opcheck(
            torch.ops.mambacore.selective_scan_forward.default, (*_in_order(arguments), starts, True, False, True)
        )


def _in_order(arguments):
    names = ("inputs", "step_size", "state_matrix", "input_matrix", "output_matrix", "skip_weight", "gate", "step_bias",
             "initial_state")  # fmt: skip
    return [arguments[name] for name in names]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_record_does_not_depend_on_its_neighbours(case, reverse, backend):
    lengths, length = [1, 63, 70, 5], 160
    arguments = case(1, length, 5, 3)
    del arguments["initial_state"]
    starts = starts_from_lengths([lengths], length)
    sequences = ("inputs", "step_size", "input_matrix", "output_matrix", "gate")
    with use_backend(backend):
        packed = selective_scan(**arguments, step_softplus=True, reverse=reverse, sequence_starts=starts)
        begin = 0
        for record_length in lengths:
            record = slice(begin, begin + record_length)
            alone = {name: tensor[:, record] if name in sequences else tensor for name, tensor in arguments.items()}
            expected = selective_scan(**alone, step_softplus=True, reverse=reverse)
            assert relative_error(packed[:, record], expected) < FLOAT64
            begin += record_length


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
def test_what_is_not_a_number_stays_in_its_record(reverse, backend):
    arguments = scan_arguments(1, 100, 20, 4)
    arguments["inputs"][0, 40, 3] = float("nan")
    inputs = {name: tensor.float().requires_grad_() for name, tensor in arguments.items()}
    starts = starts_from_lengths([[30, 30, 40]], 100)
    with use_backend(backend):
        outputs = selective_scan(**inputs, step_softplus=True, reverse=reverse, sequence_starts=starts)

    def others(tensor):
        return torch.cat([tensor[0, :30], tensor[0, 60:]])

    assert torch.isfinite(others(outputs)).all() and torch.isnan(outputs[0, 40, 3])
    others(outputs).sum().backward()
    for name in ("inputs", "step_size", "input_matrix", "output_matrix", "gate"):
        assert torch.isfinite(others(inputs[name].grad)).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_packed_pieces_equal_the_whole_with_gradients_through_the_state(backend):
    arguments = complex_scan_arguments(2, 150, 10, 4)
    starts = random_starts(2, 150, share=0.05)

    def in_pieces(initial_state, skip_weight, step_bias, state_matrix, **sequences):
        pieces = zip(*(tensor.split([1, 70, 64, 15], 1) for tensor in (starts, *sequences.values())), strict=True)
        state, outputs = initial_state, []
        for starts_here, *parts in pieces:
            output, state = scan_with_state(
                **dict(zip(sequences, parts, strict=True)), state_matrix=state_matrix, skip_weight=skip_weight,
                step_bias=step_bias, initial_state=state, step_softplus=True, sequence_starts=starts_here,
            )  # fmt: skip
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    with use_backend(backend):
        whole = gradients_of(scan_with_state, arguments, torch.float64, step_softplus=True, sequence_starts=starts)
        pieces = gradients_of(in_pieces, arguments, torch.float64)
    assert_equal(pieces, whole, PIECES_FLOAT64)


@pytest.mark.skipif(native_library() is None, reason="no native library")
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_threads_over_the_length_agree_on_packed_records(case, reverse):
    arguments, starts = case(1, 4000, 16, 8), random_starts(1, 4000, share=0.002)
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            results[threads] = gradients_of(
                scan_with_state, arguments, torch.float64, step_softplus=True, reverse=reverse, sequence_starts=starts
            )
    finally:
        torch.set_num_threads(before)
    assert_equal(results[5], results[1], FLOAT64)


@pytest.mark.skipif(native_library() is None, reason="no native library")
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_the_complex_reference(instruction_set):
    native = native_library()
    before = native.instruction_set
    try:
        native.use_instruction_set(instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for fixed in MATRICES.values():
            arguments = time_invariant(complex_scan_arguments(1, 130, 37, 11), fixed)
            for dtype in (torch.float32, torch.float64):
                expected = gradients_of(selective_scan_reference, arguments, torch.float64, step_softplus=True)
                found = gradients_of(scan_with_state, arguments, dtype, step_softplus=True)
                assert_equal(found, expected, OF_DTYPE[dtype])
    finally:
        native.use_instruction_set(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_inputs_keep_a_complex64_state(backend):
    arguments = complex_scan_arguments(2, 130, 20, 8)
    inputs = leaves(arguments, torch.float32)
    for name in ("inputs", "step_size", "gate"):
        arguments[name] = arguments[name].bfloat16().double()
        inputs[name] = arguments[name].bfloat16().requires_grad_()
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, step_softplus=True)
    with use_backend(backend):
        outputs, state = scan_with_state(**inputs, step_softplus=True)
    assert outputs.dtype == torch.bfloat16 and state.dtype == torch.complex64
    assert relative_error(outputs, expected["outputs"]) < OF_DTYPE[torch.bfloat16]
    assert relative_error(state, expected["final_state"]) < OF_DTYPE[torch.float32]
    outputs.float().sum().backward()
    assert inputs["state_matrix"].grad.dtype == torch.complex64 and inputs["inputs"].grad.dtype == torch.bfloat16


def test_a_complex_matrix_with_a_real_state_is_refused():
    arguments = scan_arguments(1, 4, 2, 3)
    arguments["input_matrix"] = arguments["input_matrix"].to(torch.complex128)
    with pytest.raises(TypeError, match="input_matrix is complex but state_matrix is real"):
        selective_scan(**arguments)


def test_starts_of_another_shape_or_dtype_are_refused():
    arguments = scan_arguments(1, 4, 2, 3)
    with pytest.raises(ValueError, match="sequence_starts must have shape"):
        selective_scan(**arguments, sequence_starts=torch.zeros(1, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="sequence_starts must be boolean"):
        selective_scan(**arguments, sequence_starts=torch.zeros(1, 4))


def test_starts_from_lengths():
    starts = starts_from_lengths([[2, 1], [4], []], 4)
    assert starts.tolist() == [[True, False, True, True], [True, False, False, False], [True, False, False, False]]
    assert torch.equal(starts_from_cumulative_lengths(torch.tensor([0, 2, 3]), 4), starts[:1])
    with pytest.raises(ValueError, match="row 0 has records"):
        starts_from_lengths([[3, 2]], 4)
    with pytest.raises(ValueError, match="must begin with 0"):
        starts_from_cumulative_lengths(torch.tensor([1, 2]), 4)


@pytest.mark.skipif(native_library() is None, reason="no native library")
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
def test_a_state_that_turns_thousands_of_times_is_the_same_in_segments(reverse):
    """Over a segment of 65,536 positions the state turns 40,000 times; what counts is the fraction."""
    length, channels = 1 << 18, 2
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "inputs": torch.randn(1, length, channels, generator=generator),
        "step_size": torch.rand(1, length, channels, generator=generator) * 0.15,
        "state_matrix": torch.complex(torch.full((channels, 1), -1e-5), torch.full((channels, 1), 50.0)),
        "input_matrix": torch.ones(channels, 1, dtype=torch.complex64),
        "output_matrix": torch.ones(channels, 1, dtype=torch.complex64),
    }
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(gradients_of(scan_with_state, arguments, torch.float32, reverse=reverse))
    finally:
        torch.set_num_threads(before)
    alone, in_segments = results
    errors = {name: relative_error(in_segments[name], alone[name]) for name in ("outputs", "final_state", "inputs")}
    assert max(errors.values()) < LONG_PHASE_FLOAT32, errors
