"""Choice of the implementation: `native` (the C++ library, CPU tensors), `triton` (kernels for CUDA tensors),
`mamba_ssm` (the package's scan, CUDA tensors) or `torch` (plain PyTorch, any tensors).

Unless one is requested by name, the first that supports the tensors is used, whatever their size (each adapts its
number of threads or programs to the size):

| tensors | order |
| --- | --- |
| CPU: float32, bfloat16, float64 | native, torch |
| CPU: float16 | torch |
| CUDA: float32, bfloat16, float16 | triton, mamba_ssm (scan only, if applicable), torch |
| CUDA: float64; other devices | torch |
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from mambacore.native_library import Library, native_library, native_problem

BACKENDS = ("native", "triton", "mamba_ssm", "torch")
BACKEND_VARIABLE = "MAMBACORE_BACKEND"
# Triton's own variable: with it, our kernels accept CPU tensors, which Triton interprets.
INTERPRET_VARIABLE = "TRITON_INTERPRET"
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INPUT_DTYPES = (*ELEMENT_TYPES, torch.float16)
# Bfloat16 arithmetic and Triton's support begin with the Ampere generation.
OLDEST_CAPABILITY = (8, 0)

# torch.dtype.to_complex, which torch.compile does not support.
COMPLEX_OVER = {torch.float32: torch.complex64, torch.float64: torch.complex128}

_forced: ContextVar[str | None] = ContextVar("mambacore_backend", default=None)


def compute_dtype(element_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and parameters: float64 for float64, float32 for everything else."""
    return torch.float64 if element_dtype == torch.float64 else torch.float32


def state_dtype(element_dtype: torch.dtype, is_complex: bool) -> torch.dtype:
    """Return the dtype of a state: the compute dtype, or its complex counterpart."""
    dtype = compute_dtype(element_dtype)
    return COMPLEX_OVER[dtype] if is_complex else dtype


def backends() -> dict[str, str]:
    """Return for each backend `"available ..."` or the reason why it is not.

    Checking for mamba-ssm imports it.
    """
    from mambacore.scan.mamba_ssm import scan_function  # noqa: PLC0415  the scan imports this module

    function, reason = scan_function()
    problem = native_problem()
    native = native_library() if problem is None else None
    of_triton = triton_problem() or _device_problem()
    return {
        "triton": "available for CUDA tensors" if of_triton is None else f"unavailable: {of_triton}",
        "native": f"available ({native.instruction_set})" if native is not None else f"unavailable: {problem}",
        "mamba_ssm": "available for CUDA tensors" if function is not None else f"unavailable: {reason}",
        "torch": "available",
    }


@functools.cache
def triton_problem() -> str | None:
    """Return why Triton cannot be used at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (on Linux it comes with torch)"
    try:
        import triton  # noqa: F401, PLC0415  absent on macOS
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported: {error}"
    return None


def _device_problem() -> str | None:
    """Return why there is no device for the kernels, or None."""
    if not torch.cuda.is_available():
        return f"there is no CUDA device (with {INTERPRET_VARIABLE}=1 it is interpreted on CPU tensors, for tests)"
    if torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return "the device is older than compute capability {}.{}".format(*OLDEST_CAPABILITY)
    return None


def _triton_refusal(inputs: Tensor) -> str | None:
    """Return why the kernels do not support these inputs, or None."""
    if inputs.dtype not in TRITON_DTYPES:
        return f"it does not support {inputs.dtype} tensors"
    if triton_problem() is not None:
        return triton_problem()
    if inputs.device.type == "cpu":
        interpreted = os.environ.get(INTERPRET_VARIABLE) == "1"
        return None if interpreted else f"CPU tensors are only interpreted, for tests, when {INTERPRET_VARIABLE}=1"
    return _device_problem() if inputs.device.type == "cuda" else f"it does not support tensors on {inputs.device}"


def triton_computes(inputs: Tensor) -> bool:
    """Return whether to use the GPU kernels for these inputs: by name, or because their device supports them.

    Raises:
        RuntimeError: if they were requested by name but cannot be used.
    """
    wanted = wanted_backend()
    if wanted not in (None, "triton") or (wanted is None and inputs.device.type != "cuda"):
        return False
    refusal = _triton_refusal(inputs)
    if wanted == "triton" and refusal is not None:
        raise RuntimeError(f"the triton backend was requested but cannot be used: {refusal}")
    return refusal is None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the named backend inside the `with` block, overriding the default choice."""
    _check(name, "use_backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def wanted_backend() -> str | None:
    """Return the backend requested by `use_backend` or by the environment, or None."""
    wanted = _forced.get() or os.environ.get(BACKEND_VARIABLE)
    if wanted:
        _check(wanted, BACKEND_VARIABLE)
    return wanted or None


def native_library_for(inputs: Tensor) -> Library | None:
    """Return the native library if it is to be used for these inputs, else None."""
    wanted = wanted_backend()
    if wanted == "torch":
        return None
    fits = inputs.device.type == "cpu" and inputs.dtype in ELEMENT_TYPES
    found = native_library() if fits else None
    if wanted == "native" and found is None:
        reason = native_problem() if fits else f"it does not support {inputs.dtype} tensors on {inputs.device}"
        raise RuntimeError(f"the native backend was requested but cannot be used: {reason}")
    return found


def _check(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where} names the backend {name!r}; choose one of {', '.join(BACKENDS)}")
