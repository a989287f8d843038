"""The state space dual scan as a registered PyTorch operator: checks, backends, shapes for the compiler, gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mambacore.backends import INPUT_DTYPES, compute_dtype, native_library_for, triton_computes
from mambacore.contracts import check_devices
from mambacore.packing import resets_before
from mambacore.ssd import causal, chunked, native
from mambacore.ssd.arguments import BACKWARD_SCHEMA, FORWARD_SCHEMA, SsdArguments, SsdGradients
from mambacore.ssd.chunked import boundary_shape


def ssd_scan(
    inputs: Tensor,
    log_decay: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    input_weight: Tensor | None = None,
    own_weight: Tensor | None = None,
    skip_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    sequence_starts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a state space model with one decay per head for all of its states (Dao & Gu, arXiv 2405.21060).

    For every head, with outer products of an input and its row of ``input_matrix``::

        state_t  = exp(log_decay_t) * state_{t-1} + input_weight_t * inputs_t input_matrix_t^T
        output_t = state_t output_matrix_t + skip_weight * inputs_t

    Because the decay is one number per head, a chunk of positions is a product of matrices.

    Args:
        inputs: (batch, length, heads, head_width), or (batch, length, rank, heads, head_width) for `rank` vectors per
            position, which are all written before any is read. float32, bfloat16, float16 or float64.
        log_decay: (batch, length, heads), at most 0 for a decaying state.
        input_matrix: (batch, length, groups, state_size), or (batch, length, rank, groups, state_size); neighbouring
            `heads / groups` heads share a group.
        output_matrix: like `input_matrix`.
        input_weight: (batch, length, heads), weight of an input in the state; 1 by default.
        own_weight: (batch, length, heads), what an input counts for in the output of its own position, where that is
            another weight than `input_weight`: the state that is read at a position then differs from the one that is
            handed on by `(own_weight - input_weight) * inputs input_matrix^T`.
        skip_weight: (heads,).
        initial_state: (batch, heads, head_width, state_size), the state before the first position; zero when absent.
        reverse: run from the last position to the first.
        return_final_state: also return the state after the last position in the direction of the scan.
        sequence_starts: (batch, length), boolean, True where a new record begins (`mambacore.packing`): the state does
            not cross into it, nor out of it in reverse.

    Returns:
        Outputs of the inputs' shape and dtype and, if asked for, the final state. States, decays and weights are
        float32, or float64 for float64 inputs. Everything is differentiable, the initial state and the final one
        included. Results repeat bit for bit for a given number of threads.

        Where what a head writes is not finite, its outputs are NaN from that position on, to the end of the record.
        The Triton kernels multiply whole chunks instead, as others do: there, earlier positions of the same chunk are
        NaN too.

    Raises:
        ValueError: if shapes do not match.
        TypeError: if a dtype is not supported.
    """
    _check(
        inputs, log_decay, input_matrix, output_matrix, input_weight, own_weight, skip_weight, initial_state,
        sequence_starts,
    )  # fmt: skip
    shape, dtype = inputs.shape, compute_dtype(inputs.dtype)
    if inputs.dim() == 5:
        inputs, input_matrix, output_matrix = (tensor.flatten(1, 2) for tensor in (inputs, input_matrix, output_matrix))
    log_decay = log_decay.to(dtype)
    arguments = SsdArguments(
        inputs,
        log_decay,
        input_matrix.to(inputs.dtype),
        output_matrix.to(inputs.dtype),
        torch.ones_like(log_decay) if input_weight is None else input_weight.to(dtype),
        None if own_weight is None else own_weight.to(dtype),
        None if skip_weight is None else skip_weight.to(dtype),
        None if initial_state is None else initial_state.to(dtype),
        None if sequence_starts is None else resets_before(sequence_starts, reverse),
        reverse,
    )
    needs_gradient = torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in arguments
    )
    outputs, final_state, _ = _forward(*arguments, needs_gradient)
    return (outputs.view(shape), final_state) if return_final_state else outputs.view(shape)


