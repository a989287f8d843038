"""A device that is not there: `import pretend_device`, and `torch.device("pretend:0")` is one, in this process.

The numbers of its tensors lie in CPU tensors, and every operator computes on these, so results are the CPU's to the
bit. What makes it worth having is what it refuses, as CUDA does: operators whose tensors lie on different devices,
`.numpy()`, and indices that are not integers. A command that runs on it would find all its tensors in their place on a
GPU. Built on PyTorch's Python interface for new devices (`_setup_privateuseone_for_python_backend`).

Run a command on it, in a process of its own:

    python tests/support/pretend_device.py genomamba train --device pretend ...
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, Final

import torch
import torch.utils._mode_utils
from torch.utils._pytree import tree_flatten, tree_map

from mambacore import devices

NAME: Final = "pretend"
DEVICE_COUNT: Final = 2
WITHOUT_FLOAT64: Final = "PRETEND_WITHOUT_FLOAT64"
"""Environment variable: the device has no float64, as Apple's GPUs."""
# Operators that carry numbers from one device to another.
TRANSFERS: Final = {"aten._to_copy", "aten.copy_", "aten.copy", "aten.set_"}
# Operators that take indices from the CPU, as CUDA's do.
INDEXING: Final = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_", "aten._unsafe_index"}
# Operators that autocast runs in low precision; the others run in the precision of their inputs.
LOW_PRECISION: Final = ("linear", "mm", "matmul", "bmm", "addmm", "conv1d", "conv2d")


class PretendModule:
    """What PyTorch asks of `torch.pretend`."""

    device = contextlib.nullcontext

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return DEVICE_COUNT

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass


class PretendTensor(torch.Tensor):
    """A tensor of the device; `numbers` is the CPU tensor behind it."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, device: torch.device) -> PretendTensor:
        if NAME in devices.WITHOUT_FLOAT64 and numbers.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"the device {NAME} has no {numbers.dtype}")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=device,
        )
        made.numbers = numbers
        return made

    def __repr__(self, **options: Any) -> str:
        return f"PretendTensor({self.numbers!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return computed(operator, arguments, options or {})

    def numpy(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy: use Tensor.cpu() first")

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.numbers.tolist()


def computed(operator: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """What an operator gives, on the device of its tensors or on the one it was asked for.

    Raises:
        RuntimeError: tensors of different devices.
    """
    name = operator.name().split(".")[0].replace("::", ".")
    flat = tree_flatten((arguments, options))[0]
    own = [tensor for tensor in flat if isinstance(tensor, PretendTensor)]
    devices = {tensor.device for tensor in own}
    if name not in TRANSFERS:
        refuse_mixture(name, operator, devices, arguments, flat)
    wanted = torch.device(options["device"]) if options.get("device") is not None else next(iter(devices), None)
    numbers, settings = tree_map(
        lambda value: value.numbers if isinstance(value, PretendTensor) else value, (arguments, options)
    )
    if settings.get("device") is not None:
        settings["device"] = torch.device("cpu")
    if "pin_memory" in settings:
        settings["pin_memory"] = False
    result = operator(*numbers, **settings)
    if name in ("aten.copy_", "aten.set_"):
        return arguments[0]
    if torch.Tag.inplace_view in operator.tags:
        # The shape of the tensor itself, whose numbers have been transposed, squeezed or the like.
        with torch.utils._mode_utils.no_dispatch():
            return operator(*arguments, **options)
    if operator._schema.is_mutable and isinstance(result, torch.Tensor):
        for tensor in own:
            if tensor.numbers is result:
                return tensor
    if isinstance(result, torch.Tensor):
        result = result.resolve_conj().resolve_neg()
    if wanted is None or wanted.type != NAME:
        return result
    device = torch.device(NAME, wanted.index or 0)
    return tree_map(lambda value: PretendTensor(value, device) if isinstance(value, torch.Tensor) else value, result)


def refuse_mixture(name: str, operator: Any, devices: set[torch.device], arguments: Any, flat: list[Any]) -> None:
    """Raise where CUDA would; tensors of a single number may lie on the CPU."""
    elsewhere = [
        tensor
        for tensor in flat
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, PretendTensor) and tensor.dim() > 0
    ]
    if len(devices) > 1:
        raise RuntimeError(f"{operator}: tensors on {', '.join(map(str, devices))}")
    if not devices or not elsewhere:
        return
    takes_indices = name in INDEXING and isinstance(arguments[0], PretendTensor)
    if takes_indices and not any(tensor.is_floating_point() for tensor in elsewhere):
        return
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in elsewhere)
    raise RuntimeError(f"{operator}: tensors of shape {shapes} on the CPU beside tensors on {next(iter(devices))}")


def _install() -> list[torch.library.Library]:
    """Teach PyTorch the device; the libraries must be kept."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=PretendModule())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(lambda operator, *arguments, **options: computed(operator, arguments, options), "PrivateUse1")
    untouched = torch.library.Library("_", "IMPL")
    untouched.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return [everything, untouched, *(_lowered(getattr(torch.ops.aten, name).default) for name in LOW_PRECISION)]


def _lowered(operator: Any) -> torch.library.Library:
    """An operator that computes in the precision of autocast."""
    library = torch.library.Library("aten", "IMPL")

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype(NAME)) if floating else value

    def in_low_precision(*arguments: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operator(*(tree_map(cast, argument) for argument in arguments), **options)

    library.impl(operator.name().split("::")[1], in_low_precision, "AutocastPrivateUse1")
    return library


def tensor_from_values(*arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which writes to memory that the device does not have."""
    made = _torch_tensor(*arguments, **options)
    if device is None:
        return made
    return made.to(device)


_torch_tensor = torch.tensor
_LIBRARIES = _install()


def patch() -> None:
    """What a process needs in which whole commands run on the device (`pretend_process`)."""
    if WITHOUT_FLOAT64 in os.environ:
        devices.WITHOUT_FLOAT64.add(NAME)
    torch.tensor = tensor_from_values
    # Views of tensors of a Python device have no place in inference mode; without gradients it computes the same.
    torch.inference_mode = torch.no_grad  # type: ignore[misc,assignment]


def main() -> int:
    """Run a command of one of the programs."""
    program, *arguments = sys.argv[1:]
    if program == "genomamba":
        from mambapipelines.cli.genomamba.main import main as command  # noqa: PLC0415
    else:
        from mambapipelines.cli.audiomamba.main import main as command  # noqa: PLC0415
    return command(arguments)


if __name__ == "__main__":
    patch()
    sys.exit(main())
