"""Offsets are 64 bit: tensors whose elements lie beyond 2^31 and 2^32 from the first are read and written rightly.

Reading is tested with strides: the rows of a small tensor lie far apart in memory of which only those rows are ever
touched. Writing needs memory that is really there, of the smallest dtype, and is left to `make test-slow`.
"""

import pytest
import torch

from gradients import gradients_of
from mambacore import causal_convolution, selective_scan
from mambacore.native_library import native_library
from scan_cases import leaves, scan_arguments
from tolerances import BFLOAT16

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without the native library")

GIB = 2**30


def available_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def spread_out(tensor: torch.Tensor, distance: int) -> torch.Tensor:
    """The same (2, length, ...) tensor with neighbouring batch items `distance` elements apart in memory."""
    strides = (distance, *tensor[0].contiguous().stride())
    storage = torch.empty(distance + tensor[0].numel(), dtype=tensor.dtype)
    apart = storage.as_strided(tensor.shape, strides)
    apart.copy_(tensor)
    return apart


def rows_spread_out(tensor: torch.Tensor, distance: int) -> torch.Tensor:
    """The same (1, length, ...) tensor with neighbouring rows `distance` elements apart in memory."""
    strides = (0, distance, *tensor[0, 0].contiguous().stride())
    storage = torch.empty((tensor.shape[1] - 1) * distance + tensor[0, 0].numel(), dtype=tensor.dtype)
    apart = storage.as_strided(tensor.shape, strides)
    apart.copy_(tensor)
    return apart


SPREADS = {
    "batch items 2^31 apart": (2, spread_out, 2**31 + 5),
    "batch items 2^32 apart": (2, spread_out, 2**32 + 5),
    "rows 2^31 apart": (1, rows_spread_out, 2**31 + 5),
    "rows 2^32 apart": (1, rows_spread_out, 2**32 + 5),
}


@pytest.mark.skipif(available_bytes() < 14 * GIB, reason="needs 14 GiB that could be memory")
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
@pytest.mark.parametrize(("batch", "spread", "distance"), SPREADS.values(), ids=SPREADS.keys())
@pytest.mark.parametrize("far", ["inputs", "step_size", "gate", "input_matrix", "output_matrix"])
def test_a_scan_reads_what_lies_far_apart(far, batch, spread, distance, reverse):
    length = 2 if spread is rows_spread_out else 3
    arguments = {name: tensor.float() for name, tensor in scan_arguments(batch, length, 20, 3).items()}
    tight = gradients_of(scan_with_state, arguments, torch.float32, step_softplus=True, reverse=reverse)
    inputs = leaves(arguments, torch.float32)
    # Of the smallest dtype that the argument may have.
    dtype = torch.float32 if far.endswith("matrix") else torch.bfloat16
    if dtype == torch.bfloat16:
        inputs |= {name: inputs[name].detach().bfloat16().requires_grad_() for name in ("inputs", "step_size", "gate")}
        arguments |= {name: inputs[name].detach().float() for name in ("inputs", "step_size", "gate")}
        tight = gradients_of(scan_with_state, arguments, torch.float32, step_softplus=True, reverse=reverse)
    inputs[far] = spread(inputs[far].detach(), distance).requires_grad_()
    outputs, state = scan_with_state(**inputs, step_softplus=True, reverse=reverse)
    assert torch.allclose(outputs.float(), tight["outputs"], rtol=BFLOAT16, atol=BFLOAT16)
    assert torch.allclose(state, tight["final_state"], rtol=1e-6, atol=1e-6)
    del outputs


@pytest.mark.skipif(available_bytes() < 14 * GIB, reason="needs 14 GiB that could be memory")
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
def test_a_convolution_reads_what_lies_far_apart(reverse):
    inputs, weight = torch.randn(2, 7, 20), torch.randn(20, 4)
    expected = causal_convolution(inputs, weight, silu=True, reverse=reverse)
    found = causal_convolution(spread_out(inputs, 2**31 + 5), weight, silu=True, reverse=reverse)
    assert torch.equal(found, expected)


def scan_with_state(**arguments):
    return selective_scan(**arguments, return_final_state=True)


