"""The causal convolution equals its reference, with all gradients and states."""

import pytest
import torch

from mambacore import causal_convolution, use_backend
from mambacore.convolution import causal_convolution_reference
from mambacore.native_library import native_library
from mambacore.packing import starts_from_lengths
from scan_cases import leaves, random_starts
from tolerances import FLOAT32, FLOAT64, OF_DTYPE, PIECES_FLOAT64, relative_error

BACKENDS = [
    pytest.param(
        "native", marks=pytest.mark.skipif(native_library() is None, reason="installed without the native library")
    ),
    "torch",
]


def arguments(batch, length, channels, kernel_width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "inputs": (batch, length, channels),
        "weight": (channels, kernel_width),
        "bias": (channels,),
        "initial_state": (batch, kernel_width - 1, channels),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def with_state(**tensors):
    return causal_convolution(**tensors, return_final_state=True)


def gradients_of(function, tensors, dtype, **options):
    inputs = leaves(tensors, dtype)
    outputs, state = function(**inputs, **options)
    generator = torch.Generator().manual_seed(9)
    seeds = [torch.randn(part.shape, generator=generator, dtype=torch.float64).to(dtype) for part in (outputs, state)]
    grads = torch.autograd.grad(
        [outputs, state], list(inputs.values()), seeds, allow_unused=True, materialize_grads=True
    )
    return dict(zip(["outputs", "final_state", *inputs], [outputs, state, *grads], strict=True))


SHAPES = [(2, 130, 20, 4), (1, 64, 16, 4), (1, 65, 5, 2), (2, 2, 7, 4), (1, 1, 16, 4), (1, 100, 9, 1), (1, 3000, 40, 5)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_states_and_gradients_equal_the_reference(shape, silu, reverse, backend):
    tensors = arguments(*shape)
    expected = gradients_of(causal_convolution_reference, tensors, torch.float64, silu=silu, reverse=reverse)
    for dtype in (torch.float64, torch.float32):
        with use_backend(backend):
            found = gradients_of(with_state, tensors, dtype, silu=silu, reverse=reverse)
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert max(errors.values()) < OF_DTYPE[dtype], errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_rounded_once(backend):
    tensors = {name: tensor.bfloat16().double() for name, tensor in arguments(1, 80, 24, 4).items()}
    expected, _ = causal_convolution_reference(**tensors, silu=True)
    with use_backend(backend):
        found = causal_convolution(
            tensors["inputs"].bfloat16(), tensors["weight"].float(), tensors["bias"].float(), silu=True,
            initial_state=tensors["initial_state"].bfloat16(),
        )  # fmt: skip
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < OF_DTYPE[torch.bfloat16] / 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_records_equal_the_reference(shape, reverse, backend):
    tensors, starts = arguments(*shape), random_starts(*shape[:2], share=0.1)
    options = {"silu": True, "reverse": reverse, "sequence_starts": starts}
    expected = gradients_of(causal_convolution_reference, tensors, torch.float64, **options)
    for dtype in (torch.float64, torch.float32):
        with use_backend(backend):
            found = gradients_of(with_state, tensors, dtype, **options)
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert max(errors.values()) < OF_DTYPE[dtype], errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
def test_a_record_does_not_depend_on_its_neighbours(reverse, backend):
    lengths, length = [1, 2, 63, 40, 3], 120
    tensors = arguments(1, length, 6, 4)
    tensors["inputs"][0, 70] = float("nan")
    inputs = tensors["inputs"].requires_grad_()
    options = {"weight": tensors["weight"], "bias": tensors["bias"], "silu": True, "reverse": reverse}
    with use_backend(backend):
        packed = causal_convolution(inputs, **options, sequence_starts=starts_from_lengths([lengths], length))
        begin = 0
        for record_length in lengths:
            record = inputs[:, begin : begin + record_length]
            expected = causal_convolution(record, **options)
            found = packed[:, begin : begin + record_length]
            assert torch.allclose(found, expected, rtol=0, atol=FLOAT64, equal_nan=True)
            begin += record_length
        packed[:, :66].sum().backward()
    assert torch.isfinite(inputs.grad[:, :66]).all() and (inputs.grad[:, 66] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["one record", "many records"])
def test_pieces_equal_the_whole_with_gradients_through_the_state(packed, backend):
    tensors = arguments(2, 50, 6, 4)

    starts = random_starts(2, 50, share=0.1) if packed else torch.zeros(2, 50, dtype=torch.bool)

    def in_pieces(inputs, weight, bias, initial_state):
        state, outputs = initial_state, []
        for piece, starts_here in zip(*(whole.split([1, 2, 40, 7], dim=1) for whole in (inputs, starts)), strict=True):
            output, state = causal_convolution(
                piece, weight, bias, True, state, return_final_state=True, sequence_starts=starts_here
            )
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    with use_backend(backend):
        whole = gradients_of(with_state, tensors, torch.float64, silu=True, sequence_starts=starts)
        pieces = gradients_of(in_pieces, tensors, torch.float64)
    errors = {name: relative_error(pieces[name], whole[name]) for name in whole}
    assert max(errors.values()) < PIECES_FLOAT64, errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_opcheck(backend):
    tensors = leaves(arguments(1, 5, 3, 3), torch.float64)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda *parts: with_state(**dict(zip(tensors, parts, strict=True)), silu=True), tuple(tensors.values())
        )
        operator = torch.ops.mambacore.causal_convolution_forward.default
        torch.library.opcheck(operator, (*tensors.values(), None, True, False))
        torch.library.opcheck(operator, (tensors["inputs"], tensors["weight"], None, None, None, False, True))


def test_compiles_into_one_graph_with_equal_gradients():
    tensors = arguments(1, 70, 8, 4)

    def function(**parts):
        return with_state(**parts, silu=True)

    expected = gradients_of(function, tensors, torch.float32)
    found = gradients_of(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, torch.float32)
    assert all(relative_error(found[name], expected[name]) < FLOAT32 for name in expected)


@pytest.mark.skipif(native_library() is None, reason="installed without the native library")
def test_results_repeat_bit_for_bit():
    tensors = arguments(1, 5000, 64, 4)
    first, second = (gradients_of(with_state, tensors, torch.float32, silu=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(2, 3)}, "inputs must be"),
        ({"weight": torch.zeros(5, 4)}, "weight must be"),
        ({"bias": torch.zeros(5)}, "bias must have shape"),
        ({"initial_state": torch.zeros(1, 2, 6)}, "initial_state must have shape"),
    ],
    ids=["inputs", "weight", "bias", "initial_state"],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        causal_convolution(**{**arguments(1, 8, 6, 4), **change})
