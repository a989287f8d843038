"""The state space dual scan as a registered PyTorch operator: checks, backends, shapes for the compiler, gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mambacore.backends import INPUT_DTYPES, compute_dtype, native_library_for, triton_computes
from mambacore.packing import resets_before
from mambacore.ssd import causal, chunked, native
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
    """Run a state space model whose states fade alike in each head (Dao & Gu, arXiv 2405.21060).

    For every head, with outer products of an input and its row of ``input_matrix``::

        state_t  = exp(log_decay_t) * state_{t-1} + input_weight_t * inputs_t input_matrix_t^T
        output_t = state_t output_matrix_t + skip_weight * inputs_t

    Because the decay is one number per head, a chunk of positions is a product of matrices.

    Args:
        inputs: (batch, length, heads, head_width), or (batch, length, rank, heads, head_width) for `rank` vectors per
            position, which are all written before any is read. float32, bfloat16, float16 or float64.
        log_decay: (batch, length, heads), at most 0 for a state that fades.
        input_matrix: (batch, length, groups, state_size), or (batch, length, rank, groups, state_size); neighbouring
            `heads / groups` heads share a group.
        output_matrix: like `input_matrix`.
        input_weight: (batch, length, heads), what an input counts for; 1 when absent.
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
        ValueError: shapes that do not fit each other.
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
    arguments = (
        inputs,
        log_decay,
        input_matrix.to(inputs.dtype),
        output_matrix.to(inputs.dtype),
        torch.ones_like(log_decay) if input_weight is None else input_weight.to(dtype),
        *(None if tensor is None else tensor.to(dtype) for tensor in (own_weight, skip_weight, initial_state)),
        None if sequence_starts is None else resets_before(sequence_starts, reverse),
    )
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in arguments
    )
    outputs, final_state, _ = _forward(*arguments, reverse, needs_gradient)
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
    """Refuse what does not fit, naming the argument."""
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


@torch.library.custom_op("mambacore::ssd_scan_forward", mutates_args=())
def _forward(
    inputs: Tensor,
    log_decay: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    input_weight: Tensor,
    own_weight: Tensor | None,
    skip_weight: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    keep_boundaries: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (
        inputs, log_decay, input_matrix, output_matrix, input_weight, own_weight, skip_weight, initial_state, resets,
        reverse, keep_boundaries,
    )  # fmt: skip
    filled = inputs.numel() > 0 and input_matrix.numel() > 0
    if filled and triton_computes(inputs):
        from mambacore.ssd import triton  # noqa: PLC0415  only where there is Triton

        return triton.forward(*arguments)
    library = native_library_for(inputs) if filled else None
    return causal.forward(chunked.forward if library is None else partial(native.forward, library), *arguments)


@_forward.register_fake
def _(inputs, log_decay, input_matrix, output_matrix, input_weight, own_weight, skip_weight, initial_state, resets,
      reverse, keep_boundaries):  # fmt: skip
    batch, rows, heads, head_width = inputs.shape
    length, state_size = log_decay.shape[1], input_matrix.shape[-1]
    rank = rows // length if length else 1
    boundaries = boundary_shape(batch, length if keep_boundaries else 0, heads, head_width, state_size, rank)
    return (
        inputs.new_empty(inputs.shape),
        log_decay.new_empty(batch, heads, head_width, state_size),
        log_decay.new_empty(boundaries),
    )


@torch.library.custom_op("mambacore::ssd_scan_backward", mutates_args=())
def _backward(
    grad_outputs: Tensor,
    grad_final_state: Tensor | None,
    inputs: Tensor,
    log_decay: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    input_weight: Tensor,
    own_weight: Tensor | None,
    skip_weight: Tensor | None,
    resets: Tensor | None,
    boundary_states: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (
        grad_outputs, grad_final_state, inputs, log_decay, input_matrix, output_matrix, input_weight, own_weight,
        skip_weight, resets, boundary_states, reverse,
    )  # fmt: skip
    filled = inputs.numel() > 0 and input_matrix.numel() > 0
    library = native_library_for(inputs) if filled and not triton_computes(inputs) else None
    return chunked.backward(*arguments) if library is None else native.backward(library, *arguments)


@_backward.register_fake
def _(grad_outputs, grad_final_state, inputs, log_decay, input_matrix, output_matrix, input_weight, own_weight,
      skip_weight, resets, boundary_states, reverse):  # fmt: skip
    def like(tensor: Tensor | None) -> Tensor:
        return log_decay.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    batch, _, heads, head_width = inputs.shape
    return (
        like(inputs), like(log_decay), like(input_matrix), like(output_matrix), like(input_weight), like(own_weight),
        like(skip_weight), log_decay.new_empty(batch, heads, head_width, input_matrix.shape[-1]),
    )  # fmt: skip


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, initial_state, resets, reverse, keep_boundaries = inputs
    if not keep_boundaries:
        raise RuntimeError("the scan was run without keep_boundaries, so it has no gradient; call ssd_scan instead")
    ctx.save_for_backward(*tensors, resets, output[2])
    ctx.has_initial_state, ctx.reverse = initial_state is not None, reverse


def _gradient(ctx, grad_outputs, grad_final_state, _grad_boundaries):
    *tensors, resets, boundary_states = ctx.saved_tensors
    grads = _backward(grad_outputs, grad_final_state, *tensors, resets, boundary_states, ctx.reverse)
    present = [tensor is not None for tensor in tensors] + [ctx.has_initial_state]
    wanted = (grad if there else None for grad, there in zip(grads, present, strict=True))
    return (*wanted, None, None, None)


_forward.register_autograd(_gradient, setup_context=_keep_for_backward)
