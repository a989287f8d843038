"""The GPU's kernels on a device, at real sizes, equal the float64 reference with all gradients: `make test-gpu`."""

import pytest
import torch

from gradients import gradients_of
from mambacore import backends, causal_convolution, selective_scan, use_backend
from mambacore.convolution import causal_convolution_reference
from mambacore.layers import ResidualBlock, SelectiveMixer
from mambacore.layers.step import states_in_place, steps_on_device
from scan_cases import complex_scan_arguments, random_starts, scan_arguments
from tolerances import BFLOAT16, COMPLEX_FLOAT32, FLOAT32, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CASES = {"real": (scan_arguments, FLOAT32), "complex": (complex_scan_arguments, COMPLEX_FLOAT32)}


def scan_with_state(**arguments):
    return selective_scan(**arguments, return_final_state=True)


def scan_on_device(sequence_starts=None, **arguments):
    starts = None if sequence_starts is None else sequence_starts.cuda()
    moved = {name: tensor.cuda() for name, tensor in arguments.items()}
    return tuple(result.cpu() for result in scan_with_state(**moved, sequence_starts=starts))


def convolution_on_device(**arguments):
    options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    return tuple(result.cpu() for result in causal_convolution(**options, return_final_state=True))


def scan_on_cpu(**arguments):
    with use_backend("torch"):  # float64; itself tested against the reference, which is slow at real lengths
        return scan_with_state(**arguments)


def assert_equal(found, expected, tolerance):
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


def test_the_kernels_are_there():
    assert backends()["triton"] == "available for CUDA tensors"


@pytest.mark.parametrize("packed", [False, True], ids=["one record", "many records"])
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "shape", [(1, 4097, 128, 16, 1), (2, 1000, 96, 13, 3), (8, 512, 1024, 16, 1), (1, 129, 64, 64, 1)], ids=str
)
def test_scan_and_all_gradients_equal_the_reference(shape, case, reverse, packed):
    make, tolerance = CASES[case]
    arguments = make(*shape)
    starts = random_starts(*shape[:2], share=0.005) if packed else None
    options = {"step_softplus": True, "reverse": reverse, "sequence_starts": starts}
    expected = gradients_of(scan_on_cpu, arguments, torch.float64, **options)
    assert_equal(gradients_of(scan_on_device, arguments, torch.float32, **options), expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_inputs(dtype):
    arguments = scan_arguments(2, 3000, 256, 16)
    for name in ("inputs", "step_size", "gate"):
        arguments[name] = arguments[name].to(dtype).double()
    expected, _ = scan_on_cpu(**arguments, step_softplus=True)
    narrow = {name: tensor.float() for name, tensor in arguments.items()}
    narrow |= {name: arguments[name].to(dtype) for name in ("inputs", "step_size", "gate")}
    found, state = scan_on_device(**narrow, step_softplus=True)
    assert found.dtype == dtype and state.dtype == torch.float32
    assert relative_error(found, expected) < BFLOAT16


@pytest.mark.parametrize("packed", [False, True], ids=["one record", "many records"])
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
def test_convolution_and_all_gradients_equal_the_reference(reverse, packed):
    generator = torch.Generator().manual_seed(0)
    shapes = {"inputs": (2, 5000, 200), "weight": (200, 4), "bias": (200,), "initial_state": (2, 3, 200)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    starts = random_starts(2, 5000, share=0.01) if packed else None
    options = {"silu": True, "reverse": reverse, "sequence_starts": starts}
    expected = gradients_of(causal_convolution_reference, tensors, torch.float64, **options)
    assert_equal(gradients_of(convolution_on_device, tensors, torch.float32, **options), expected, FLOAT32)


def test_results_repeat_bit_for_bit():
    arguments = scan_arguments(1, 20_000, 128, 16)
    first, second = (gradients_of(scan_on_device, arguments, torch.float32, step_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_offsets_beyond_32_bits():
    length, channels = (1 << 32) // 512 + 1000, 512  # 2^32 elements lie before the last rows
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("the device has less than 40 GiB free")
    inputs = torch.zeros(1, length, channels, dtype=torch.bfloat16, device="cuda")
    inputs[:, -500:] = torch.randn(500, channels, device="cuda")
    state_matrix = -torch.rand(channels, 2, device="cuda") - 0.1
    matrix = torch.randn(1, length, 2, device="cuda")
    step = torch.full((1, 1, 1), 0.5, dtype=torch.bfloat16, device="cuda").expand(1, length, channels)
    outputs = selective_scan(inputs, step.clone(), state_matrix, matrix, matrix)
    tail = slice(length - 500, length)
    expected = selective_scan(
        inputs[:, tail].cpu().double(), step[:, tail].cpu().double(), state_matrix.cpu().double(),
        matrix[:, tail].cpu().double(), matrix[:, tail].cpu().double(),
    )  # fmt: skip
    assert relative_error(outputs[:, tail].cpu(), expected) < BFLOAT16


def test_a_captured_graph_repeats_the_scan():
    arguments = {name: tensor.float().cuda() for name, tensor in scan_arguments(4, 1, 128, 16).items()}
    with torch.no_grad():
        expected, _ = scan_with_state(**arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs, _ = scan_with_state(**arguments)
        outputs.zero_()
        graph.replay()
    assert torch.equal(outputs, expected)


@pytest.mark.parametrize("options", [{}, {"complex_state": True, "state_size": 7}], ids=["real", "complex"])
def test_steps_and_a_captured_step_equal_the_block_on_a_cpu(options):
    torch.manual_seed(0)
    block, sequence = ResidualBlock(96, SelectiveMixer(96, **options)), torch.randn(3, 6, 96)
    expected, expected_state = block(sequence)
    block, sequence = block.cuda(), sequence.cuda()
    with torch.no_grad(), states_in_place():
        assert steps_on_device(sequence[:, :1])
        outputs, state = [], None
        for position in range(3):
            found, state = block(sequence[:, position : position + 1], state)
            outputs.append(found)
        kept, given = [tensor.clone() for tensor in state], sequence[:, 3:4].clone()
        block(given, state)  # compiles before the capture
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found, _ = block(given, state)
        for place, value in zip(state, kept, strict=True):
            place.copy_(value)
        for position in range(3, 6):
            given.copy_(sequence[:, position : position + 1])
            graph.replay()
            outputs.append(found.clone())
    assert relative_error(torch.cat(outputs, dim=1).cpu(), expected) < COMPLEX_FLOAT32
    for one, other in zip(state, expected_state, strict=True):
        assert relative_error(one.cpu(), other) < COMPLEX_FLOAT32
