"""The scan as mamba_ssm publishes it, in Triton: a peer where mamba_ssm's own kernel cannot be installed.

What the paper says (Gu & Dao, arXiv 2312.00752, section 3.3 and appendix D): one program per batch item and channel
walks the length serially in chunks of 2,048 positions; within a chunk, each state is an associative scan over pairs of
decay and drive; states stay on the chip, only those between chunks are kept, and backward computes the others again.
Gradients that programs share are added up by atomics. The length is not split, and each channel reads B and C anew.

The layout is theirs, (batch, channels, length). It is no substitute for their CUDA code in a comparison, only the same
plan through the compiler that ours go through.
"""

# Compile-time sizes are named like constants, and a kernel is one long function.
# ruff: noqa: N803, PLR0915

import torch
import triton.language as tl
from torch import Tensor

from mambacore.triton.arithmetic import sigmoid, softplus, total
from mambacore.triton.launch import kernel

LONGEST_CHUNK, SHORTEST_CHUNK, WARPS = 2048, 128, 4


@kernel
def join(decay, value, next_decay, next_value):
    """The affine map of two neighbouring stretches, h -> decay h + value, one after the other."""
    return decay * next_decay, next_decay * value + next_value


@kernel
def forward(
    inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, outputs, borders,
    length, channel_count, chunk_count, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Outputs, and the states (batch, channels, chunks + 1, states) around each chunk, of which the first is given."""
    channel, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item = batch * channel_count + channel
    places = tl.arange(0, CHUNK)
    bias, skip = tl.load(step_bias + channel), tl.load(skip_weight + channel)
    for chunk in range(chunk_count):
        positions = chunk * CHUNK + places
        inside = positions < length
        row = item * length + positions
        given = tl.load(inputs + row, mask=inside, other=0.0).to(tl.float32)
        step = softplus(tl.load(step_size + row, mask=inside, other=0.0).to(tl.float32) + bias)
        step = tl.where(inside, step, 0.0)
        sums = skip * given
        for state in range(STATES):
            rate = tl.load(state_matrix + channel * STATES + state) * 1.4426950408889634
            matrix_row = (batch * STATES + state) * length + positions
            into = tl.load(input_matrix + matrix_row, mask=inside, other=0.0).to(tl.float32)
            out_of = tl.load(output_matrix + matrix_row, mask=inside, other=0.0).to(tl.float32)
            decays, values = tl.associative_scan((tl.exp2(step * rate), step * given * into), 0, join)
            border = borders + (item * (chunk_count + 1) + chunk) * STATES + state
            held = decays * tl.load(border) + values
            sums += held * out_of
            tl.store(border + STATES, total(tl.where(places == CHUNK - 1, held, 0.0), 0))
        tl.debug_barrier()  # the next chunk reads the borders
        opening = tl.load(gate + row, mask=inside, other=0.0).to(tl.float32)
        sums *= opening * sigmoid(opening)
        tl.store(outputs + row, sums.to(outputs.dtype.element_ty), mask=inside)


@kernel
def backward(
    grad_outputs, inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, borders,
    carries, grad_inputs, grad_step_size, grad_state_matrix, grad_input_matrix, grad_output_matrix, grad_skip,
    grad_gate, grad_bias, length, channel_count, chunk_count, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All gradients; shared ones are added to. ``carries`` (batch, channels, states) starts as zeros."""
    channel, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item = batch * channel_count + channel
    places = tl.arange(0, CHUNK)
    bias, skip = tl.load(step_bias + channel), tl.load(skip_weight + channel)
    for backwards in range(chunk_count):
        chunk = chunk_count - 1 - backwards
        positions = chunk * CHUNK + places
        inside = positions < length
        row = item * length + positions
        given = tl.load(inputs + row, mask=inside, other=0.0).to(tl.float32)
        raw = tl.load(step_size + row, mask=inside, other=0.0).to(tl.float32) + bias
        step = tl.where(inside, softplus(raw), 0.0)
        follows = positions + 1 < length
        next_step = softplus(tl.load(step_size + row + 1, mask=follows, other=0.0).to(tl.float32) + bias)
        next_step = tl.where(follows, next_step, 0.0)
        opening = tl.load(gate + row, mask=inside, other=0.0).to(tl.float32)
        share = sigmoid(opening)
        grad_gated = tl.load(grad_outputs + row, mask=inside, other=0.0).to(tl.float32)
        grad = grad_gated * opening * share
        ungated = skip * given
        grad_drive = tl.full((CHUNK,), 0.0, tl.float32)
        grad_step = tl.full((CHUNK,), 0.0, tl.float32)
        for state in range(STATES):
            rate = tl.load(state_matrix + channel * STATES + state)
            matrix_row = (batch * STATES + state) * length + positions
            into = tl.load(input_matrix + matrix_row, mask=inside, other=0.0).to(tl.float32)
            out_of = tl.load(output_matrix + matrix_row, mask=inside, other=0.0).to(tl.float32)
            drive = step * given * into
            decays, values = tl.associative_scan((tl.exp2(step * rate * 1.4426950408889634), drive), 0, join)
            held = decays * tl.load(borders + (item * (chunk_count + 1) + chunk) * STATES + state) + values
            ungated += held * out_of
            next_decay = tl.exp2(next_step * rate * 1.4426950408889634)
            decays, values = tl.associative_scan((next_decay, grad * out_of), 0, join, reverse=True)
            carry = carries + item * STATES + state
            grad_state = decays * tl.load(carry) + values
            tl.debug_barrier()
            tl.store(carry, total(tl.where(places == 0, grad_state, 0.0), 0))
            grad_exponent = grad_state * (held - drive)
            grad_step += grad_exponent * rate
            grad_drive += grad_state * into
            tl.atomic_add(grad_state_matrix + channel * STATES + state, total(grad_exponent * step, 0))
            tl.atomic_add(grad_input_matrix + matrix_row, grad_state * step * given, mask=inside)
            tl.atomic_add(grad_output_matrix + matrix_row, grad * held, mask=inside)
        tl.debug_barrier()
        grad_step = (grad_step + grad_drive * given) * sigmoid(raw)
        grad_step = tl.where(inside, grad_step, 0.0)
        grad_opening = grad_gated * ungated * share * (1.0 + opening * (1.0 - share))
        grad_given = grad_drive * step + skip * grad
        tl.store(grad_gate + row, grad_opening.to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_step_size + row, grad_step.to(grad_step_size.dtype.element_ty), mask=inside)
        tl.store(grad_inputs + row, grad_given.to(grad_inputs.dtype.element_ty), mask=inside)
        tl.atomic_add(grad_skip + channel, total(grad * given, 0))
        tl.atomic_add(grad_bias + channel, total(grad_step, 0))


class _PublishedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        inputs, _, state_matrix, *_ = tensors = tuple(tensor.contiguous() for tensor in tensors)
        batch, channels, length = inputs.shape
        states = state_matrix.shape[1]
        chunk = min(LONGEST_CHUNK, max(SHORTEST_CHUNK, 1 << (length - 1).bit_length()))
        chunks = -(-length // chunk)
        borders = inputs.new_zeros(batch, channels, chunks + 1, states, dtype=torch.float32)
        outputs = torch.empty_like(inputs)
        ctx.sizes = (length, channels, chunks)
        ctx.cut = {"STATES": states, "CHUNK": chunk, "num_warps": WARPS}
        forward.start((channels, batch), *tensors, outputs, borders, *ctx.sizes, **ctx.cut)
        ctx.save_for_backward(*tensors, borders)
        return outputs

    @staticmethod
    def backward(ctx, grad_outputs: Tensor) -> tuple[Tensor, ...]:
        *tensors, borders = ctx.saved_tensors
        inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias = tensors
        batch, channels, _ = inputs.shape
        shared = {
            name: torch.zeros_like(tensor, dtype=torch.float32)
            for name, tensor in (("state", state_matrix), ("into", input_matrix), ("out", output_matrix),
                                 ("skip", skip_weight), ("bias", step_bias))
        }  # fmt: skip
        grad_inputs, grad_step_size, grad_gate = (torch.empty_like(tensor) for tensor in (inputs, step_size, gate))
        carries = torch.zeros_like(borders[:, :, 0])
        backward.start(
            (channels, batch), grad_outputs.contiguous(), *tensors, borders, carries, grad_inputs, grad_step_size,
            shared["state"], shared["into"], shared["out"], shared["skip"], grad_gate, shared["bias"], *ctx.sizes,
            **ctx.cut,
        )  # fmt: skip
        return (
            grad_inputs, grad_step_size, shared["state"], shared["into"].to(input_matrix.dtype),
            shared["out"].to(output_matrix.dtype), shared["skip"], grad_gate, shared["bias"],
        )  # fmt: skip


def published_scan(
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor,
    gate: Tensor,
    step_bias: Tensor,
) -> Tensor:
    """Real states, with skip, gate, bias and softplus: sequences (batch, channels, length), matrices
    (batch, states, length), state_matrix (channels, states).
    """
    return _PublishedScan.apply(
        inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias
    )
