"""The GPU's kernels of the dual scan, interpreted on CPU tensors, equal the float64 reference; and they compile."""

import importlib.util

import pytest
import torch

from gradients import gradients_of
from mambacore import ssd_scan, use_backend
from mambacore.ssd import ssd_scan_reference
from scan_cases import random_starts
from ssd_cases import REQUIRED, ssd_arguments
from tolerances import FLOAT16, FLOAT32, relative_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (on Linux it comes with torch)"
)

SHAPES = {
    "one position": {"length": 1},
    "one chunk": {"length": 64, "head_width": 16, "state_size": 16},
    "one past a chunk": {"length": 65, "heads": 4, "groups": 2, "head_width": 20, "state_size": 17},
    "rank 3": {"length": 45, "heads": 2, "groups": 2, "rank": 3},
}


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("packed", [False, True], ids=["one record", "many records"])
@pytest.mark.parametrize("reverse", [False, True], ids=["onwards", "reverse"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.usefixtures("interpreter")
def test_kernels_and_all_gradients_equal_the_reference(shape, reverse, packed):
    arguments = ssd_arguments(2, **shape)
    options = {"reverse": reverse, "sequence_starts": random_starts(2, shape["length"], 0.05) if packed else None}
    expected = gradients_of(ssd_scan_reference, arguments, torch.float64, **options)
    found = gradients_of(
        lambda **given: ssd_scan(**given, return_final_state=True), arguments, torch.float32, **options
    )
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < FLOAT32, errors


@pytest.mark.usefixtures("interpreter")
def test_gradients_do_not_depend_on_how_many_heads_and_states_a_program_takes(monkeypatch):
    from mambacore.ssd import triton  # noqa: PLC0415  skipped where there is no Triton

    arguments = ssd_arguments(1, 70, heads=4, groups=1, state_size=20)
    monkeypatch.setattr(triton, "MATRIX_STATES", 16)
    expected = gradients_of(ssd_scan_reference, arguments, torch.float64)
    for programs_to_fill, heads in ((0, 4), (0.02, 2), (1e9, 1)):
        monkeypatch.setattr(triton, "PROGRAMS_TO_FILL", programs_to_fill)
        assert triton.heads_at_once(2, 4, triton.multiprocessors(torch.empty(0))) == heads
        found = gradients_of(lambda **given: ssd_scan(**given, return_final_state=True), arguments, torch.float32)
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert max(errors.values()) < FLOAT32, errors


@pytest.mark.usefixtures("interpreter")
def test_optional_arguments_can_be_absent_and_strides_do_not_matter():
    arguments = {name: ssd_arguments(1, 70)[name].float() for name in REQUIRED}
    expected, _ = ssd_scan_reference(**{name: tensor.double() for name, tensor in arguments.items()})
    assert relative_error(ssd_scan(**arguments), expected) < FLOAT32
    for name in ("inputs", "input_matrix", "output_matrix"):
        arguments[name] = torch.cat([arguments[name], arguments[name]], dim=-1)[..., : arguments[name].shape[-1]]
    assert relative_error(ssd_scan(**arguments), expected) < FLOAT32


@pytest.mark.usefixtures("interpreter")
def test_float16_keeps_a_float32_state():
    """In place of bfloat16, which the interpreter multiplies as whole numbers (Triton 3.6)."""
    arguments = {name: tensor.half().double() for name, tensor in ssd_arguments(1, 70).items()}
    expected, expected_state = ssd_scan_reference(**arguments)
    narrow = {name: tensor.to(torch.float16 if name in ("inputs", "input_matrix", "output_matrix") else torch.float32)
              for name, tensor in arguments.items()}  # fmt: skip
    outputs, state = ssd_scan(**narrow, return_final_state=True)
    assert outputs.dtype == torch.float16 and state.dtype == torch.float32
    assert relative_error(outputs, expected) < FLOAT16 and relative_error(state, expected_state) < FLOAT16


BLOCKS = {"REVERSE": False, "RANK": 1, "CHUNK": 64, "BLOCK_ROWS": 64, "BLOCK_WIDTH": 64, "HAS_SKIP": True,
          "HAS_STATE": True, "BACKWARD": False, "BLOCK": 256}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "into"),
    [("add_states", 0), ("pass_states", 0), ("read_out", 0), ("read_back_inputs", 0), ("read_back_matrix", True),
     ("read_back_matrix", False)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("states", [64, 128])
def test_kernels_compile_for_hopper_without_leaving_the_registers(name, into, dtype, states):
    from mambacore.ssd import triton  # noqa: PLC0415
    from mambacore.triton.compilation import TOOLS, compiled  # noqa: PLC0415  skipped where there is no Triton

    if not (TOOLS / "ptxas").exists():
        pytest.skip("this platform's Triton has no ptxas to compile with")
    kernel = getattr(triton, name)
    warps = triton.WARPS[torch.float32 if dtype == "fp32" else torch.bfloat16]
    warps = 1 if name == "pass_states" else triton.BACKWARD_WARPS if name.startswith("read_back") else warps
    if name == "read_back_matrix":
        states = min(states, triton.MATRIX_STATES)
    used = compiled(kernel, BLOCKS | {"BLOCK_STATES": states, "INTO": into}, 90, dtype, warps).used
    assert 0 < used["REG"] <= 255, used
    assert used["STACK"] == 0 or dtype == "fp32", used
