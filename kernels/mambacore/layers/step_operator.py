"""What the registered operators of single positions share: their definition, the checks of their arguments, and when
blocks may call them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from mambacore.backends import ELEMENT_TYPES, INPUT_DTYPES, native_library_for, wanted_backend
from mambacore.contracts import Expected, check_devices, check_sequence, check_shapes, refuse_tangents
from mambacore.layers.norm import root_mean_square_norm
from mambacore.native_library import DualStep, Library
from mambacore.vmap import vmap_by_loop

# Up to this many sequences, which share each weight that is read, one call is faster than matrix products.
LARGEST_BATCH = 64

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def schema_of(parameters: type[tuple[Any, ...]], optional: Iterable[str] = ()) -> str:
    """Return the part of an operator's schema for a named tuple of tensors, some of which may be absent."""
    absent = tuple(optional)
    return ", ".join(f"Tensor{'?' if name in absent else ''} {name}" for name in parameters._fields)  # type: ignore[attr-defined]


def define_step(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> torch.library.Library:
    """Define `mambacore::name`, which computes on any device, refuses gradients, and is mapped by `vmap` item by item.

    It is defined directly in the dispatcher: the wrapper of `torch.library.custom_op` takes longer than a step.

    Args:
        name: name of the operator.
        schema: its arguments and results.
        compute: computes the results.
        fake: the same for tensors without numbers.

    Returns:
        What keeps the definition alive.
    """
    library = torch.library.Library("mambacore", "FRAGMENT")
    library.define(name + schema)
    operator = getattr(torch.ops.mambacore, name).default

    def refuse_gradients(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:  # names take time
            tensors = (one for one in arguments if isinstance(one, Tensor))
            refuse_tangents({f"tensor {number}": one for number, one in enumerate(tensors)})
        if torch.is_grad_enabled() and any(
            isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
        ):
            raise RuntimeError(
                f"mambacore::{name} computes no gradients but one of its tensors requires one; "
                "call the block itself, whose operators do, or run under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    library.impl(name, compute, "CompositeExplicitAutograd")
    library.impl(name, refuse_gradients, "Autograd")
    torch.library.register_fake(f"mambacore::{name}", fake, lib=library)
    vmap_by_loop(operator, library)
    return library


def check_step(
    sequence: Tensor,
    parameters: tuple[Tensor | None, ...],
    shapes: Sequence[tuple[int, ...]],
    states: Sequence[Tensor | None],
    state_shapes: Sequence[tuple[int, ...]],
    state_names: Sequence[str],
) -> None:
    """Check the arguments of a step, with a single comparison if all are valid.

    Args:
        sequence: (batch, 1, model_width).
        parameters: a named tuple of the block's parameters, the weight of the norm (model_width,) first.
        shapes: the shape that each must have.
        states: the parts of the state before this position.
        state_shapes: the shape that each must have.
        state_names: their names.

    Raises:
        ValueError: if shapes do not match, or tensors are on different devices.
        TypeError: if a dtype is not supported, or parameters have several dtypes.
    """
    device, dtype, batch = sequence.device, sequence.dtype, sequence.shape[0]
    if (
        sequence.shape == (batch, 1, *shapes[0])
        and dtype in INPUT_DTYPES
        and all(
            parameter is None or (parameter.shape == shape and parameter.dtype == dtype and parameter.device == device)
            for parameter, shape in zip(parameters, shapes, strict=True)
        )
        and all(
            state is None or (state.shape == shape and state.device == device)
            for state, shape in zip(states, state_shapes, strict=True)
        )
    ):
        return
    named: dict[str, Tensor | None] = parameters._asdict()  # type: ignore[attr-defined]
    held = dict(zip(state_names, states, strict=True))
    check_sequence("sequence", sequence)
    check_shapes({"sequence": Expected(sequence, (batch, 1, *shapes[0]), "give one position of the model's width")},
                 of="norm_weight")  # fmt: skip
    remedy = "take the parameters of one block"
    check_shapes(
        {name: Expected(named[name], shape, remedy) for name, shape in zip(named, shapes, strict=True)},
        of="other parameters",
    )
    hand_on = "pass the state of the same batch and block"
    check_shapes(
        {name: Expected(held[name], shape, hand_on) for name, shape in zip(held, state_shapes, strict=True)},
        of="sequence and parameters",
    )
    check_devices(sequence, named | held, of="sequence")
    for name, parameter in named.items():
        if parameter is not None and parameter.dtype != dtype:
            raise TypeError(
                f"{name} must have the dtype of the sequence, {dtype}, but is {parameter.dtype}; "
                "convert the block or the sequence"
            )


def steps_in_library(sequence: Tensor, parameters: Iterable[Tensor | None]) -> bool:
    """Return whether blocks compute this sequence with these parameters by one call of the native library."""
    return (
        not torch.is_grad_enabled()
        and sequence.shape[1] == 1
        and 0 < sequence.shape[0] <= LARGEST_BATCH
        and not torch.is_autocast_enabled("cpu")
        and wanted_backend() != "triton"
        and all(parameter is None or parameter.dtype == sequence.dtype for parameter in parameters)
        and native_library_for(sequence) is not None
    )


def dual_library_for(sequence: Tensor) -> Library | None:
    """Return the native library if it is to compute the step of a Mamba-2 or Mamba-3 block, else None."""
    library = None if wanted_backend() == "triton" else native_library_for(sequence)
    return library if library is not None and library.has_dual_step else None


def dual_step(
    library: Library,
    sequence: Tensor,
    parameters: Mapping[str, Tensor | None],
    states: Mapping[str, Tensor | None],
    found: Sequence[Tensor],
    **sizes: Any,
) -> None:
    """Compute the step of a Mamba-2 or Mamba-3 block in one call of the native library.

    Parameters, the parts of the state before this position and sizes have their names in `DualStep`. The outputs, and
    the parts of the state after it in the same order, are written to `found`.
    """
    outputs, *after = found
    before = {
        name: None if state is None else state.to(new.dtype)
        for (name, state), new in zip(states.items(), after, strict=True)
    }
    read = {"sequence": sequence, **parameters, **before}
    kept = {name: tensor.contiguous() for name, tensor in read.items() if tensor is not None}
    written = {"outputs": outputs} | {f"new_{name}": new for name, new in zip(states, after, strict=True)}
    addresses = {name: tensor.data_ptr() for name, tensor in (kept | written).items()}
    library.dual_step(
        DualStep(
            batch=sequence.shape[0], model_width=sequence.shape[2], element=ELEMENT_TYPES[sequence.dtype],
            threads=torch.get_num_threads(), **sizes, **addresses,
        )
    )  # fmt: skip


def by_mixer(
    mixer: Any,
    state_kind: Callable[..., Any],
    sequence: Tensor,
    parameters: Any,
    epsilon: float,
    states: Sequence[Tensor | None],
    found: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Compute the step of a block by its norm and projections, and the operators of its mixer between them.

    `found` has the shapes and dtypes of the outputs and of the parts of the state, which `state_kind` puts together;
    parts that are absent are zeros. Returns the outputs and the parts of the state after this position.
    """
    before = (
        torch.zeros_like(new) if state is None else state.to(new.dtype)
        for state, new in zip(states, found[1:], strict=True)
    )
    normalised = root_mean_square_norm(sequence, parameters.norm_weight, epsilon)
    projected = F.linear(normalised, parameters.input_weight, getattr(parameters, "input_bias", None))
    outputs, state = mixer.mix(projected, state_kind(*before), None, reverse=False)
    projected = F.linear(outputs, parameters.output_weight, getattr(parameters, "output_bias", None))
    return sequence + projected, *state


def with_parameters(mixer: ModuleType, tensors: Mapping[str, Tensor | None]) -> ModuleType:
    """Give a mixer that was built without memory these parameters, by their paths in it; None removes one."""
    for path, tensor in tensors.items():
        module, _, name = path.rpartition(".")
        parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        setattr(mixer.get_submodule(module), name, parameter)
    return mixer
