"""The optional mamba-ssm backend: used when it works, never in the way when it does not.

Its package needs CUDA, so a stand-in with the published signature and layout takes its place here.
"""

import subprocess
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from mambacore import backends, selective_scan, use_backend
from mambacore.scan import selective_scan_reference
from mambacore.scan.mamba_ssm import scan_function
from scan_cases import complex_scan_arguments, leaves, scan_arguments, time_invariant
from tolerances import COMPLEX_FLOAT32, relative_error

MODULE = "mamba_ssm.ops.selective_scan_interface"


def stand_in(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):  # noqa: N803
    """The operator in its layout: u, delta, z (batch, channels, length); B, C (batch, groups, states, length) with
    complex numbers as pairs along the length, or (channels, states).
    """

    def per_channel(matrix):
        if matrix.dim() == 2:
            return matrix[None, :, :, None]
        if A.is_complex():
            matrix = torch.view_as_complex(matrix.unflatten(-1, (-1, 2)).contiguous())
        return matrix.repeat_interleave(u.shape[1] // matrix.shape[1], dim=1)

    into, out_of = per_channel(B), per_channel(C)
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    state, outputs = u.new_zeros(u.shape[0], *A.shape, dtype=A.dtype), []
    for position in range(u.shape[2]):
        at = slice(position, position + 1)
        decay = torch.exp(step[:, :, at] * A)
        drive = step[:, :, at] * u[:, :, at]
        state = decay * state + drive * into[..., min(position, into.shape[-1] - 1)]
        product = (state * out_of[..., min(position, out_of.shape[-1] - 1)]).sum(-1)
        outputs.append(2 * product.real if A.is_complex() else product)
    result = torch.stack(outputs, dim=2)
    result = result if D is None else result + D[:, None] * u
    result = (result if z is None else result * F.silu(z)).to(u.dtype)
    return (result, state) if return_last_state else result


@pytest.fixture
def package(monkeypatch):
    """Puts a package in the place of mamba-ssm; None: one that cannot be imported."""

    def put(function):
        scan_function.cache_clear()
        for name in ("mamba_ssm", "mamba_ssm.ops", MODULE):
            module = types.ModuleType(name)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, name, module)
        if function is None:
            monkeypatch.delitem(sys.modules, MODULE)
            return
        sys.modules[MODULE].selective_scan_fn = function

    yield put
    scan_function.cache_clear()


CASES = {
    "real": lambda: scan_arguments(2, 9, 6, 3, groups=3),
    "complex": lambda: complex_scan_arguments(2, 9, 6, 3),
    "fixed": lambda: time_invariant(scan_arguments(2, 9, 6, 3), ("input_matrix", "output_matrix")),
    "complex, input fixed": lambda: time_invariant(complex_scan_arguments(2, 9, 6, 3), ("input_matrix",)),
    "nothing optional": lambda: scan_arguments(2, 9, 6, 3, everything=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_is_given_its_own_layout(case, package):
    package(stand_in)
    arguments = {name: tensor for name, tensor in case().items() if name != "initial_state"}
    wide, narrow = leaves(arguments, torch.float64), leaves(arguments, torch.float32)
    expected, expected_state = selective_scan_reference(**wide, step_softplus=True)
    with use_backend("mamba_ssm"):
        found, state = selective_scan(**narrow, step_softplus=True, return_final_state=True)
    assert relative_error(found, expected) < COMPLEX_FLOAT32 and relative_error(state, expected_state) < COMPLEX_FLOAT32
    expected.sum().backward()
    found.sum().backward()
    for name, tensor in wide.items():
        assert relative_error(narrow[name].grad, tensor.grad) < COMPLEX_FLOAT32, name


def test_a_gradient_of_the_final_state_is_refused_rather_than_dropped(package):
    package(stand_in)
    arguments = leaves(scan_arguments(1, 4, 2, 3, everything=False), torch.float32)
    with use_backend("mamba_ssm"):
        _, state = selective_scan(**arguments, step_softplus=True, return_final_state=True)
    with pytest.raises(RuntimeError, match="no gradient for the final state"):
        state.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial_state": torch.zeros(1, 2, 3)}, "cannot start from a state"),
        ({"reverse": True}, "cannot walk in reverse"),
        ({"sequence_starts": torch.ones(1, 4, dtype=torch.bool)}, "cannot reset states"),
    ],
)
def test_what_it_cannot_do_is_refused_when_it_was_asked_for(change, message, package):
    package(stand_in)
    arguments = {name: tensor.float() for name, tensor in scan_arguments(1, 4, 2, 3, everything=False).items()}
    with use_backend("mamba_ssm"), pytest.raises(RuntimeError, match=message):
        selective_scan(**arguments, **change)


def test_a_package_that_cannot_be_imported_is_a_reason_and_no_more(package):
    package(None)
    arguments = {name: tensor.float() for name, tensor in scan_arguments(1, 4, 2, 3).items()}
    assert torch.isfinite(selective_scan(**arguments)).all()
    assert backends()["mamba_ssm"].startswith("unavailable: mamba-ssm cannot be imported")
    del arguments["initial_state"]
    with use_backend("mamba_ssm"), pytest.raises(RuntimeError, match="was requested but cannot be used"):
        selective_scan(**arguments)


def test_cuda_is_not_needed_and_nothing_is_imported_before_it_is_asked_for(tmp_path):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(
        "raise OSError('libcudart.so.12: cannot open shared object file')"
    )
    script = (
        "import sys, torch, mambacore\n"
        "inputs = torch.randn(1, 5, 2)\n"
        "mambacore.selective_scan(inputs, inputs, -torch.ones(2, 1), inputs[..., :1], inputs[..., :1])\n"
        "assert not any(name.startswith('mamba_ssm') for name in sys.modules), 'imported'\n"
        "print(mambacore.backends()['mamba_ssm'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "libcudart.so.12: cannot open shared object file" in done.stdout
