"""Every entry point of the core against one table of hostile inputs: each is computed rightly or refused clearly.

A refusal is a ValueError or a TypeError that names the argument, says what came, and what to do. A row is a function of
an entry point; add one to `ROWS`, or an entry point to `ENTRIES`, and it is tried with all of the others.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mambacore import causal_convolution, selective_scan, use_backend
from mambacore.layers.dual_blocks import Mamba2Parameters, Mamba3Choices, Mamba3Parameters, Mamba3States
from mambacore.layers.mamba2_step import mamba2_step
from mambacore.layers.mamba3_step import mamba3_step
from mambacore.layers.norm import root_mean_square_norm
from mambacore.layers.step import StepParameters, selective_step
from mambacore.native_library import native_library
from scan_cases import complex_scan_arguments, scan_arguments
from tolerances import OF_DTYPE, relative_error

WIDTH, STATE_SIZE, KERNEL_WIDTH = 20, 5, 4
BATCH, LENGTH = 3, 9


@dataclass
class Entry:
    """An operator and what it is called with.

    Attributes:
        arguments: float64 tensors for a batch and a length, the sequence `inputs` among them.
        call: the operator; returns one tensor or several.
        wide: arguments that keep the compute dtype beside bfloat16 inputs.
        of_width: an argument that must have the width of the inputs.
        state: an argument that is a state, if there is one.
        differentiable: whether it has gradients; one that does not must refuse to be asked for them.
        sequence: its own name for `inputs`.
    """

    arguments: Callable[[int, int], dict[str, Tensor]]
    call: Callable[..., tuple[Tensor, ...]]
    wide: tuple[str, ...]
    of_width: str
    state: str | None = None
    differentiable: bool = True
    sequence: str = "inputs"


def scan(**arguments):
    return selective_scan(**arguments, step_softplus=True, return_final_state=True)


def convolution(**arguments):
    return causal_convolution(**arguments, silu=True, return_final_state=True)


def norm(inputs, weight):
    return (root_mean_square_norm(inputs, weight, 1e-3),)


def convolution_arguments(batch, length):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "inputs": (batch, length, WIDTH), "weight": (WIDTH, KERNEL_WIDTH), "bias": (WIDTH,),
        "initial_state": (batch, KERNEL_WIDTH - 1, WIDTH),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def norm_arguments(batch, length):
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64),
        "weight": torch.randn(WIDTH, generator=generator, dtype=torch.float64),
    }


STEP_RANK = 3


def step_arguments(batch, _length):
    generator = torch.Generator().manual_seed(0)
    inner = 2 * WIDTH
    shapes = {
        "inputs": (batch, 1, WIDTH), "convolution_state": (batch, KERNEL_WIDTH - 1, inner),
        "scan_state": (batch, inner, STATE_SIZE), "norm_weight": (WIDTH,), "input_weight": (2 * inner, WIDTH),
        "input_bias": (2 * inner,), "convolution_weight": (inner, KERNEL_WIDTH), "convolution_bias": (inner,),
        "selection_weight": (STEP_RANK + 2 * STATE_SIZE, inner), "step_weight": (inner, STEP_RANK),
        "step_bias": (inner,), "log_decay_rate": (inner, STATE_SIZE), "skip_weight": (inner,),
        "output_weight": (WIDTH, inner), "output_bias": (WIDTH,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for name, shape in shapes.items()}


def step(inputs, convolution_state, scan_state, **parameters):
    return selective_step(inputs, convolution_state, scan_state, 1e-5, StepParameters(frequency=None, **parameters))


HEADS, GROUPS, RANK, ANGLES = 4, 2, 2, 1


def tensors_of(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for name, shape in shapes.items()}


def mamba2_arguments(batch, _length):
    inner, mixed = 2 * WIDTH, 2 * WIDTH + 2 * GROUPS * STATE_SIZE
    return tensors_of({
        "inputs": (batch, 1, WIDTH), "convolution_state": (batch, KERNEL_WIDTH - 1, mixed),
        "scan_state": (batch, HEADS, inner // HEADS, STATE_SIZE), "norm_weight": (WIDTH,),
        "input_weight": (inner + mixed + HEADS, WIDTH), "input_bias": (inner + mixed + HEADS,),
        "convolution_weight": (mixed, KERNEL_WIDTH), "convolution_bias": (mixed,), "step_bias": (HEADS,),
        "log_decay_rate": (HEADS,), "skip_weight": (HEADS,), "gate_norm_weight": (inner,),
        "output_weight": (WIDTH, inner), "output_bias": (WIDTH,),
    })  # fmt: skip


def of_mamba2(inputs, convolution_state, scan_state, **parameters):
    return mamba2_step(
        inputs, convolution_state, scan_state, GROUPS, 1e-5, 1e-5, (0.01, 0.5), Mamba2Parameters(**parameters)
    )


def mamba3_arguments(batch, _length):
    inner, states = 2 * WIDTH, STATE_SIZE - 1  # which turn in pairs
    head, of_rank, biases = inner // HEADS, (HEADS, RANK, inner // HEADS), (HEADS, RANK, states)
    return tensors_of({
        "inputs": (batch, 1, WIDTH), "angle_state": (batch, HEADS, ANGLES), "scan_state": (batch, HEADS, head, states),
        "key_state": (batch, RANK, HEADS, states), "value_state": (batch, HEADS, head), "norm_weight": (WIDTH,),
        "input_weight": (2 * inner + 2 * RANK * GROUPS * states + 3 * HEADS + ANGLES, WIDTH), "step_bias": (HEADS,),
        "input_matrix_norm_weight": (states,), "output_matrix_norm_weight": (states,), "input_matrix_bias": biases,
        "output_matrix_bias": biases, "rank_inputs": of_rank, "rank_gates": of_rank, "rank_outputs": of_rank,
        "skip_weight": (HEADS,), "output_norm_weight": (inner,), "output_weight": (WIDTH, inner),
    })  # fmt: skip


def of_mamba3(inputs, angle_state, scan_state, key_state, value_state, **parameters):
    choices = Mamba3Choices(GROUPS, ANGLES, True, 1e-5, 1e-5, 1e-5)
    states = Mamba3States(angle_state, scan_state, key_state, value_state)
    return mamba3_step(inputs, states, choices, Mamba3Parameters(**parameters))


MATRICES = ("state_matrix", "input_matrix", "output_matrix", "skip_weight", "step_bias", "initial_state")
ENTRIES = {
    "scan": Entry(
        lambda batch, length: scan_arguments(batch, length, WIDTH, STATE_SIZE), scan, MATRICES, "step_size",
        "initial_state",
    ),
    "complex scan": Entry(
        lambda batch, length: complex_scan_arguments(batch, length, WIDTH, STATE_SIZE), scan, MATRICES, "gate",
        "initial_state",
    ),
    "convolution": Entry(convolution_arguments, convolution, ("weight", "bias"), "weight", "initial_state"),
    "norm": Entry(norm_arguments, norm, ("weight",), "weight"),
    "step": Entry(
        step_arguments, step, ("scan_state",), "output_bias", "scan_state", differentiable=False, sequence="sequence"
    ),
    "Mamba-2 step": Entry(
        mamba2_arguments, of_mamba2, ("scan_state",), "output_bias", "scan_state", differentiable=False,
        sequence="sequence",
    ),
    "Mamba-3 step": Entry(
        mamba3_arguments, of_mamba3, ("scan_state", "angle_state"), "output_weight", "scan_state",
        differentiable=False, sequence="sequence",
    ),
}  # fmt: skip


class Tagged(Tensor):
    """A subclass of tensor as users write them."""


def cast(arguments, dtype):
    return {name: tensor.to(dtype.to_complex() if tensor.is_complex() else dtype) for name, tensor in arguments.items()}


def agree(found, expected, tolerance):
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    assert max(errors) < tolerance, errors


def by_torch(entry, arguments):
    """What plain PyTorch makes of it, in float64."""
    with use_backend("torch"):
        return entry.call(**cast(arguments, torch.float64))


def with_gradients(entry, arguments):
    """Outputs and the gradient of their sum by every argument."""
    arguments = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
    if not entry.differentiable:
        with pytest.raises(RuntimeError, match="computes no gradients but one of its tensors requires one"):
            entry.call(**arguments)
        with torch.no_grad():
            return list(entry.call(**arguments))
    outputs = entry.call(**arguments)
    total = sum((output.abs().sum() if output.is_complex() else output.sum()).double() for output in outputs)
    return [*outputs, *torch.autograd.grad(total, list(arguments.values()))]


def batch_zero(entry):
    arguments = cast(entry.arguments(0, LENGTH), torch.float32)
    found = with_gradients(entry, arguments)
    with use_backend("torch"):
        expected = with_gradients(entry, arguments)
    assert [tuple(tensor.shape) for tensor in found] == [tuple(tensor.shape) for tensor in expected]
    agree(found, expected, OF_DTYPE[torch.float32])


def length_zero(entry):
    arguments = cast(entry.arguments(BATCH, 0), torch.float32)
    found = with_gradients(entry, arguments)
    with use_backend("torch"):
        expected = with_gradients(entry, arguments)
    agree(found, expected, OF_DTYPE[torch.float32])


def wrong_width(entry):
    arguments = entry.arguments(BATCH, LENGTH)
    like = arguments[entry.of_width]
    axis = like.shape.index(WIDTH)
    wrong = like.narrow(axis, 0, WIDTH - 12)
    with pytest.raises(ValueError, match=rf"{entry.of_width} must .* but has .*\(.*8.*\); \w+"):
        entry.call(**arguments | {entry.of_width: wrong})


def wrong_state(entry):
    if entry.state is None:
        pytest.skip("has no state")
    arguments = entry.arguments(BATCH, LENGTH)
    state = arguments[entry.state]
    for wrong in (state[:1], state[:, :2], state[..., :2]):
        with pytest.raises(ValueError, match=f"{entry.state} must have shape .* but has .*; pass"):
            entry.call(**arguments | {entry.state: wrong})


def other_device(entry):
    arguments = entry.arguments(BATCH, LENGTH)
    for name, tensor in arguments.items():
        if name != "inputs":
            with pytest.raises(ValueError, match=rf"{name} must be on the device .* cpu, but is on meta; move it"):
                entry.call(**arguments | {name: tensor.to("meta")})


def tensor_subclass(entry):
    arguments = cast(entry.arguments(BATCH, LENGTH), torch.float32)
    expected = entry.call(**arguments)
    for name, tensor in arguments.items():
        agree(entry.call(**arguments | {name: tensor.as_subclass(Tagged)}), expected, OF_DTYPE[torch.float32])


def fake_tensors(entry):
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    arguments = cast(entry.arguments(BATCH, LENGTH), torch.float32)
    expected = entry.call(**arguments)
    with FakeTensorMode() as mode:
        found = entry.call(**{name: mode.from_tensor(tensor) for name, tensor in arguments.items()})
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [(tensor.shape, tensor.dtype) for tensor in expected]


def fake_gradients(entry):
    if not entry.differentiable:
        pytest.skip("has no gradients")
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    arguments = cast(entry.arguments(BATCH, LENGTH), torch.float32)
    expected = with_gradients(entry, arguments)
    with FakeTensorMode() as mode:
        found = with_gradients(entry, {name: mode.from_tensor(tensor) for name, tensor in arguments.items()})
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [(tensor.shape, tensor.dtype) for tensor in expected]


def traced(entry):
    arguments = cast(entry.arguments(BATCH, LENGTH), torch.float32)
    names = list(arguments)
    function = torch.jit.trace(
        lambda *tensors: tuple(entry.call(**dict(zip(names, tensors, strict=True)))), tuple(arguments.values()),
        check_trace=False,
    )  # fmt: skip
    other = {name: tensor.flip(0) for name, tensor in arguments.items()}
    agree(function(*other.values()), entry.call(**other), OF_DTYPE[torch.float32])


class Module(torch.nn.Module):
    def __init__(self, entry, parameters):
        super().__init__()
        self.call = entry.call
        self.own = torch.nn.ParameterDict(parameters)

    def forward(self, inputs):
        return self.call(inputs=inputs, **self.own)


def exported(entry):
    """Exported without gradients, and then run with them."""
    arguments = cast(entry.arguments(BATCH, LENGTH), torch.float32)
    module = Module(entry, {name: tensor for name, tensor in arguments.items() if name != "inputs"})
    with torch.no_grad():
        graph = torch.export.export(module, (arguments["inputs"],), strict=False).module()
    inputs = arguments["inputs"].clone().requires_grad_(entry.differentiable)
    with torch.set_grad_enabled(entry.differentiable):
        expected, found = module(inputs), graph(inputs)
    agree(found, expected, OF_DTYPE[torch.float32])
    if not entry.differentiable:
        return
    grads = (torch.autograd.grad(outputs[0].square().sum(), inputs)[0] for outputs in (found, expected))
    agree([next(grads)], [next(grads)], OF_DTYPE[torch.float32])


def vmapped(entry):
    arguments = {name: torch.stack([tensor, tensor.roll(1, 0)]) for name, tensor in entry.arguments(2, LENGTH).items()}
    names = list(arguments)

    def call(*tensors):
        return tuple(entry.call(**dict(zip(names, tensors, strict=True))))

    found = torch.func.vmap(call)(*arguments.values())
    for item in range(2):
        expected = call(*(tensor[item] for tensor in arguments.values()))
        agree([tensor[item] for tensor in found], expected, OF_DTYPE[torch.float64])


def non_contiguous(entry):
    arguments = cast(entry.arguments(BATCH, LENGTH), torch.float32)
    expected = with_gradients(entry, arguments)
    for spread in (lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
                   lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
                   lambda tensor: tensor.flip(0).flip(0).expand(2, *tensor.shape)[1]):  # fmt: skip
        found = with_gradients(entry, {name: spread(tensor) for name, tensor in arguments.items()})
        agree(found, expected, OF_DTYPE[torch.float32])


def in_dtype(dtype):
    def row(entry):
        arguments = cast(entry.arguments(BATCH, LENGTH), torch.float32)
        for name, tensor in arguments.items():
            if name not in entry.wide:
                arguments[name] = tensor.to(dtype)
        found = entry.call(**arguments)
        assert found[0].dtype == dtype
        # Inputs and outputs are rounded, nothing in between is; but for a step in float16, which goes by the operators.
        agree(found[:1], by_torch(entry, arguments)[:1], (2 if entry.differentiable else 8) * torch.finfo(dtype).eps)

    return row


def infinities(entry):
    """What is infinite reaches what depends on it, as in plain PyTorch, and nothing else."""
    for value in (float("inf"), float("-inf"), float("nan")):
        arguments = cast(entry.arguments(BATCH, LENGTH), torch.float32)
        arguments["inputs"][1, arguments["inputs"].shape[1] // 2, 3] = value
        found = entry.call(**arguments)
        with use_backend("torch"):
            expected = entry.call(**arguments)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(torch.isfinite(one), torch.isfinite(other))
            finite = torch.isfinite(other)
            agree([one[finite]], [other[finite]], OF_DTYPE[torch.float32])


def integers(entry):
    arguments = entry.arguments(BATCH, LENGTH)
    with pytest.raises(TypeError, match=rf"{entry.sequence} must be float32, .* but is torch\.int32; convert it first"):
        entry.call(**arguments | {"inputs": arguments["inputs"].int()})


ROWS = {
    "batch 0": batch_zero,
    "length 0": length_zero,
    "wrong width": wrong_width,
    "wrong state": wrong_state,
    "other device": other_device,
    "tensor subclass": tensor_subclass,
    "fake tensors": fake_tensors,
    "gradients of fake tensors": fake_gradients,
    "traced": traced,
    "exported": exported,
    "vmapped": vmapped,
    "non-contiguous": non_contiguous,
    "float16": in_dtype(torch.float16),
    "bfloat16": in_dtype(torch.bfloat16),
    "infinities": infinities,
    "integers": integers,
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_hostile_inputs_are_computed_rightly_or_refused_clearly(row, entry):
    row(entry)


def test_a_finer_step_size_is_not_rounded():
    """A step of 2^-3 + 2^-11 is not a bfloat16; the state, which is not rounded either, shows it."""
    arguments = {name: tensor.float() for name, tensor in scan_arguments(1, 200, 16, 4, everything=False).items()}
    arguments["step_size"] = torch.full_like(arguments["step_size"], 0.125 + 2**-11)
    rounded = arguments["inputs"].bfloat16()
    expected = selective_scan(**arguments | {"inputs": rounded.float()}, return_final_state=True)
    found = selective_scan(**arguments | {"inputs": rounded}, return_final_state=True)
    assert found[0].dtype == torch.bfloat16
    assert relative_error(found[0], expected[0]) < 2**-8
    assert relative_error(found[1], expected[1]) < OF_DTYPE[torch.float32]


@pytest.mark.skipif(native_library() is None, reason="installed without the native library")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is that of Linux")
def test_memory_that_runs_out_is_an_error_of_python():
    program = (
        "import resource, torch\n"
        "from mambacore import selective_scan\n"
        "from mambacore.native_library import native_library\n"
        "torch.set_num_threads(2)\n"
        "states = 1 << 16\n"
        "arguments = [torch.ones(1, 128, 16), torch.ones(1, 128, 16), -torch.ones(16, states),\n"
        "             torch.ones(1, 128, states), torch.ones(1, 128, states)]\n"
        "arguments[0].requires_grad_()\n"
        "outputs = selective_scan(*arguments)\n"
        "expected = outputs.detach().clone()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20), -1))\n"
        "try:\n"
        "    outputs.sum().backward()\n"
        "except MemoryError as error:\n"
        "    print('caught:', error)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
        "print(torch.equal(selective_scan(*arguments), expected))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "caught: the native library had no memory left" in run.stdout and run.stdout.endswith("True\n")
