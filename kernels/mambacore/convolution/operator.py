"""The causal depthwise convolution as a registered PyTorch operator."""

import torch
from torch import Tensor

from mambacore.backends import compute_dtype, native_library_for, triton_computes
from mambacore.contracts import Expected, check_boolean, check_devices, check_sequence, check_shapes
from mambacore.convolution import native
from mambacore.convolution.reference import causal_convolution_reference, tap_mask, weighted_sum, with_history
from mambacore.vmap import vmap_by_loop


def causal_convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    sequence_starts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own short causal kernel, optionally followed by SiLU.

    Args:
        inputs: (batch, length, channels), float32, bfloat16, float16 or float64.
        weight: (channels, kernel_width); the last tap applies to the current input.
        bias: (channels,).
        silu: apply SiLU to the result.
        initial_state: (batch, kernel_width - 1, channels), the inputs before the first, oldest first; zeros if absent.
        reverse: process positions from last to first.
        return_final_state: also return the last `kernel_width - 1` inputs in scan order, zero where they belong to an
            earlier record than the last one.
        sequence_starts: (batch, length), boolean, True where a new record begins (`mambacore.packing`): no tap
            reaches into another record.

    Returns:
        Outputs (batch, length, channels) in the inputs' dtype and, if requested, the final state
        (batch, kernel_width - 1, channels). Everything is differentiable.

    Raises:
        ValueError: if shapes do not match, or tensors are on different devices.
        TypeError: if a dtype is not supported.
    """
    check_sequence("inputs", inputs)
    batch, _, channels = inputs.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(
            f"weight must be (channels={channels}, kernel_width) but has shape {tuple(weight.shape)}; "
            "give one row of taps for each channel of the inputs"
        )
    history = weight.shape[1] - 1
    check_shapes(
        {
            "bias": Expected(bias, (channels,), "give one number per channel"),
            "initial_state": Expected(
                initial_state, (batch, history, channels), "pass the final state of the same batch and kernel"
            ),
            "sequence_starts": Expected(sequence_starts, tuple(inputs.shape[:2]), "mark every position"),
        }
    )
    check_boolean("sequence_starts", sequence_starts)
    others = {"weight": weight, "bias": bias, "initial_state": initial_state, "sequence_starts": sequence_starts}
    check_devices(inputs, others)
    dtype = compute_dtype(inputs.dtype)
    state = None if initial_state is None else initial_state.to(inputs.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    outputs = _forward(inputs, weight, bias, state, sequence_starts, silu, reverse)
    if not return_final_state:
        return outputs
    final_state = _last_inputs(inputs, state, history, reverse)
    if sequence_starts is not None and inputs.shape[1] > 0:
        last = sequence_starts[:, : history + 1] if reverse else sequence_starts[:, -history - 1 :]
        mask = tap_mask(last, weight.shape[1], reverse)[:, 1:, -1]
        final_state = torch.where(mask.unsqueeze(-1), final_state, torch.zeros_like(final_state))
    return outputs, final_state


def _last_inputs(inputs: Tensor, initial_state: Tensor | None, history: int, reverse: bool) -> Tensor:
    """Return the last `history` inputs in scan order, including the initial state if necessary."""
    batch, length, channels = inputs.shape
    if torch.compiler.is_compiling():  # one graph for all lengths, including those below the history
        before = inputs.new_zeros(batch, history, channels) if initial_state is None else initial_state
        return torch.cat([before, inputs.flip(1) if reverse else inputs], dim=1)[:, length:]
    kept = min(history, length)
    last = inputs[:, :kept].flip(1) if reverse else inputs[:, length - kept :]
    if kept == history:
        return last.clone()
    before = inputs.new_zeros(batch, history, channels) if initial_state is None else initial_state
    return torch.cat([before[:, kept:], last], dim=1)


@torch.library.custom_op("mambacore::causal_convolution_forward", mutates_args=())
def _forward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    sequence_starts: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    if triton_computes(inputs):
        from mambacore.convolution import triton as convolution  # noqa: PLC0415  only where there is Triton

        return convolution.forward(inputs, weight, bias, initial_state, sequence_starts, silu, reverse)
    library = native_library_for(inputs)
    if library is not None:
        return native.forward(library, inputs, weight, bias, initial_state, sequence_starts, silu, reverse)
    state = None if initial_state is None else initial_state.to(weight.dtype)
    outputs, _ = causal_convolution_reference(
        inputs.to(weight.dtype), weight, bias, state, silu, reverse, sequence_starts
    )
    return outputs.to(inputs.dtype).contiguous()


@_forward.register_fake
def _(inputs, weight, bias, initial_state, sequence_starts, silu, reverse):
    return inputs.new_empty(inputs.shape)


@torch.library.custom_op("mambacore::causal_convolution_backward", mutates_args=())
def _backward(
    grad_outputs: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    sequence_starts: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if triton_computes(inputs):
        from mambacore.convolution import triton as convolution  # noqa: PLC0415

        return convolution.backward(grad_outputs, inputs, weight, bias, initial_state, sequence_starts, silu, reverse)
    library = native_library_for(inputs)
    if library is not None:
        return native.backward(
            library, grad_outputs, inputs, weight, bias, initial_state, sequence_starts, silu, reverse
        )
    return _fallback_backward(grad_outputs, inputs, weight, bias, initial_state, sequence_starts, silu, reverse)


def _fallback_backward(grad_outputs, inputs, weight, bias, initial_state, sequence_starts, silu, reverse):
    """Return gradients of inputs, weight, bias and initial state in plain PyTorch, empty for absent arguments."""
    kernel_width, length = weight.shape[1], inputs.shape[1]
    grad, ordered = (tensor.to(weight.dtype) for tensor in (grad_outputs, inputs))
    if reverse:
        grad, ordered = grad.flip(1), ordered.flip(1)
    extended = with_history(ordered, initial_state, kernel_width)
    mask = None if sequence_starts is None else tap_mask(sequence_starts, kernel_width, reverse)
    if silu:
        before_activation = weighted_sum(extended, weight, bias, mask)
        opening = torch.sigmoid(before_activation)
        grad = grad * opening * (1 + before_activation * (1 - opening))
    grad_extended = torch.zeros_like(extended)
    grad_taps = []
    for tap in range(kernel_width):
        met, grad_here = extended[:, tap : tap + length], grad
        if mask is not None:
            allowed = mask[:, tap].unsqueeze(-1)
            met, grad_here = (torch.where(allowed, tensor, torch.zeros_like(tensor)) for tensor in (met, grad))
        grad_extended[:, tap : tap + length] += weight[:, tap] * grad_here
        grad_taps.append((grad_here * met).sum((0, 1)))
    grad_initial_state, grad_inputs = grad_extended.to(inputs.dtype).split([kernel_width - 1, length], dim=1)
    return (
        grad_inputs.flip(1) if reverse else grad_inputs.clone(),
        torch.stack(grad_taps, dim=1),
        inputs.new_empty(0) if bias is None else grad.sum((0, 1)),
        inputs.new_empty(0) if initial_state is None else grad_initial_state.clone(),
    )


@_backward.register_fake
def _(grad_outputs, inputs, weight, bias, initial_state, sequence_starts, silu, reverse):
    def like(tensor: Tensor | None) -> Tensor:
        return inputs.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return like(inputs), like(weight), like(bias), like(initial_state)


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_outputs):
    *tensors, sequence_starts = ctx.saved_tensors
    grads = _backward(grad_outputs, *tensors, sequence_starts, ctx.silu, ctx.reverse)
    wanted = (None if tensor is None else grad for grad, tensor in zip(grads, tensors, strict=True))
    return (*wanted, None, None, None)


_forward.register_autograd(_gradient, setup_context=_keep_for_backward)
vmap_by_loop(_forward)
vmap_by_loop(_backward)
