"""The chunked scans equal the reference, with all gradients; the operator keeps PyTorch's rules."""

import pytest
import torch

from gradients import gradients_of
from mambacore import use_backend
from mambacore.native_library import native_library
from mambacore.ssd import chunked, ssd_scan, ssd_scan_reference
from mambacore.ssd.chunked import CHUNK_ROWS
from mambacore.ssd.operator import _backward, _forward
from scan_cases import leaves, random_starts
from ssd_cases import REQUIRED, ssd_arguments
from tolerances import BFLOAT16, FLOAT32, FLOAT64, OF_DTYPE, PIECES_FLOAT64, relative_error

BACKENDS = ["native", "torch"]
BACKEND = pytest.mark.parametrize("backend", BACKENDS)
REVERSE = pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])


def backend_or_skip(name: str):
    if name == "native" and native_library() is None:
        pytest.skip("installed without the native library")
    return use_backend(name)


def scan_with_state(**arguments):
    return ssd_scan(**arguments, return_final_state=True)


def assert_equal(found, expected, tolerance):
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


SHAPES = {
    "one position": {"batch": 2, "length": 1},
    "63": {"batch": 1, "length": CHUNK_ROWS - 1, "heads": 3, "head_width": 17, "state_size": 9},
    "one chunk": {"batch": 1, "length": CHUNK_ROWS, "heads": 1, "head_width": 1, "state_size": 1},
    "one past a chunk": {"batch": 2, "length": CHUNK_ROWS + 1, "heads": 4, "head_width": 16, "state_size": 16},
    "groups": {"batch": 2, "length": 150, "heads": 6, "head_width": 8, "state_size": 33, "groups": 3},
    "a group for each head": {"batch": 1, "length": 130, "heads": 3, "head_width": 7, "groups": 3},
    "1000": {"batch": 1, "length": 1000, "heads": 2, "head_width": 4, "state_size": 16},
    "rank 4": {"batch": 2, "length": CHUNK_ROWS // 4 + 1, "heads": 2, "rank": 4},
    "rank 3, groups": {"batch": 1, "length": 100, "heads": 4, "groups": 2, "rank": 3, "state_size": 6},
    "rank 1": {"batch": 2, "length": 70, "rank": 1},
    "a rank above a chunk": {"batch": 1, "length": 3, "heads": 1, "rank": CHUNK_ROWS + 1},
}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@SHAPE
@BACKEND
@REVERSE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_scan_and_all_gradients_equal_the_reference(shape, dtype, reverse, backend):
    arguments = ssd_arguments(**shape)
    expected = gradients_of(ssd_scan_reference, arguments, torch.float64, reverse=reverse)
    with backend_or_skip(backend):
        found = gradients_of(scan_with_state, arguments, dtype, reverse=reverse)
    assert_equal(found, expected, OF_DTYPE[dtype])


@SHAPE
@BACKEND
@REVERSE
def test_records_do_not_see_each_other_with_all_gradients(shape, reverse, backend):
    arguments = ssd_arguments(**shape)
    starts = random_starts(shape["batch"], shape["length"], share=0.05)
    options = {"reverse": reverse, "sequence_starts": starts}
    expected = gradients_of(ssd_scan_reference, arguments, torch.float64, **options)
    with backend_or_skip(backend):
        found = gradients_of(scan_with_state, arguments, torch.float64, **options)
    assert_equal(found, expected, FLOAT64)


@BACKEND
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("present", [(), ("input_weight",), ("own_weight",), ("skip_weight",), ("initial_state",)],
                         ids=lambda names: "+".join(names) or "none")  # fmt: skip
def test_every_optional_argument_can_be_absent(present, rank, backend):
    everything = ssd_arguments(2, 70, rank=rank)
    arguments = {name: everything[name] for name in (*REQUIRED, *present)}
    expected = gradients_of(ssd_scan_reference, arguments, torch.float64)
    with backend_or_skip(backend):
        found = gradients_of(scan_with_state, arguments, torch.float64)
        assert torch.equal(ssd_scan(**arguments), found["outputs"])
    assert_equal(found, expected, FLOAT64)


@BACKEND
@REVERSE
def test_an_empty_sequence_hands_its_state_on(reverse, backend):
    arguments = ssd_arguments(2, 0)
    with backend_or_skip(backend):
        found = gradients_of(scan_with_state, arguments, torch.float64, reverse=reverse)
    assert found["outputs"].shape == arguments["inputs"].shape
    assert torch.equal(found["final_state"], arguments["initial_state"])
    assert found["initial_state"].abs().min() > 0
    without = {name: tensor for name, tensor in arguments.items() if name != "initial_state"}
    assert scan_with_state(**without)[1].abs().max() == 0


@BACKEND
@pytest.mark.parametrize("rank", [None, 2])
@REVERSE
def test_pieces_equal_the_whole_with_gradients_through_the_state(reverse, rank, backend):
    arguments = ssd_arguments(2, 150, rank=rank)

    def in_pieces(initial_state, skip_weight, **sequences):
        pieces = [
            dict(zip(sequences, parts, strict=True))
            for parts in zip(*(s.split([1, 70, 64, 15], 1) for s in sequences.values()), strict=True)
        ]
        state, outputs = initial_state, []
        for piece in reversed(pieces) if reverse else pieces:
            output, state = scan_with_state(**piece, skip_weight=skip_weight, initial_state=state, reverse=reverse)
            outputs.append(output)
        return torch.cat(outputs[::-1] if reverse else outputs, dim=1), state

    with backend_or_skip(backend):
        whole = gradients_of(scan_with_state, arguments, torch.float64, reverse=reverse)
        pieces = gradients_of(in_pieces, arguments, torch.float64)
    assert_equal(pieces, whole, PIECES_FLOAT64)


@BACKEND
def test_bfloat16_inputs_keep_a_float32_state(backend):
    arguments = {name: tensor.bfloat16().double() for name, tensor in ssd_arguments(2, 130, head_width=32).items()}
    expected = gradients_of(ssd_scan_reference, arguments, torch.float64)
    with backend_or_skip(backend):
        mixed = leaves(arguments, torch.float32)
        for name in ("inputs", "input_matrix", "output_matrix"):
            mixed[name] = arguments[name].bfloat16().requires_grad_()
        outputs, state = scan_with_state(**mixed)
    assert outputs.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert relative_error(outputs, expected["outputs"]) < BFLOAT16
    assert relative_error(state, expected["final_state"]) < BFLOAT16
    generator = torch.Generator().manual_seed(99)
    seeds = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (outputs, state)]
    grads = torch.autograd.grad([outputs, state], list(mixed.values()), seeds)
    for (name, argument), grad in zip(mixed.items(), grads, strict=True):
        assert grad.dtype == argument.dtype
        assert relative_error(grad, expected[name]) < 2 * BFLOAT16, name


