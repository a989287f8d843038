"""Which implementation computes: ``native`` (the C++ library, CPU tensors), ``mamba_ssm`` (the package's scan, CUDA
tensors) or ``torch`` (plain PyTorch, anything).
"""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from mambacore.native import Library, native_library, native_problem

BACKENDS = ("native", "mamba_ssm", "torch")
BACKEND_VARIABLE = "MAMBACORE_BACKEND"
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

# torch.dtype.to_complex, which the compiler does not know.
COMPLEX_OVER = {torch.float32: torch.complex64, torch.float64: torch.complex128}

_forced: ContextVar[str | None] = ContextVar("mambacore_backend", default=None)


def compute_dtype(element_dtype: torch.dtype) -> torch.dtype:
    """What states and parameters are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if element_dtype == torch.float64 else torch.float32


def state_dtype(element_dtype: torch.dtype, is_complex: bool) -> torch.dtype:
    """What a state is kept in: the compute dtype, or the complex numbers over it."""
    dtype = compute_dtype(element_dtype)
    return COMPLEX_OVER[dtype] if is_complex else dtype


def backends() -> dict[str, str]:
    """What there is: backend name to ``"available ..."`` or the reason why not.

    Finding out about mamba-ssm imports it.
    """
    from mambacore.scan.mamba_ssm import scan_function  # noqa: PLC0415  the scan imports this module

    function, reason = scan_function()
    problem = native_problem()
    native = native_library() if problem is None else None
    return {
        "native": f"available ({native.instruction_set})" if native is not None else f"unavailable: {problem}",
        "mamba_ssm": "available for CUDA tensors" if function is not None else f"unavailable: {reason}",
        "torch": "available",
    }


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with the named backend inside the ``with`` block, whatever would be chosen otherwise."""
    _check(name, "use_backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def wanted_backend() -> str | None:
    """The backend that is forced here, by ``use_backend`` or by the environment, or None."""
    wanted = _forced.get() or os.environ.get(BACKEND_VARIABLE)
    if wanted:
        _check(wanted, BACKEND_VARIABLE)
    return wanted or None


def native_library_for(inputs: Tensor) -> Library | None:
    """The native library when it should compute for these inputs, else None."""
    wanted = wanted_backend()
    if wanted == "torch":
        return None
    fits = inputs.device.type == "cpu" and inputs.dtype in ELEMENT_TYPES
    found = native_library() if fits else None
    if wanted == "native" and found is None:
        reason = native_problem() if fits else f"it does not take {inputs.dtype} tensors on {inputs.device}"
        raise RuntimeError(f"the native backend was asked for but cannot be used: {reason}")
    return found


def _check(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where} names the backend {name!r}; choose one of {', '.join(BACKENDS)}")