def _check(
    inputs: Tensor,
    log_decay: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    input_weight: Tensor | None,
    own_weight: Tensor | None,
    skip_weight: Tensor | None,
    initial_state: Tensor | None,
    sequence_starts: Tensor | None,
) -> None:
    """Check the arguments."""
    if inputs.dim() not in (4, 5):
        raise ValueError(
            "inputs must be (batch, length, heads, head_width) or (batch, length, rank, heads, head_width) but has "
            f"shape {tuple(inputs.shape)}"
        )
    if inputs.dtype not in INPUT_DTYPES:
        raise TypeError(f"inputs must be float32, bfloat16, float16 or float64 but is {inputs.dtype}; convert it first")
    *outer, heads, head_width = inputs.shape
    batch, length = outer[:2]
    if inputs.dim() == 5 and outer[2] < 1:
        raise ValueError(f"inputs must have a rank of 1 or more but has shape {tuple(inputs.shape)}")
    fits = input_matrix.dim() == inputs.dim() and list(input_matrix.shape[:-2]) == outer
    groups = input_matrix.shape[-2] if fits else 0
    if groups < 1 or heads % groups:
        raise ValueError(
            f"input_matrix must be {(*outer, 'groups', 'state_size')} with groups that divide the {heads} heads but "
            f"has shape {tuple(input_matrix.shape)}"
        )
    if output_matrix.shape != input_matrix.shape:
        raise ValueError(
            f"output_matrix must have the shape of input_matrix {tuple(input_matrix.shape)} but has "
            f"{tuple(output_matrix.shape)}"
        )
    expected = {
        "log_decay": (log_decay, (batch, length, heads)),
        "input_weight": (input_weight, (batch, length, heads)),
        "own_weight": (own_weight, (batch, length, heads)),
        "skip_weight": (skip_weight, (heads,)),
        "initial_state": (initial_state, (batch, heads, head_width, input_matrix.shape[-1])),
        "sequence_starts": (sequence_starts, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to fit the inputs but has {tuple(tensor.shape)}")
    if sequence_starts is not None and sequence_starts.dtype != torch.bool:
        raise TypeError(f"sequence_starts must be boolean but is {sequence_starts.dtype}")
    matrices = {"input_matrix": input_matrix, "output_matrix": output_matrix}
    check_devices(inputs, matrices | {name: tensor for name, (tensor, _) in expected.items()})


@torch.library.custom_op("mambacore::ssd_scan_forward", mutates_args=(), schema=FORWARD_SCHEMA)
def _forward(*given):
    arguments, keep_boundaries = SsdArguments(*given[:-1]), given[-1]
    filled = arguments.inputs.numel() > 0 and arguments.input_matrix.numel() > 0
    if filled and triton_computes(arguments.inputs):
        from mambacore.ssd import triton  # noqa: PLC0415  only where there is Triton

        return triton.forward(arguments, keep_boundaries)
    library = native_library_for(arguments.inputs) if filled else None
    compute = chunked.forward if library is None else partial(native.forward, library)
    return causal.forward(compute, arguments, keep_boundaries)


@_forward.register_fake
def _(*given):
    arguments, keep_boundaries = SsdArguments(*given[:-1]), given[-1]
    batch, heads, _, state_size, head_width = arguments.sizes
    kept = arguments.length if keep_boundaries else 0
    return (
        arguments.inputs.new_empty(arguments.inputs.shape),
        arguments.log_decay.new_empty(batch, heads, head_width, state_size),
        arguments.log_decay.new_empty(boundary_shape(batch, kept, heads, head_width, state_size, arguments.rank)),
    )


@torch.library.custom_op("mambacore::ssd_scan_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _backward(grad_outputs, grad_final_state, *given):
    arguments, boundary_states = SsdArguments(*given[:-1]), given[-1]
    filled = arguments.inputs.numel() > 0 and arguments.input_matrix.numel() > 0
    if filled and triton_computes(arguments.inputs):
        from mambacore.ssd import triton  # noqa: PLC0415  only where there is Triton

        return triton.backward(grad_outputs, grad_final_state, arguments, boundary_states)
    library = native_library_for(arguments.inputs) if filled else None
    if library is None:
        return chunked.backward(grad_outputs, grad_final_state, arguments, boundary_states)
    return native.backward(library, grad_outputs, grad_final_state, arguments, boundary_states)


@_backward.register_fake
def _(grad_outputs, grad_final_state, *given):
    arguments = SsdArguments(*given[:-1])

    def like(tensor: Tensor | None) -> Tensor:
        return arguments.log_decay.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    batch, heads, _, state_size, head_width = arguments.sizes
    return (
        *(like(getattr(arguments, name)) for name in SsdGradients._fields[:-1]),
        arguments.log_decay.new_empty(batch, heads, head_width, state_size),
    )


def _keep_for_backward(ctx, inputs, output) -> None:
    arguments, keep_boundaries = SsdArguments(*inputs[:-1]), inputs[-1]
    ctx.save_for_backward(*arguments[:-1], output[2] if keep_boundaries else None)
    ctx.reverse = arguments.reverse


def _gradient(ctx, grad_outputs, grad_final_state, _grad_boundaries):
    *tensors, boundary_states = ctx.saved_tensors
    arguments = SsdArguments._make((*tensors, ctx.reverse))
    if boundary_states is None:  # a graph that was exported or traced without gradients
        boundary_states = _forward(*arguments, True)[2]
    grads = _backward(grad_outputs, grad_final_state, *arguments, boundary_states)
    wanted = (None if tensor is None else grad for grad, tensor in zip(grads, arguments, strict=False))
    return (*wanted, None, None, None)


_forward.register_autograd(_gradient, setup_context=_keep_for_backward)