@REVERSE
@pytest.mark.parametrize("with_starts", [False, True], ids=["one record", "records"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES.values() if shape.get("rank") is None])
def test_bfloat16_scans_of_any_shape_equal_the_reference(shape, with_starts, reverse):
    arguments = {name: tensor.bfloat16().double() for name, tensor in ssd_arguments(**shape).items()}
    starts = random_starts(shape["batch"], shape["length"], share=0.05) if with_starts else None
    options = {"reverse": reverse, "sequence_starts": starts}
    mixed = {name: tensor.float() for name, tensor in arguments.items()}
    # Rows with a stride: what is beside them in memory must not be read, nor anything be written there.
    for name in ("inputs", "input_matrix", "output_matrix"):
        beside = torch.full_like(arguments[name], torch.nan)
        mixed[name] = torch.cat([arguments[name], beside], dim=-1).bfloat16()[..., : arguments[name].shape[-1]]
    with backend_or_skip("native"):
        found = scan_with_state(**mixed, **options)
    expected = ssd_scan_reference(**arguments, **options)
    for name, one, other in zip(("outputs", "state"), found, expected, strict=True):
        assert relative_error(one, other) < BFLOAT16, name


@pytest.mark.parametrize("sign", [-1, 1], ids=["fading", "growing"])
def test_bfloat16_scans_with_strong_decays_equal_the_reference(sign):
    """Those of single positions are up to exp(-40); a chunk of growing states reaches exp(30)."""
    arguments = {name: tensor.bfloat16().double() for name, tensor in ssd_arguments(1, 200, head_width=16).items()}
    arguments["log_decay"] = sign * arguments["log_decay"].abs() * 0.1
    if sign < 0:
        arguments["log_decay"][:, 5::17] = -40.0
    arguments["log_decay"] = arguments["log_decay"].float().double()
    mixed = {name: tensor.float() for name, tensor in arguments.items()}
    for name in ("inputs", "input_matrix", "output_matrix"):
        mixed[name] = arguments[name].bfloat16()
    with backend_or_skip("native"):
        found = scan_with_state(**mixed)
    expected = ssd_scan_reference(**arguments)
    for name, one, other in zip(("outputs", "state"), found, expected, strict=True):
        assert relative_error(one, other) < BFLOAT16, name