def quickly_forgetting(length: int, channels: int, state_size: int, requires_grad: bool = False):
    """Arguments whose sequences repeat one row without copies, and whose states forget within some ten positions."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 1, channels, generator=generator).bfloat16() + 3
    matrix = torch.rand(1, 1, state_size, generator=generator) + 0.5
    arguments = {
        "inputs": row.requires_grad_(requires_grad),
        "step_size": torch.full((1, 1, channels), 1.0).bfloat16().requires_grad_(requires_grad),
        "state_matrix": torch.full((channels, state_size), -2.0),
        "input_matrix": matrix.requires_grad_(requires_grad),
        "output_matrix": matrix.flip(2).detach().requires_grad_(requires_grad),
    }
    repeated = {name: tensor.expand(1, length, -1) for name, tensor in arguments.items() if name != "state_matrix"}
    return repeated | {"state_matrix": arguments["state_matrix"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(available_bytes() < 12 * GIB, reason="needs 12 GiB of memory")
def test_a_scan_writes_outputs_beyond_2_to_the_32():
    channels = 65_521  # a wrapped offset would land in the middle of a row
    length = 2**32 // channels + 70
    with torch.no_grad():
        outputs = selective_scan(**quickly_forgetting(length, channels, 1))
        expected = selective_scan(**quickly_forgetting(100, channels, 1))
    assert outputs.numel() > 2**32
    for row in (2**31 // channels, 2**32 // channels - 1, length - 1):
        assert torch.equal(outputs[0, row], expected[0, 99])
    assert torch.equal(outputs[0, :100], expected[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(available_bytes() < 18 * GIB, reason="needs 18 GiB of memory")
def test_a_scan_writes_gradients_beyond_2_to_the_31():
    channels = 65_521
    length = 2**31 // channels + 70
    arguments = quickly_forgetting(length, channels, 1)
    sequences = {
        name: arguments[name].detach().requires_grad_()
        for name in ("inputs", "step_size")  # still repeated rows
    }
    outputs = selective_scan(**(arguments | sequences))
    seed = torch.ones(1, 1, channels, dtype=torch.bfloat16).expand_as(outputs)
    grads = torch.autograd.grad(outputs, list(sequences.values()), seed)
    short = quickly_forgetting(200, channels, 1)
    short_sequences = {name: short[name].detach().requires_grad_() for name in ("inputs", "step_size")}
    expected = torch.autograd.grad(selective_scan(**(short | short_sequences)).sum(), list(short_sequences.values()))
    for grad, wanted in zip(grads, expected, strict=True):
        assert grad.numel() > 2**31
        assert torch.equal(grad[0, -100:], wanted[0, -100:])
        assert torch.equal(grad[0, length // 2], wanted[0, 100])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(available_bytes() < 12 * GIB, reason="needs 12 GiB of memory")
def test_a_convolution_writes_beyond_2_to_the_32():
    channels = 65_521
    length = 2**32 // channels + 70
    row = torch.randn(1, 1, channels).bfloat16()
    weight = torch.randn(channels, 4)
    with torch.no_grad():
        outputs = causal_convolution(row.expand(1, length, -1), weight)
        expected = causal_convolution(row.expand(1, 10, -1), weight)
    assert outputs.numel() > 2**32
    for position in (2**31 // channels, 2**32 // channels, length - 1):
        assert torch.equal(outputs[0, position], expected[0, 9])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(available_bytes() < 14 * GIB, reason="needs 14 GiB of memory")
def test_kept_states_reach_beyond_2_to_the_31():
    channels, state_size = 4_096, 512
    length = 64 * (2**31 // (channels * state_size) + 3)
    arguments = quickly_forgetting(length, channels, state_size)
    inputs = arguments["inputs"].detach().requires_grad_()
    grad = torch.autograd.grad(selective_scan(**(arguments | {"inputs": inputs})).sum(), inputs)[0]
    short = quickly_forgetting(200, channels, state_size)
    short_inputs = short["inputs"].detach().requires_grad_()
    expected = torch.autograd.grad(selective_scan(**(short | {"inputs": short_inputs})).sum(), short_inputs)[0]
    assert torch.equal(grad[0, -100:], expected[0, -100:])
    assert torch.equal(grad[0, length // 2], expected[0, 100])
