"""The selective scan as a registered PyTorch operator: checks, backends, shapes for the compiler, and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from mambacore.backends import (
    TRITON_DTYPES,
    compute_dtype,
    native_library_for,
    state_dtype,
    triton_computes,
    wanted_backend,
)
from mambacore.contracts import (
    Expected,
    check_boolean,
    check_devices,
    check_real_beside_real,
    check_sequence,
    check_shapes,
    common_element_dtype,
)
from mambacore.layout import DEVICE_INTERVAL, INTERVAL, boundary_shape
from mambacore.packing import resets_before
from mambacore.scan import fallback, mamba_ssm, native
from mambacore.scan.arguments import BACKWARD_SCHEMA, FORWARD_SCHEMA, ScanArguments, ScanGradients
from mambacore.vmap import vmap_by_loop


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

    For every channel, with `step = softplus(step_size + step_bias)` (each part optional):

        state_t  = exp(step_t * state_matrix) * state_{t-1} + step_t * input_matrix_t * inputs_t
        output_t = (<output_matrix_t, state_t> + skip_weight * inputs_t) * silu(gate_t)

    With a complex `state_matrix` the state and both matrices are complex, and twice the real part of the inner
    product is read: each number of the state stands for itself and its conjugate.

    Args:
        inputs: (batch, length, channels), float32, bfloat16, float16 or float64. Any strides; contiguous channels are
            fastest.
        step_size: (batch, length, channels). Where it, or the gate, is in a finer dtype than the inputs, the scan runs
            in the finer one: a step size is never rounded.
        state_matrix: (channels, state_size), real or complex, with a negative real part for a decaying state.
        input_matrix: (batch, length, state_size) or (batch, length, groups, state_size), where `channels / groups`
            neighbouring channels share a group's matrix; or (channels, state_size) for one that does not depend on
            time. Real or complex, as the state.
        output_matrix: like `input_matrix`.
        skip_weight: (channels,).
        gate: (batch, length, channels).
        step_bias: (channels,).
        step_softplus: apply softplus to the step size.
        initial_state: (batch, channels, state_size), the state before the first position; zero by default.
        reverse: run from the last position to the first.
        return_final_state: also return the state after the last position in scan order.
        sequence_starts: (batch, length), boolean, True where a new record begins (`mambacore.packing`): the state
            does not cross into it, nor out of it in reverse.

    Returns:
        Outputs (batch, length, channels) in the inputs' dtype and, if requested, the final state
        (batch, channels, state_size). States and parameters are float32, or float64 for float64 inputs, or complex
        numbers of these. Everything is differentiable, the initial state and the final one included. Results repeat bit
        for bit for a given number of threads.

    Raises:
        ValueError: if shapes do not match, or tensors are on different devices.
        TypeError: if a dtype is not supported.
    """
    _check(
        inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, initial_state,
        sequence_starts,
    )  # fmt: skip
    input_matrix, output_matrix = _with_groups(input_matrix, output_matrix)
    element = common_element_dtype(inputs, step_size, gate)
    dtype, of_state = compute_dtype(element), state_dtype(element, state_matrix.is_complex())
    arguments = ScanArguments(
        inputs=inputs.to(element),
        step_size=step_size.to(element),
        state_matrix=state_matrix.to(of_state),
        input_matrix=_matrix_in(of_state, input_matrix, inputs),
        output_matrix=_matrix_in(of_state, output_matrix, inputs),
        skip_weight=None if skip_weight is None else skip_weight.to(dtype),
        gate=None if gate is None else gate.to(element),
        step_bias=None if step_bias is None else step_bias.to(dtype),
        initial_state=None if initial_state is None else initial_state.to(of_state),
        resets=None if sequence_starts is None else resets_before(sequence_starts, reverse),
        step_softplus=step_softplus,
        reverse=reverse,
    )
    needs_gradient = torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in arguments
    )
    if _use_mamba_ssm(arguments, state_needs_gradient=needs_gradient and return_final_state):
        outputs, final_state = mamba_ssm.scan(arguments)
    else:
        outputs, final_state, _ = _forward(*arguments, needs_gradient)
    outputs = outputs.to(inputs.dtype)
    return (outputs, final_state) if return_final_state else outputs