@BACKEND
def test_no_gradient_reaches_an_output_from_a_later_input(backend):
    arguments = leaves(ssd_arguments(1, 130), torch.float64)
    with backend_or_skip(backend):
        ssd_scan(**arguments)[:, 70].sum().backward()
    for name in ("inputs", "log_decay", "input_matrix", "output_matrix", "own_weight"):
        grad = arguments[name].grad
        assert grad[:, 71:].abs().max() == 0 and grad[:, 70].abs().max() > 0, name


@BACKEND
def test_decays_that_leave_nothing_do_not_blur_those_that_leave_nearly_everything(backend):
    """Sums of logarithms reach -10^5 inside a chunk, of which single ones of -0.01 are differences."""
    arguments = ssd_arguments(1, 100)
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], -0.01)
    arguments["log_decay"][:, 3:40:4] = -1e4
    expected = gradients_of(ssd_scan_reference, arguments, torch.float64)
    with backend_or_skip(backend):
        found = gradients_of(scan_with_state, arguments, torch.float32)
    assert_equal(found, expected, FLOAT32)


@BACKEND
def test_a_growing_state_does_not_overflow_in_the_masked_half(backend):
    """Above the diagonal the exponentials of a decay of -200 would be those of +200 times the distance."""
    arguments = ssd_arguments(1, 64)
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], -200.0)
    with backend_or_skip(backend):
        found = gradients_of(scan_with_state, arguments, torch.float32)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


@BACKEND
def test_strided_inputs_give_the_same_as_copies(backend):
    arguments = ssd_arguments(2, 90, heads=4, head_width=8, state_size=8)
    wide = torch.cat([arguments["inputs"].flatten(2), arguments["input_matrix"].flatten(2),
                      arguments["output_matrix"].flatten(2)], dim=-1)  # fmt: skip
    with backend_or_skip(backend):
        expected = ssd_scan(**arguments)
        inputs, into, out_of = wide.split([32, 8, 8], dim=-1)
        strided = {"inputs": inputs.unflatten(-1, (4, 8)), "input_matrix": into.unflatten(-1, (1, 8)),
                   "output_matrix": out_of.unflatten(-1, (1, 8))}  # fmt: skip
        assert torch.equal(ssd_scan(**arguments | strided), expected)


def test_blocks_of_chunks_of_any_size_give_the_same(monkeypatch):
    arguments = ssd_arguments(1, 300)
    with use_backend("torch"):
        whole = gradients_of(scan_with_state, arguments, torch.float64)
        monkeypatch.setattr(chunked, "_MASK_ELEMENTS", 1)
        assert_equal(gradients_of(scan_with_state, arguments, torch.float64), whole, FLOAT64)
        monkeypatch.setattr(chunked, "CHUNK_ROWS", 7)
        assert_equal(gradients_of(scan_with_state, arguments, torch.float64), whole, FLOAT64)


