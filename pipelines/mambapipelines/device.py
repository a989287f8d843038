"""The one place that decides where a command computes; every module below takes the device of its tensors.

One process owns one device. Several processes, started by torchrun or SLURM, each take the device of their local rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mambacore.errors import InputError
from mambapipelines.console import note, use_threads

if TYPE_CHECKING:
    import torch

PRECISIONS: Final = ("auto", "float32", "bfloat16")
OLDEST_CAPABILITY: Final = (8, 0)
"""Of CUDA devices that `auto` takes: those that multiply in bfloat16, which the kernels are written for."""

NO_CUDA: Final = "PyTorch sees no CUDA device"


@dataclass(frozen=True)
class Placement:
    """Where and how a process computes.

    Attributes:
        device: of the model and of all that it reads.
        precision: `float32` or `bfloat16`, of the linear layers; states, norms and the optimiser stay in float32.
        reason: why `auto` did not take a GPU, one sentence; `None` where it did, or where a device was asked for.
    """

    device: torch.device
    precision: str
    reason: str | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether this is the CPU."""
        return self.device.type == "cpu"

    def autocast(self) -> torch.autocast:
        """The context in which a forward pass has the precision."""
        import torch  # noqa: PLC0415 - a second to import, which `--help` does not need

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def put(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The tensors on the device, float64 in its widest type; copies from pinned memory overlap the computation."""
        import torch  # noqa: PLC0415

        from mambacore.devices import wide_dtype  # noqa: PLC0415

        wide = wide_dtype(self.device)
        narrowed = (tensor.to(wide) if tensor.dtype == torch.float64 else tensor for tensor in tensors)
        return tuple(tensor.to(self.device, non_blocking=tensor.is_pinned()) for tensor in narrowed)

    def describe(self) -> str:
        """In words: `cuda:0 (NVIDIA H200), bfloat16`."""
        import torch  # noqa: PLC0415

        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{name}, {self.precision}"

    def sentence(self) -> str:
        """What the user is told: where it is computed, and why not on a GPU."""
        because = f": {self.reason}" if self.reason is not None else ""
        return f"computing on {self.describe()}{because}"


def choose(device: str = "auto", precision: str = "auto") -> Placement:
    """Decide where this process computes, and make that device PyTorch's current one.

    Args:
        device: `auto` (CUDA with capability 8.0 or above, else the CPU), `cpu`, `cuda` (the device of the local rank),
            `cuda:N`, `mps`, or the name of another device that PyTorch has been taught.
        precision: `auto` (bfloat16 where the device multiplies in it), `float32` or `bfloat16`.

    Raises:
        InputError: an unknown device or precision, or one that this machine lacks.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--precision is {precision!r}: use one of {', '.join(PRECISIONS)}.")
    chosen, reason = _device(device)
    if chosen.type == "cuda":
        import torch  # noqa: PLC0415

        torch.cuda.set_device(chosen)
    return Placement(chosen, _precision(precision, chosen), reason)


def begin_computing(
    device: str = "auto", precision: str = "float32", threads: int | None = None, *, announced: bool = True
) -> Placement:
    """Set the threads and decide where a command computes that trains nothing.

    Args:
        device, precision: see `choose`.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        announced: say on standard error which device it is unless it is the CPU, and why a GPU that is there is not
            used.

    Raises:
        InputError: as `choose`, or fewer threads than one.
    """
    use_threads(threads)
    placement = choose(device, precision)
    if announced and (not placement.is_cpu or placement.reason not in (None, NO_CUDA)):
        note(placement.sentence())
    return placement


def local_rank() -> int:
    """The number of this process among those on this machine, as torchrun or SLURM tell it; 0 for one alone."""
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
        # Only when asked for: sums and angles are in float32 there, and nothing has been measured on it.
        if not torch.backends.mps.is_available():
            raise InputError("--device is mps, and PyTorch sees no Apple GPU here: use auto or cpu.")
        return torch.device("mps"), None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device is {text}, and PyTorch sees no CUDA device here: use auto or cpu.")
        if device.index is None:
            return _cuda(local_rank()), None
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device is {text}, and this machine has {_devices()}: use one of them.")
        if local_rank() > 0:
            raise InputError(f"--device is {text} for several processes: use cuda, and each takes its own.")
        return device, None
    module = getattr(torch, device.type, None)
    if module is None or not module.is_available():
        raise InputError(f"--device is {text!r}, which this machine lacks: use auto, cpu, cuda, cuda:N or mps.")
    return torch.device(device.type, device.index or 0), None


def _why_no_cuda() -> str | None:
    """Why `auto` does not take a CUDA device; `None` if it does."""
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
    """The device of a local rank; a scheduler may also show each process a single device."""
    import torch  # noqa: PLC0415

    count = torch.cuda.device_count()
    if rank >= count > 1:
        raise InputError(f"process {rank + 1} on this machine has no GPU, of which there are {count}: start fewer.")
    return torch.device("cuda", rank if rank < count else 0)


def _devices() -> str:
    import torch  # noqa: PLC0415

    count = torch.cuda.device_count()
    return "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"


def _precision(text: str, device: torch.device) -> str:
    """The precision, `auto` resolved for the device."""
    import torch  # noqa: PLC0415

    if text != "auto":
        return text
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY else "float32"
    return "float32"
