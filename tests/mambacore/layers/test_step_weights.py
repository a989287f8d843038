"""Linear layers of programs of steps, in every format of their weights."""

import itertools

import pytest
import torch

from mambacore.layers.step_program import GROUP, StepProgram
from mambacore.layers.step_weights import (
    WEIGHT_FORMATS,
    int8_rows,
    panels,
    rounded_inputs,
    rounded_weight,
    weight_dtype,
)
from mambacore.native_library import native_library
from tolerances import FLOAT32, relative_error

native = pytest.mark.skipif(native_library() is None, reason="installed without the native library")


def product(layer, values, weight_format, in_group=False):
    """A layer's outputs (batch, outputs), as a program of it alone writes them."""
    program = StepProgram(torch.float32, weight_format)
    source, target = program.place(layer.in_features), program.place(layer.out_features)
    logits = program.place(16)
    if in_group:
        group = program.add(GROUP, period=1, factor=1)
    program.linear(layer, source, target)
    if in_group:
        program.end_group(group)
    memory = torch.zeros(len(values), program.memory_size)
    memory[:, source : source + layer.in_features] = values
    program.run(
        native_library(), memory, torch.zeros(len(values), dtype=torch.int64), position=0, logits=logits, classes=16,
        given=torch.zeros(len(values), 1, dtype=torch.int64),
    )  # fmt: skip
    return memory[:, target : target + layer.out_features]


def layer_of(inputs, outputs, bias=True):
    torch.manual_seed(inputs * 1000 + outputs)
    return torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@native
@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "batch"),
    [(1, 1, 1), (3, 17, 2), (16, 16, 3), (31, 50, 5), (64, 128, 8), (65, 36, 16), (130, 100, 23)],
)
def test_a_layer_multiplies_rounded_weights_by_rounded_inputs(inputs, outputs, batch, weight_format, instruction_set):
    library = native_library()
    before = library.instruction_set
    layer, values = layer_of(inputs, outputs, bias=outputs != 36), torch.randn(batch, inputs)
    values[0] = 0  # without a largest number
    try:
        library.use_instruction_set(instruction_set)
    except ValueError:
        pytest.skip(f"this processor has no {instruction_set}")
    try:
        for in_group in (False, True):
            dtype = weight_dtype(weight_format, in_group)
            found = product(layer, values, weight_format, in_group)
            # Without instructions for products of bfloat16 numbers, inputs stay as they are.
            possible = [rounded_inputs(values, dtype), *([values] if dtype == torch.bfloat16 else [])]
            expected = [
                torch.nn.functional.linear(one, rounded_weight(layer.weight, dtype), layer.bias) for one in possible
            ]
            assert min(relative_error(found, one) for one in expected) < FLOAT32
    finally:
        library.use_instruction_set(before)


@native
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_a_row_of_a_product_is_the_same_in_any_batch(weight_format):
    layer, values = layer_of(100, 90), torch.randn(40, 100)
    whole = product(layer, values, weight_format)
    for batch in (1, 2, 3, 5, 8, 9, 15, 16, 17, 33):
        assert torch.equal(product(layer, values[:batch], weight_format), whole[:batch])


@native
@pytest.mark.parametrize("unfit", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_inputs_that_are_not_finite_are_not_lost(weight_format, unfit):
    layer, values = layer_of(70, 20), torch.randn(3, 70)
    values[1, 33] = unfit
    found = product(layer, values, weight_format)
    assert not found[1].isfinite().any() and found[0].isfinite().all() and found[2].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 17), (16, 33)])
def test_int8_rows_keep_each_row_to_within_half_a_step(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, shape[0])[:, None]
    weight[-1] = 0  # a row without a largest number
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded_weight(weight, torch.int8) - weight).abs() <= step * 0.5001).all()
    rows, scales = int8_rows(weight)
    assert rows.shape == shape and scales.shape == shape[:1]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_panels_hold_every_weight_once_in_its_place(dtype, parts):
    outputs, inputs = 2 * 21, 7
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).to(
        torch.float64 if dtype == torch.int8 else dtype
    )
    each, group = outputs // parts, {torch.bfloat16: 2, torch.int8: 4}.get(dtype, 1)
    content = panels(weight, dtype, parts)
    groups, rows = -(-inputs // group), -(-each // 16) * 16
    size = groups * 16 * group * torch.empty(0, dtype=torch.uint8 if dtype == torch.int8 else dtype).element_size()
    numbers = content[:, :size].contiguous().view(torch.uint8 if dtype == torch.int8 else dtype)
    for output, place in itertools.product(range(outputs), range(inputs)):
        row = output // each * rows + output % each
        found = numbers[row // 16].view(groups, 16, group)[place // group, row % 16, place % group]
        if dtype == torch.int8:
            assert int(found) == int(int8_rows(weight)[0][output, place]) + 128
            assert content[row // 16, size:].contiguous().view(torch.float32)[row % 16] == int8_rows(weight)[1][output]
        else:
            assert found == weight[output, place]


def test_a_layer_too_wide_for_sums_of_bytes_is_refused():
    with pytest.raises(ValueError, match="too wide for int8"):
        panels(torch.zeros(1, 50_000), torch.int8)
