"""The GPU's kernels, run by Triton's interpreter on CPU tensors, equal the float64 reference with all gradients."""

import importlib.util
import itertools
import subprocess
import sys

import pytest
import torch

from gradients import gradients_of
from mambacore import backends, causal_convolution, selective_scan, use_backend
from mambacore.convolution import causal_convolution_reference
from mambacore.scan import selective_scan_reference
from scan_cases import complex_scan_arguments, leaves, random_starts, scan_arguments, time_invariant
from tolerances import COMPLEX_FLOAT32, FLOAT32, OF_DTYPE, relative_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (on Linux it comes with torch)"
)

CASES = {"real": (scan_arguments, FLOAT32), "complex": (complex_scan_arguments, COMPLEX_FLOAT32)}
FIXED = ("input_matrix", "output_matrix")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Interpret, and cut even short sequences into chunks."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from mambacore.scan import triton as scan  # noqa: PLC0415  skipped where there is no Triton

    monkeypatch.setattr(scan, "SHORTEST_CHUNK", 16)
    with use_backend("triton"):
        yield


def scan_with_state(**arguments):
    return selective_scan(**arguments, return_final_state=True)


def convolution_with_state(**arguments):
    return causal_convolution(**arguments, return_final_state=True)


def convolution_arguments(batch, length, channels, kernel_width):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "inputs": (batch, length, channels),
        "weight": (channels, kernel_width),
        "bias": (channels,),
        "initial_state": (batch, kernel_width - 1, channels),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def assert_equal(found, expected, tolerance):
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


SHAPES = {
    "one position": (2, 1, 3, 3, 1, ()),
    "one short of a chunk": (1, 15, 3, 2, 1, ()),
    "one past a chunk, fixed matrices": (1, 17, 2, 4, 1, FIXED),
    "three chunks, groups": (1, 33, 2, 3, 2, ()),
}
# Interpreted positions are slow, so each shape is quickly tested one way, and thoroughly both.
QUICK_WAYS = {
    "one position": "complex",
    "one short of a chunk": "real",
    "one past a chunk, fixed matrices": "complex",
    "three chunks, groups": "real",
}


@pytest.mark.parametrize(
    ("shape", "case", "reverse"),
    [
        pytest.param(shape, case, case == "complex", marks=() if QUICK_WAYS[name] == case else pytest.mark.slow,
                     id=f"{name}, {case}")
        for name, shape in SHAPES.items() for case in CASES
    ],
)  # fmt: skip
def test_scan_and_all_gradients_equal_the_reference(shape, case, reverse):
    *sizes, fixed = shape
    make, tolerance = CASES[case]
    arguments = time_invariant(make(*sizes), fixed)
    options = {"step_softplus": True, "reverse": reverse}
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, **options)
    assert_equal(gradients_of(scan_with_state, arguments, torch.float32, **options), expected, tolerance)


@pytest.mark.parametrize(("case", "reverse"), [("real", True), ("complex", False)], ids=["reverse", "complex, onwards"])
def test_packed_records_equal_the_reference(case, reverse):
    make, tolerance = CASES[case]
    arguments, starts = make(2, 18, 2, 2), random_starts(2, 18, share=0.15)
    options = {"step_softplus": True, "reverse": reverse, "sequence_starts": starts}
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, **options)
    assert_equal(gradients_of(scan_with_state, arguments, torch.float32, **options), expected, tolerance)


def test_every_program_notes_its_own_states(monkeypatch):
    """Three programs for five channels, of three states that take four places."""
    from mambacore.scan import triton as scan  # noqa: PLC0415

    monkeypatch.setattr(scan, "BLOCKS", {8: (scan.Block(2, 1), scan.Block(2, 1))})
    arguments = scan_arguments(1, 19, 5, 3, 1)
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, step_softplus=True)
    assert_equal(gradients_of(scan_with_state, arguments, torch.float32, step_softplus=True), expected, FLOAT32)


