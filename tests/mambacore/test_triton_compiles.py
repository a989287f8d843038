"""Every GPU kernel compiles for Ampere and Hopper, without a device; the scan's keep their states in registers."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (on Linux it comes with torch)", allow_module_level=True)

from mambacore.convolution import triton_kernels as convolution_kernels
from mambacore.layers import triton_norm
from mambacore.layers import triton_step as step
from mambacore.layers import triton_step_kernels as step_kernels
from mambacore.layout import DEVICE_INTERVAL
from mambacore.scan import triton as scan
from mambacore.scan import triton_backward as scan_backward
from mambacore.scan import triton_forward as scan_forward
from mambacore.triton.compilation import TOOLS, compiled

pytestmark = pytest.mark.skipif(
    not (TOOLS / "ptxas").exists(), reason="this platform's Triton has no ptxas to compile with"
)

STATES = 16
SCAN = {"SOFTPLUS": True, "REVERSE": False, "HAS_GATE": True, "HAS_BIAS": True, "OUT_OF_FIXED": False,
        "BLOCK_STATES": STATES}  # fmt: skip
WALK = {"HAS_SKIP": True, "INTO_FIXED": False, "INTERVAL": DEVICE_INTERVAL}
CONVOLUTION = {"REVERSE": False, "WIDTH": 4, "BLOCK_POSITIONS": 32, "BLOCK_CHANNELS": 64}
CONVOLVE = CONVOLUTION | {"SILU": True, "HAS_BIAS": True, "HAS_STATE": True}
CARRY = {"CONJUGATE": True, "HAS_STATE": True, "BLOCK_CHANNELS": 32}
KERNELS = {
    "summary": (scan_forward.walk, SCAN | WALK | {"SUMMARY": True, "HAS_STATE": False, "KEEP_BOUNDARIES": False}, 1),
    "outputs": (scan_forward.walk, SCAN | WALK | {"SUMMARY": False, "HAS_STATE": True, "KEEP_BOUNDARIES": True}, 1),
    "carry": (scan_forward.carry, CARRY, 1),
    "backward's summary": (scan_backward.summary, SCAN, 1),
    "retreat": (scan_backward.retreat, SCAN | WALK | {"HAS_CARRY": True}, 1),
    "convolution": (convolution_kernels.convolve, CONVOLVE, 4),
    "convolution's gradient": (convolution_kernels.grad_before_activation, CONVOLVE, 4),
    "gradient of its inputs": (convolution_kernels.grad_of_inputs, CONVOLUTION, 4),
}
CONVOLVE_STEP = {"HAS_BIAS": True, "HAS_STATE": True, "WIDTH": 4, "BLOCK_CHANNELS": step.CONVOLVE_CHANNELS}
ADVANCE = {"HAS_STATE": True, "BLOCK_STATES": STATES, "BLOCK_CHANNELS": step.ADVANCE_ELEMENTS // STATES}
KERNELS |= {
    "step's convolution": (step_kernels.convolve, CONVOLVE_STEP, step.CONVOLVE_WARPS),
    "step": (step_kernels.advance, ADVANCE, step.ADVANCE_WARPS),
}
KERNELS |= {
    "sum of parts": (scan_backward.add_up, {"BLOCK": scan.SUM_BLOCK}, scan.SUM_WARPS),
    "norm": (triton_norm.normalise, {"BLOCK_ROWS": 2, "BLOCK_WIDTH": 1024}, triton_norm.WARPS),
    "norm's gradient": (triton_norm.normalise_back, {"BLOCK_ROWS": 2, "BLOCK_WIDTH": 1024}, triton_norm.WARPS),
}
OF_SCAN = ("summary", "outputs", "carry", "backward's summary", "retreat")
WITH_COMPLEX_NUMBERS = (*OF_SCAN, "step")
WITH_RECORDS = (*OF_SCAN, "convolution", "convolution's gradient", "gradient of its inputs")
QUICK = [(name, False, 90, "fp32", False) for name in KERNELS]
QUICK += [(name, True, 90, "fp32", False) for name in ("retreat", "step")]
THOROUGH = [
    (name, is_complex, capability, dtype, packed)
    for name in KERNELS
    for is_complex in ((False, True) if name in WITH_COMPLEX_NUMBERS else (False,))
    for capability, dtype in ((90, "fp32"), (90, "bf16"), (80, "fp16"))
    for packed in ((False, True) if name in WITH_RECORDS else (False,))
    if (name, is_complex, capability, dtype, packed) not in QUICK
]


@pytest.mark.parametrize(
    ("name", "is_complex", "capability", "dtype", "packed"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in THOROUGH)],
)
def test_kernel_compiles(name, is_complex, capability, dtype, packed):
    kernel, switches, warps = KERNELS[name]
    switches = switches | {"HAS_RESETS": packed, "IS_COMPLEX": is_complex}
    if name in OF_SCAN:
        plan = scan.plan_of(
            1, 1 << 20, 1024, 1, (1 + is_complex) * STATES, "summary" != name != "outputs", 132, is_complex
        )
        switches = {"BLOCK_CHANNELS": plan.block_channels} | switches
        warps = warps if name == "carry" else plan.warps
    used = compiled(kernel, switches, capability, dtype, warps).used
    assert 0 < used["REG"] <= 255, used
    if not packed and capability == 90 and dtype == "fp32":
        assert used["STACK"] == 0, used  # nothing leaves the registers


@pytest.mark.parametrize("fixed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["moving", "fixed"])
@pytest.mark.parametrize("states", [8, 16, 32])
def test_the_backward_kernel_keeps_its_states_in_registers(states, fixed):
    """With B and C in bfloat16; where they are fixed, they and the sums of their gradients are in float32."""
    plan = scan.plan_of(1, 1 << 20, 1024, 1, states, True, 132, fixed=fixed)
    switches = SCAN | WALK | {"HAS_CARRY": True, "HAS_RESETS": False, "IS_COMPLEX": False}
    switches |= {"INTO_FIXED": fixed, "OUT_OF_FIXED": fixed}
    switches |= {"BLOCK_STATES": states, "BLOCK_CHANNELS": plan.block_channels}
    used = compiled(scan_backward.retreat, switches, 90, "fp32" if fixed else "bf16", plan.warps).used
    assert used["STACK"] == 0, used