def _matrix_in(dtype: torch.dtype, matrix: Tensor, inputs: Tensor) -> Tensor:
    """A matrix in the dtype of the states, or as it is if the GPU's kernels, which convert it as they read, take it."""
    taken = matrix.dim() == 4 and matrix.dtype in TRITON_DTYPES and not dtype.is_complex
    # A compiler, which cannot ask for the backend, converts it in its own kernels.
    return matrix if taken and not torch.compiler.is_compiling() and triton_computes(inputs) else matrix.to(dtype)


def _converted(arguments: ScanArguments) -> ScanArguments:
    """The arguments with both matrices in the dtype of the states, as all other backends take them."""
    dtype = arguments.state_matrix.dtype
    return arguments._replace(
        input_matrix=arguments.input_matrix.to(dtype), output_matrix=arguments.output_matrix.to(dtype)
    )


def _use_mamba_ssm(arguments: ScanArguments, state_needs_gradient: bool) -> bool:
    """Return whether to use mamba-ssm: if requested by name, or for CUDA tensors that our kernels do not support."""
    if torch.compiler.is_compiling():  # its operator would break the graph
        return False
    wanted, inputs = wanted_backend(), arguments.inputs
    if wanted != "mamba_ssm" and (wanted is not None or inputs.device.type != "cuda" or triton_computes(inputs)):
        return False
    reason = mamba_ssm.refusal(arguments)
    if wanted == "mamba_ssm" and reason:
        raise RuntimeError(f"the mamba_ssm backend was requested but cannot {reason}; use another backend for this")
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
    """Check the arguments."""
    check_sequence("inputs", inputs)
    batch, length, channels = inputs.shape
    if state_matrix.dim() != 2 or state_matrix.shape[0] != channels:
        raise ValueError(
            f"state_matrix must be (channels={channels}, state_size) but has shape {tuple(state_matrix.shape)}; "
            "give one row for each channel of the inputs"
        )
    state_size = state_matrix.shape[1]
    matrices = {"input_matrix": input_matrix, "output_matrix": output_matrix}
    for name, matrix in matrices.items():
        groups = matrix.shape[2] if matrix.dim() == 4 else 1
        fits = matrix.dim() in (3, 4) and matrix.shape[:2] == (batch, length) and matrix.shape[-1] == state_size
        if (not fits or groups < 1 or channels % groups) and tuple(matrix.shape) != (channels, state_size):
            raise ValueError(
                f"{name} must be (batch={batch}, length={length}, state_size={state_size}), or have groups that divide "
                f"the {channels} channels before its last dimension, or be (channels={channels}, "
                f"state_size={state_size}), but has shape {tuple(matrix.shape)}"
            )
    check_real_beside_real(state_matrix, matrices | {"initial_state": initial_state})
    sequence, channel = (batch, length, channels), "give one number per channel"
    check_shapes(
        {
            "step_size": Expected(step_size, sequence, "give one step per position and channel"),
            "skip_weight": Expected(skip_weight, (channels,), channel),
            "gate": Expected(gate, sequence, "give one gate per position and channel"),
            "step_bias": Expected(step_bias, (channels,), channel),
            "initial_state": Expected(
                initial_state, (batch, channels, state_size), "pass the final state of the same batch and model"
            ),
            "sequence_starts": Expected(sequence_starts, (batch, length), "mark every position"),
        }
    )
    check_boolean("sequence_starts", sequence_starts)
    check_devices(
        inputs,
        matrices
        | {
            "step_size": step_size, "state_matrix": state_matrix, "skip_weight": skip_weight, "gate": gate,
            "step_bias": step_bias, "initial_state": initial_state, "sequence_starts": sequence_starts,
        },
    )  # fmt: skip