def test_everything_optional_can_be_absent():
    arguments = scan_arguments(1, 18, 2, 3, everything=False)
    arguments["step_size"] = arguments["step_size"].abs()
    expected = gradients_of(selective_scan_reference, arguments, torch.float64)
    assert_equal(gradients_of(scan_with_state, arguments, torch.float32), expected, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_inputs_keep_a_float32_state(dtype):
    arguments = scan_arguments(1, 20, 3, 4)
    sequences = ("inputs", "step_size", "gate")
    arguments |= {name: arguments[name].to(dtype).double() for name in sequences}
    expected = gradients_of(selective_scan_reference, arguments, torch.float64, step_softplus=True)
    inputs = leaves(arguments, torch.float32) | {name: arguments[name].to(dtype).requires_grad_() for name in sequences}
    outputs, state = scan_with_state(**inputs, step_softplus=True)
    assert outputs.dtype == dtype and state.dtype == torch.float32
    assert relative_error(outputs, expected["outputs"]) < OF_DTYPE[torch.bfloat16]
    assert relative_error(state, expected["final_state"]) < FLOAT32
    outputs.float().sum().backward()
    assert inputs["inputs"].grad.dtype == dtype and inputs["state_matrix"].grad.dtype == torch.float32


def test_results_repeat_bit_for_bit():
    arguments = scan_arguments(1, 17, 2, 2)
    first, second = (gradients_of(scan_with_state, arguments, torch.float32, step_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_empty_sequence_hands_the_state_through():
    arguments = {name: tensor.float() for name, tensor in scan_arguments(2, 0, 3, 2).items()}
    outputs, state = scan_with_state(**arguments)
    assert outputs.shape == (2, 0, 3) and torch.equal(state, arguments["initial_state"])


def test_scan_passes_opcheck():
    arguments = leaves(scan_arguments(1, 18, 2, 2), torch.float32)
    names = ("inputs", "step_size", "state_matrix", "input_matrix", "output_matrix", "skip_weight", "gate", "step_bias",
             "initial_state")  # fmt: skip
    operator = torch.ops.mambacore.selective_scan_forward.default
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator, (*(arguments[name] for name in names), None, True, False, True), test_utils=tests)


@pytest.mark.parametrize("conjugate", [False, True], ids=["states", "gradients"])
def test_a_state_that_turns_thousands_of_times_keeps_its_phase_from_chunk_to_chunk(conjugate):
    from mambacore.scan import triton_forward  # noqa: PLC0415

    chunks, sums = 4, torch.tensor([9876.54321, 12345.678912, 4321.98765, 0.0], dtype=torch.float64)
    frequency = 50.0  # turns per unit of step size
    chunk_states = torch.zeros(1, chunks, 2, 1)
    triton_forward.carry.start(
        (1, 1), chunk_states, sums.reshape(1, chunks, 1), torch.tensor([[0.0], [frequency]]), sums,
        torch.tensor([[[1.0], [0.0]]]), 1, 1, chunks, 0, 1, state_count=1, IS_COMPLEX=True, CONJUGATE=conjugate,
        HAS_STATE=True, HAS_RESETS=False, BLOCK_CHANNELS=1,
    )  # fmt: skip
    turns = torch.cat([torch.zeros(1), sums.cumsum(0)[:-1]]) * frequency * (-1 if conjugate else 1)
    expected = torch.polar(torch.ones(chunks, dtype=torch.float64), 2 * torch.pi * (turns - turns.floor()))
    assert relative_error(torch.view_as_complex(chunk_states[0, :, :, 0]), expected) < COMPLEX_FLOAT32


def test_many_sequences_lie_along_the_axis_of_a_grid_that_takes_them(monkeypatch):
    """CUDA takes 65,535 programs along the second and third axis of a grid, and 2^31 - 1 along the first."""
    from mambacore.triton import launch  # noqa: PLC0415

    grids = []
    monkeypatch.setattr(launch.Kernel, "start", lambda self, grid, *arguments, **named: grids.append(grid))
    batch = 70_000
    tensors = {name: tensor.float() for name, tensor in scan_arguments(batch, 2, 1, 1, everything=False).items()}
    gradients_of(scan_with_state, tensors, torch.float32)
    gradients_of(convolution_with_state, convolution_arguments(batch, 2, 1, 2), torch.float32)
    long = {name: tensor.float() for name, tensor in scan_arguments(1, 4096, 1, 1, everything=False).items()}
    gradients_of(scan_with_state, long, torch.float32)
    assert len(grids) > 6 and all(axis <= 65_535 for grid in grids for axis in grid[1:])


CONVOLUTION_SHAPES = ((2, 37, 5, 4), (1, 2, 3, 4), (1, 33, 3, 2))
QUICK_CONVOLUTIONS = (((2, 37, 5, 4), False, True), ((1, 2, 3, 4), True, False), ((1, 33, 3, 2), True, True))


@pytest.mark.parametrize(
    ("shape", "reverse", "packed"),
    [
        pytest.param(*case, marks=() if case in QUICK_CONVOLUTIONS else pytest.mark.slow)
        for case in itertools.product(CONVOLUTION_SHAPES, (False, True), (False, True))
    ],
)
def test_convolution_and_all_gradients_equal_the_reference(shape, reverse, packed):
    tensors = convolution_arguments(*shape)
    starts = random_starts(*shape[:2], share=0.2) if packed else None
    options = {"silu": True, "reverse": reverse, "sequence_starts": starts}
    expected = gradients_of(causal_convolution_reference, tensors, torch.float64, **options)
    assert_equal(gradients_of(convolution_with_state, tensors, torch.float32, **options), expected, FLOAT32)


def test_backward_goes_where_forward_went():
    arguments = leaves(scan_arguments(1, 17, 2, 2), torch.float32)
    outputs = selective_scan(**arguments, step_softplus=True)
    with use_backend("torch"):
        outputs.sum().backward()
    other = leaves(scan_arguments(1, 17, 2, 2), torch.float32)
    with use_backend("torch"):
        selective_scan(**other, step_softplus=True).sum().backward()
    assert relative_error(arguments["inputs"].grad, other["inputs"].grad) < FLOAT32


def test_what_cannot_be_is_said(monkeypatch):
    arguments = scan_arguments(1, 4, 2, 2)
    with pytest.raises(RuntimeError, match=r"does not support torch\.float64"):
        selective_scan(**arguments)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="only interpreted, for tests"):
        selective_scan(**{name: tensor.float() for name, tensor in arguments.items()})
    if not torch.cuda.is_available():
        assert backends()["triton"].startswith("unavailable: there is no CUDA device")


def test_the_core_works_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('not on this platform')")
    script = (
        "import torch, mambacore\n"
        "inputs = torch.randn(1, 5, 2)\n"
        "mambacore.selective_scan(inputs, inputs, -torch.ones(2, 1), inputs[..., :1], inputs[..., :1])\n"
        "mambacore.causal_convolution(inputs, torch.ones(2, 3))\n"
        "print(mambacore.backends()['triton'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Triton cannot be imported: not on this platform" in done.stdout
