"""The selective scan as a registered PyTorch operator: checks, backends, shapes for the compiler, and gradients."""

import torch
from torch import Tensor

from mambacore.backends import (
    INPUT_DTYPES,
    compute_dtype,
    native_library_for,
    state_dtype,
    triton_computes,
    wanted_backend,
)
from mambacore.packing import resets_before
from mambacore.scan import fallback, mamba_ssm, native
from mambacore.scan.fallback import BORDER_INTERVAL, DEVICE_BORDER_INTERVAL, border_shape


def selective_scan(
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None = None,
    gate: Tensor | None = None,
    step_bias: Tensor | None = None,
    step_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    sequence_starts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a selective state space model over a sequence (Gu & Dao, arXiv 2312.00752, algorithm 2).

    For every channel, with ``step = softplus(step_size + step_bias)`` (each part optional)::

        state_t  = exp(step_t * state_matrix) * state_{t-1} + step_t * input_matrix_t * inputs_t
        output_t = (<output_matrix_t, state_t> + skip_weight * inputs_t) * silu(gate_t)

    With a complex ``state_matrix`` the state and both matrices are complex, and twice the real part of the inner
    product is read: each number of the state stands for itself and its conjugate.

    Args:
        inputs: (batch, length, channels), float32, bfloat16, float16 or float64. Any strides; contiguous channels are
            fastest.
        step_size: (batch, length, channels).
        state_matrix: (channels, state_size), real or complex, with a negative real part for a state that fades.
        input_matrix: (batch, length, state_size) or (batch, length, groups, state_size), where ``channels / groups``
            neighbouring channels share a group's matrix; or (channels, state_size) for one that does not depend on
            time. Real or complex, as the state.
        output_matrix: like ``input_matrix``.
        skip_weight: (channels,).
        gate: (batch, length, channels).
        step_bias: (channels,).
        step_softplus: put the step through softplus.
        initial_state: (batch, channels, state_size), the state before the first position; zero when absent.
        reverse: run from the last position to the first.
        return_final_state: also return the state after the last position in the direction of the scan.
        sequence_starts: (batch, length), boolean, True where a new record begins (``mambacore.packing``): the state
            does not cross into it, nor out of it in reverse.

    Returns:
        Outputs (batch, length, channels) in the inputs' dtype and, if asked for, the final state
        (batch, channels, state_size). States and parameters are float32, or float64 for float64 inputs, or complex
        numbers of these. Everything is
        differentiable, the initial state and the final one included. Results repeat bit for bit for a given number of
        threads.

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: an unsupported dtype.
    """
    _check(
        inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, initial_state,
        sequence_starts,
    )  # fmt: skip
    input_matrix, output_matrix = _with_groups(input_matrix, output_matrix)
    dtype = compute_dtype(inputs.dtype)
    of_state = state_dtype(inputs.dtype, state_matrix.is_complex())
    arguments = (
        inputs,
        step_size.to(inputs.dtype),
        state_matrix.to(of_state),
        input_matrix.to(of_state),
        output_matrix.to(of_state),
        None if skip_weight is None else skip_weight.to(dtype),
        None if gate is None else gate.to(inputs.dtype),
        None if step_bias is None else step_bias.to(dtype),
        None if initial_state is None else initial_state.to(of_state),
        None if sequence_starts is None else resets_before(sequence_starts, reverse),
    )
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in arguments
    )
    if _use_mamba_ssm(arguments, reverse, state_needs_gradient=needs_gradient and return_final_state):
        outputs, final_state = mamba_ssm.scan(*arguments[:8], step_softplus)
        return (outputs, final_state) if return_final_state else outputs
    outputs, final_state, _ = _forward(*arguments, step_softplus, reverse, needs_gradient)
    return (outputs, final_state) if return_final_state else outputs


def _use_mamba_ssm(arguments: tuple[Tensor | None, ...], reverse: bool, state_needs_gradient: bool) -> bool:
    """Whether mamba-ssm computes this: asked for by name, or CUDA tensors came that our kernels cannot take."""
    if torch.compiler.is_compiling():  # its operator would break the graph
        return False
    inputs, _, state_matrix, *_, initial_state, resets = arguments
    assert inputs is not None
    assert state_matrix is not None
    wanted = wanted_backend()
    if wanted != "mamba_ssm" and (wanted is not None or inputs.device.type != "cuda" or triton_computes(inputs)):
        return False
    reason = mamba_ssm.refusal(inputs, state_matrix, initial_state, resets, reverse)
    if wanted == "mamba_ssm" and reason:
        raise RuntimeError(f"the mamba_ssm backend was asked for but cannot {reason}; use another backend for this")
    if wanted == "mamba_ssm":
        return True
    return not reason and not state_needs_gradient and mamba_ssm.scan_function()[0] is not None


def _check(
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None,
    gate: Tensor | None,
    step_bias: Tensor | None,
    initial_state: Tensor | None,
    sequence_starts: Tensor | None,
) -> None:
    """Refuse what does not fit, naming the argument."""
    if inputs.dim() != 3:
        raise ValueError(f"inputs must be (batch, length, channels) but has shape {tuple(inputs.shape)}")
    if inputs.dtype not in INPUT_DTYPES:
        raise TypeError(f"inputs must be float32, bfloat16, float16 or float64 but is {inputs.dtype}; convert it first")
    batch, length, channels = inputs.shape
    if state_matrix.dim() != 2 or state_matrix.shape[0] != channels:
        raise ValueError(
            f"state_matrix must be (channels={channels}, state_size) but has shape {tuple(state_matrix.shape)}"
        )
    state_size = state_matrix.shape[1]
    for name, matrix in (("input_matrix", input_matrix), ("output_matrix", output_matrix)):
        groups = matrix.shape[2] if matrix.dim() == 4 else 1
        fits = matrix.dim() in (3, 4) and matrix.shape[:2] == (batch, length) and matrix.shape[-1] == state_size
        if (not fits or groups < 1 or channels % groups) and tuple(matrix.shape) != (channels, state_size):
            raise ValueError(
                f"{name} must be (batch={batch}, length={length}, state_size={state_size}), or have groups that divide "
                f"the {channels} channels before its last dimension, or be (channels={channels}, "
                f"state_size={state_size}), but has shape {tuple(matrix.shape)}"
            )
    for name, tensor in (
        ("input_matrix", input_matrix),
        ("output_matrix", output_matrix),
        ("initial_state", initial_state),
    ):
        if tensor is not None and tensor.is_complex() and not state_matrix.is_complex():
            raise TypeError(f"{name} is complex but state_matrix is real; make both complex or both real")
    expected = {
        "step_size": (step_size, (batch, length, channels)),
        "skip_weight": (skip_weight, (channels,)),
        "gate": (gate, (batch, length, channels)),
        "step_bias": (step_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, state_size)),
        "sequence_starts": (sequence_starts, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to fit the inputs but has {tuple(tensor.shape)}")
    if sequence_starts is not None and sequence_starts.dtype != torch.bool:
        raise TypeError(f"sequence_starts must be boolean but is {sequence_starts.dtype}")


def _with_groups(input_matrix: Tensor, output_matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices that depend on time with a dimension for groups, and as many groups each; others as they are."""
    first, second = (matrix.unsqueeze(2) if matrix.dim() == 3 else matrix for matrix in (input_matrix, output_matrix))
    if first.dim() == 2 or second.dim() == 2:
        return first, second
    counts = {first.shape[2], second.shape[2]}
    if len(counts) > 1 and min(counts) != 1:
        raise ValueError(f"input_matrix and output_matrix must have the same groups but have {sorted(counts)}")
    groups = max(counts)
    return first.expand(-1, -1, groups, -1), second.expand(-1, -1, groups, -1)


@torch.library.custom_op("mambacore::selective_scan_forward", mutates_args=())
def _forward(
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None,
    gate: Tensor | None,
    step_bias: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
    step_softplus: bool,
    reverse: bool,
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (
        inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, initial_state,
        resets, step_softplus, reverse, keep_borders,
    )  # fmt: skip
    if triton_computes(inputs):
        from mambacore.scan import triton as scan  # noqa: PLC0415  only where there is Triton

        return scan.forward(*arguments)
    library = native_library_for(inputs)
    return fallback.forward(*arguments) if library is None else native.forward(library, *arguments)


@_forward.register_fake
def _(inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, initial_state,
      resets, step_softplus, reverse, keep_borders):  # fmt: skip
    batch, length, channels = inputs.shape
    state_size = state_matrix.shape[1]
    interval = DEVICE_BORDER_INTERVAL if triton_computes(inputs) else BORDER_INTERVAL
    kept = length if keep_borders else 0
    borders = border_shape(batch, kept, channels, state_size, state_matrix.is_complex(), interval)
    return (
        inputs.new_empty(inputs.shape),
        inputs.new_empty(batch, channels, state_size, dtype=state_matrix.dtype),
        inputs.new_empty(borders, dtype=compute_dtype(inputs.dtype)),
    )


@torch.library.custom_op("mambacore::selective_scan_backward", mutates_args=())
def _backward(
    grad_outputs: Tensor,
    grad_final_state: Tensor | None,
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None,
    gate: Tensor | None,
    step_bias: Tensor | None,
    resets: Tensor | None,
    border_states: Tensor,
    step_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (
        grad_outputs, grad_final_state, inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate,
        step_bias, resets, border_states, step_softplus, reverse,
    )  # fmt: skip
    if _borders_of_triton(inputs, border_states):
        from mambacore.scan import triton as scan  # noqa: PLC0415

        return scan.backward(*arguments)
    library = native_library_for(inputs)
    return fallback.backward(*arguments) if library is None else native.backward(library, *arguments)


def _borders_of_triton(inputs: Tensor, border_states: Tensor) -> bool:
    """Whether the kept states are those of the GPU's kernels: backward goes where forward went.

    Sequences of one interval are kept alike by all backends, so any may take these.
    """
    ours, others = (-(-inputs.shape[1] // interval) for interval in (DEVICE_BORDER_INTERVAL, BORDER_INTERVAL))
    return triton_computes(inputs) if ours == others else border_states.shape[1] == ours


@_backward.register_fake
def _(grad_outputs, grad_final_state, inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate,
      step_bias, resets, border_states, step_softplus, reverse):  # fmt: skip
    def like(tensor: Tensor | None) -> Tensor:
        return inputs.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (
        like(inputs), like(step_size), like(state_matrix), like(input_matrix), like(output_matrix), like(skip_weight),
        like(gate), like(step_bias), state_matrix.new_empty(inputs.shape[0], *state_matrix.shape),
    )  # fmt: skip


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, initial_state, resets, step_softplus, reverse, keep_borders = inputs
    if not keep_borders:
        raise RuntimeError("the scan was run without keep_borders, so it has no gradient; call selective_scan instead")
    ctx.save_for_backward(*tensors, resets, output[2])
    ctx.has_initial_state = initial_state is not None
    ctx.step_softplus, ctx.reverse = step_softplus, reverse


def _gradient(ctx, grad_outputs, grad_final_state, _grad_borders):
    *tensors, resets, border_states = ctx.saved_tensors
    grads = _backward(grad_outputs, grad_final_state, *tensors, resets, border_states, ctx.step_softplus, ctx.reverse)
    present = [tensor is not None for tensor in tensors] + [ctx.has_initial_state]
    wanted = (grad if there else None for grad, there in zip(grads, present, strict=True))
    return (*wanted, None, None, None, None)


_forward.register_autograd(_gradient, setup_context=_keep_for_backward)