def _with_groups(input_matrix: Tensor, output_matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices that depend on time with a dimension for groups, and as many groups each; others as they are."""
    first, second = (matrix.unsqueeze(2) if matrix.dim() == 3 else matrix for matrix in (input_matrix, output_matrix))
    if first.dim() == 2 or second.dim() == 2:
        return first, second
    counts = {first.shape[2], second.shape[2]}
    if len(counts) > 1 and min(counts) != 1:
        raise ValueError(
            f"input_matrix and output_matrix must have the same groups but have {sorted(counts)}; "
            "give both as many, or one of them a single group"
        )
    groups = max(counts)
    return first.expand(-1, -1, groups, -1), second.expand(-1, -1, groups, -1)


@torch.library.custom_op("mambacore::selective_scan_forward", mutates_args=(), schema=FORWARD_SCHEMA)
def _forward(*given):
    arguments, keep_boundaries = ScanArguments(*given[:-1]), given[-1]
    if triton_computes(arguments.inputs):
        from mambacore.scan import triton as scan  # noqa: PLC0415  only where there is Triton

        return scan.forward(arguments, keep_boundaries)
    arguments = _converted(arguments)
    library = native_library_for(arguments.inputs)
    if library is None:
        return fallback.forward(arguments, keep_boundaries)
    return native.forward(library, arguments, keep_boundaries)


@_forward.register_fake
def _(*given):
    arguments, keep_boundaries = ScanArguments(*given[:-1]), given[-1]
    batch, length, channels = arguments.inputs.shape
    interval = DEVICE_INTERVAL if triton_computes(arguments.inputs) else INTERVAL
    kept = length if keep_boundaries else 0
    boundaries = boundary_shape(batch, kept, channels, arguments.state_size, arguments.is_complex, interval)
    return (
        arguments.inputs.new_empty(arguments.inputs.shape),
        arguments.state_matrix.new_empty(batch, channels, arguments.state_size),
        arguments.inputs.new_empty(boundaries, dtype=arguments.dtype),
    )


@torch.library.custom_op("mambacore::selective_scan_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _backward(grad_outputs, grad_final_state, *given):
    arguments, boundary_states = ScanArguments(*given[:-1]), given[-1]
    if _boundaries_of_triton(arguments.inputs, boundary_states):
        from mambacore.scan import triton as scan  # noqa: PLC0415

        return scan.backward(grad_outputs, grad_final_state, arguments, boundary_states)
    arguments = _converted(arguments)
    library = native_library_for(arguments.inputs)
    if library is None:
        return fallback.backward(grad_outputs, grad_final_state, arguments, boundary_states)
    return native.backward(library, grad_outputs, grad_final_state, arguments, boundary_states)


def _boundaries_of_triton(inputs: Tensor, boundary_states: Tensor) -> bool:
    """Whether the boundary states are those of the GPU's kernels: backward goes where forward went.

    Sequences of one interval are kept alike by all backends, so any may take these.
    """
    ours, others = (-(-inputs.shape[1] // interval) for interval in (DEVICE_INTERVAL, INTERVAL))
    return triton_computes(inputs) if ours == others else boundary_states.shape[1] == ours


@_backward.register_fake
def _(grad_outputs, grad_final_state, *given):
    arguments = ScanArguments(*given[:-1])

    def like(tensor: Tensor | None) -> Tensor:
        return arguments.inputs.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (
        *(like(getattr(arguments, name)) for name in ScanGradients._fields[:-1]),
        arguments.state_matrix.new_empty(arguments.inputs.shape[0], *arguments.state_matrix.shape),
    )


def _keep_for_backward(ctx, inputs, output) -> None:
    arguments, keep_boundaries = ScanArguments(*inputs[:-1]), inputs[-1]
    ctx.save_for_backward(*arguments[:-2], output[2] if keep_boundaries else None)
    ctx.step_softplus, ctx.reverse = arguments.step_softplus, arguments.reverse
    # No zeros for the gradient of a final state that nobody read.
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_outputs, grad_final_state, _grad_boundaries):
    *tensors, boundary_states = ctx.saved_tensors
    arguments = ScanArguments._make((*tensors, ctx.step_softplus, ctx.reverse))
    if grad_outputs is None:
        grad_outputs = torch.zeros_like(arguments.inputs)
    if boundary_states is None:  # a graph that was exported or traced without gradients
        boundary_states = _forward(*arguments, True)[2]
    grads = _backward(grad_outputs, grad_final_state, *arguments, boundary_states)
    wanted = (None if tensor is None else grad for grad, tensor in zip(grads, arguments, strict=False))
    return (*wanted, None, None, None, None)


_forward.register_autograd(_gradient, setup_context=_keep_for_backward)
vmap_by_loop(_forward)
vmap_by_loop(_backward)