@pytest.mark.parametrize("rank", [None, 2])
def test_gradcheck(rank):
    arguments = leaves(ssd_arguments(1, 9, heads=2, head_width=2, state_size=3, rank=rank), torch.float64)
    names = list(arguments)
    starts = torch.zeros(1, 9, dtype=torch.bool)
    starts[0, 4] = True

    def function(*tensors):
        return ssd_scan(**dict(zip(names, tensors, strict=True)), return_final_state=True, sequence_starts=starts)

    assert torch.autograd.gradcheck(function, tuple(arguments.values()))


@BACKEND
def test_opcheck(backend):
    arguments = leaves(ssd_arguments(2, 70, rank=None), torch.float32)
    given = (*arguments.values(), None, False, True)
    resets = torch.zeros(2, 70, dtype=torch.bool)
    with backend_or_skip(backend):
        torch.library.opcheck(_forward, given)
        torch.library.opcheck(_forward, (*list(arguments.values())[:4], arguments["input_weight"], None, None, None,
                                         resets, True, True))  # fmt: skip
        outputs, state, boundaries = _forward(*given)
        plain = [tensor.detach() for tensor in arguments.values()]
        torch.library.opcheck(
            _backward, (torch.ones_like(outputs), torch.ones_like(state), *plain, resets, False, boundaries.detach())
        )


@BACKEND
def test_results_repeat_bit_for_bit(backend):
    arguments = ssd_arguments(2, 300, heads=4, head_width=16, state_size=16)
    with backend_or_skip(backend):
        first, again = (gradients_of(scan_with_state, arguments, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_compiled_scan_equals_itself():
    arguments = leaves(ssd_arguments(1, 70), torch.float32)
    outputs = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")(**arguments)
    assert torch.equal(outputs, ssd_scan(**arguments))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"inputs": (2, 9, 10)}, r"inputs must be \(batch, length, heads, head_width\) or .* shape \(2, 9, 10\)"),
        ({"log_decay": (2, 9, 3)}, r"log_decay must have shape \(2, 9, 2\) to fit the inputs but has \(2, 9, 3\)"),
        ({"input_matrix": (2, 9, 3, 4)}, "groups that divide the 2 heads but has shape"),
        ({"input_matrix": (2, 8, 1, 4)}, "input_matrix must be"),
        ({"output_matrix": (2, 9, 1, 5)}, "output_matrix must have the shape of input_matrix"),
        ({"skip_weight": (5,)}, "skip_weight must have shape"),
        ({"initial_state": (2, 2, 4, 5)}, "initial_state must have shape"),
        ({"own_weight": (2, 9)}, "own_weight must have shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(change, problem):
    arguments = ssd_arguments(2, 9) | {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=problem):
        ssd_scan(**arguments)


def test_types_that_do_not_fit_are_refused_by_name():
    arguments = ssd_arguments(1, 5)
    with pytest.raises(TypeError, match="inputs must be float32, bfloat16, float16 or float64"):
        ssd_scan(**arguments | {"inputs": arguments["inputs"].long()})
    with pytest.raises(TypeError, match="sequence_starts must be boolean"):
        ssd_scan(**arguments, sequence_starts=torch.zeros(1, 5))


@pytest.mark.skipif(native_library() is None, reason="installed without the native library")
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_the_reference(instruction_set):
    native = native_library()
    before = native.instruction_set
    try:
        native.use_instruction_set(instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        arguments = ssd_arguments(1, 130, heads=4, head_width=37, state_size=11, groups=2)
        expected = gradients_of(ssd_scan_reference, arguments, torch.float64)
        for dtype in (torch.float32, torch.float64):
            assert_equal(gradients_of(scan_with_state, arguments, dtype), expected, OF_DTYPE[dtype])
    finally:
        native.use_instruction_set(before)


@pytest.mark.skipif(native_library() is None, reason="installed without the native library")
@REVERSE
def test_threads_agree_and_repeat_bit_for_bit(reverse):
    arguments = ssd_arguments(1, 2000, heads=6, head_width=32, state_size=32, groups=2)  # enough for every thread
    before, results = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results[threads], again = (
                gradients_of(scan_with_state, arguments, torch.float32, reverse=reverse) for _ in range(2)
            )
            assert all(torch.equal(results[threads][name], again[name]) for name in again)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 5):
        assert_equal(results[threads], results[1], FLOAT32)
