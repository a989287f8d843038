"""Choice of a command's device; all modules below use the device of their tensors.

Each process uses one device. Processes started by torchrun or SLURM use the device of their local rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mambacore.errors import InputError
from mambapipelines.console import note, use_threads

if TYPE_CHECKING:
    import torch

PRECISIONS: Final = ("auto", "float32", "bfloat16")
OLDEST_CAPABILITY: Final = (8, 0)
"""Minimum compute capability for `auto`: that of native bfloat16, which the kernels are written for."""

NO_CUDA: Final = "PyTorch sees no CUDA device"


@dataclass(frozen=True)
class Placement:
    """Device and precision of a process.

    Attributes:
        device: device of the model and its inputs.
        precision: `float32` or `bfloat16` for the linear layers; states, norms and the optimiser stay in float32.
        reason: why `auto` did not choose a GPU; `None` if it did, or if a device was requested.
    """

    device: torch.device
    precision: str
    reason: str | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether this is the CPU."""
        return self.device.type == "cpu"

    def autocast(self) -> torch.autocast:
        """Return the autocast context of forward passes."""
        import torch  # noqa: PLC0415 - a second to import, which `--help` does not need

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def casts_kept(self) -> torch.autocast:
        """Return a context in which all forward passes share the weights that autocast has cast.

        It does not cast by itself: forward passes enter `autocast` inside of it, and backward passes do not. Weights
        must not change before it is left.
        """
        import torch  # noqa: PLC0415

        return torch.autocast(self.device.type, torch.bfloat16, enabled=False)

    def put(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Move tensors to the device, float64 to its widest dtype; copies from pinned memory overlap computation."""
        import torch  # noqa: PLC0415

        from mambacore.devices import wide_dtype  # noqa: PLC0415

        wide = wide_dtype(self.device)
        narrowed = (tensor.to(wide) if tensor.dtype == torch.float64 else tensor for tensor in tensors)
        return tuple(tensor.to(self.device, non_blocking=tensor.is_pinned()) for tensor in narrowed)

    def describe(self) -> str:
        """Describe the placement: `cuda:0 (NVIDIA H200), bfloat16`."""
        import torch  # noqa: PLC0415

        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{name}, {self.precision}"

    def sentence(self) -> str:
        """Return the message for the user: the device, and why it is not a GPU."""
        because = f": {self.reason}" if self.reason is not None else ""
        return f"computing on {self.describe()}{because}"


def choose(device: str = "auto", precision: str = "auto") -> Placement:
    """Choose the device of this process, and make it PyTorch's current one.

    Args:
        device: `auto` (CUDA with capability 8.0 or above, else the CPU), `cpu`, `cuda` (the device of the local rank),
            `cuda:N`, `mps`, or the name of another device registered with PyTorch.
        precision: `auto` (bfloat16 if the device supports it natively), `float32` or `bfloat16`.

    Raises:
        InputError: if the device or precision is unknown or not available.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--precision is {precision!r}: use one of {', '.join(PRECISIONS)}.")
    chosen, reason = _device(device)
    if chosen.type == "cuda":
        import torch  # noqa: PLC0415

        torch.cuda.set_device(chosen)
    return Placement(chosen, _precision(precision, chosen), reason)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Inside, PyTorch takes operators that give the same bits every time, and warns of those that have none.

    The kernels of this project and everything on a CPU do so anyway.

    Args:
        wanted: else nothing is changed.
    """
    import torch  # noqa: PLC0415

    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def begin_computing(
    device: str = "auto", precision: str = "float32", threads: int | None = None, *, announced: bool = True
) -> Placement:
    """Set the number of threads and choose the device of a command that does not train.

    Args:
        device, precision: see `choose`.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        announced: report on standard error the device, unless it is the CPU, and why an existing GPU is not used.


    Raises:
        InputError: as `choose`, or if the number of threads is below 1.
    """
    use_threads(threads)
    placement = choose(device, precision)
    if announced and (not placement.is_cpu or placement.reason not in (None, NO_CUDA)):
        note(placement.sentence())
    return placement


def local_rank() -> int:
    """Return the local rank of this process, from torchrun or SLURM; 0 for a single process."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    if int(os.environ.get("SLURM_NTASKS") or 1) > 1:
        return int(os.environ.get("SLURM_LOCALID") or 0)
    return 0


def _device(text: str) -> tuple[torch.device, str | None]:
    import torch  # noqa: PLC0415

    if text == "auto":
        reason = _why_no_cuda()
        return (_cuda(local_rank()), None) if reason is None else (torch.device("cpu"), reason)
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"--device is {text!r}: use auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cpu":
        return torch.device("cpu"), None
    if device.type == "mps":
        # Only on request: sums and angles are in float32 there, and it has not been benchmarked.
        if not torch.backends.mps.is_available():
            raise InputError("--device is mps, but PyTorch finds no Apple GPU: use auto or cpu.")
        return torch.device("mps"), None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device is {text}, but PyTorch finds no CUDA device: use auto or cpu.")
        if device.index is None:
            return _cuda(local_rank()), None
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device is {text}, but this machine has {_devices()}: use one of them.")
        if local_rank() > 0:
            raise InputError(f"--device is {text} for several processes: use cuda, and each uses its own.")
        return device, None
    module = getattr(torch, device.type, None)
    if module is None or not module.is_available():
        raise InputError(f"--device is {text!r}, which is not available: use auto, cpu, cuda, cuda:N or mps.")
    return torch.device(device.type, device.index or 0), None


def _why_no_cuda() -> str | None:
    """Return why `auto` does not choose a CUDA device; `None` if it does."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return NO_CUDA
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, below "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
        )
    return None


def _cuda(rank: int) -> torch.device:
    """Return the device of a local rank; a scheduler may also expose a single device to each process."""
    import torch  # noqa: PLC0415

    count = torch.cuda.device_count()
    if rank >= count > 1:
        raise InputError(f"process {rank + 1} on this machine has no GPU, as there are only {count}: start fewer.")
    return torch.device("cuda", rank if rank < count else 0)


def _devices() -> str:
    import torch  # noqa: PLC0415

    count = torch.cuda.device_count()
    return "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"


def _precision(text: str, device: torch.device) -> str:
    """Return the precision, with `auto` resolved for the device."""
    import torch  # noqa: PLC0415

    if text != "auto":
        return text
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY else "float32"
    return "float32"
