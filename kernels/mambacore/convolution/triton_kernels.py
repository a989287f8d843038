"""Kernels of the causal depthwise convolution: a program processes a segment of positions and a block of channels.

The taps access neighbouring rows, which are cached, so every row is read from memory once. Gradients of the weight and
the bias are stored per program and summed in a fixed order afterwards.
"""

# Compile-time switches and sizes are named like constants.
# ruff: noqa: N803

import triton.language as tl

from mambacore.triton.arithmetic import sigmoid, total
from mambacore.triton.launch import kernel


@kernel
def met_inputs(
    inputs, state, resets, batch, positions, channels, back, length, channel_count, inputs_batch, inputs_row, present,
    HAS_STATE: tl.constexpr, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Load the inputs (positions, channels) of a tap `back` positions back, zero before the start of a record.

    Positions are in scan order; those before the first are in the state (batch, width - 1, channels).
    """
    allowed = positions < length
    if HAS_RESETS:
        for nearer in tl.static_range(WIDTH - 1):
            cut_at = positions - nearer
            row = length - 1 - cut_at if REVERSE else cut_at
            inside = (nearer < back) & (cut_at >= 0) & (cut_at < length)
            allowed &= tl.load(resets + batch * length + row, mask=inside, other=0) == 0
    met = positions - back
    row = length - 1 - met if REVERSE else met
    within = allowed & (met >= 0)
    place = inputs + batch * inputs_batch + row[:, None] * inputs_row + channels[None, :]
    values = tl.load(place, mask=within[:, None] & present[None, :], other=0.0).to(tl.float32)
    if HAS_STATE:
        before = allowed & (met < 0)
        place = state + (batch * (WIDTH - 1) + WIDTH - 1 + met)[:, None] * channel_count + channels[None, :]
        values += tl.load(place, mask=before[:, None] & present[None, :], other=0.0).to(tl.float32)
    return values


@kernel
def convolve(
    inputs, weight, bias, state, resets, outputs, stretch_count, length, channel_count, inputs_batch, inputs_row,
    SILU: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_RESETS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute outputs (batch, length, channels). Weight is (channels, width)."""
    batch, stretch = (tl.program_id(0) // stretch_count).to(tl.int64), (tl.program_id(0) % stretch_count).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    positions = stretch * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    present = channels < channel_count
    sums = tl.full((BLOCK_POSITIONS, BLOCK_CHANNELS), 0.0, tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + channels, mask=present, other=0.0)[None, :]
    for tap in tl.static_range(WIDTH):
        values = met_inputs(
            inputs, state, resets, batch, positions, channels, WIDTH - 1 - tap, length, channel_count, inputs_batch,
            inputs_row, present, HAS_STATE, HAS_RESETS, REVERSE, WIDTH,
        )  # fmt: skip
        sums += tl.load(weight + channels * WIDTH + tap, mask=present, other=0.0)[None, :] * values
    if SILU:
        sums *= sigmoid(sums)
    row = length - 1 - positions if REVERSE else positions
    place = outputs + (batch * length + row)[:, None] * channel_count + channels[None, :]
    mask = (positions < length)[:, None] & present[None, :]
    tl.store(place, sums.to(outputs.dtype.element_ty), mask=mask)


@kernel
def grad_before_activation(
    grad_outputs, inputs, weight, bias, state, resets, grads, stretch_count, length, channel_count, inputs_batch,
    inputs_row, grad_batch, grad_row, grad_weight, grad_bias,
    SILU: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_RESETS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient before SiLU in float32, (batch, length, channels), and this program's part of the gradients
    of the weight (batch x segments, channels, width) and the bias.
    """
    batch, stretch = (tl.program_id(0) // stretch_count).to(tl.int64), (tl.program_id(0) % stretch_count).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    positions = stretch * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    present = channels < channel_count
    row = length - 1 - positions if REVERSE else positions
    mask = (positions < length)[:, None] & present[None, :]
    place = grad_outputs + batch * grad_batch + row[:, None] * grad_row + channels[None, :]
    grad = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        sums = tl.full((BLOCK_POSITIONS, BLOCK_CHANNELS), 0.0, tl.float32)
        if HAS_BIAS:
            sums += tl.load(bias + channels, mask=present, other=0.0)[None, :]
        for tap in tl.static_range(WIDTH):
            values = met_inputs(
                inputs, state, resets, batch, positions, channels, WIDTH - 1 - tap, length, channel_count,
                inputs_batch, inputs_row, present, HAS_STATE, HAS_RESETS, REVERSE, WIDTH,
            )  # fmt: skip
            sums += tl.load(weight + channels * WIDTH + tap, mask=present, other=0.0)[None, :] * values
        opening = sigmoid(sums)
        grad *= opening * (1.0 + sums * (1.0 - opening))
    tl.store(grads + (batch * length + row)[:, None] * channel_count + channels[None, :], grad, mask=mask)
    part = batch * stretch_count + stretch
    for tap in tl.static_range(WIDTH):
        values = met_inputs(
            inputs, state, resets, batch, positions, channels, WIDTH - 1 - tap, length, channel_count, inputs_batch,
            inputs_row, present, HAS_STATE, HAS_RESETS, REVERSE, WIDTH,
        )  # fmt: skip
        place = grad_weight + (part * channel_count + channels) * WIDTH + tap
        # A masked tap has the value zero, and a NaN must not spread from there.
        tl.store(place, total(tl.where(mask, grad * values, 0.0), 0), mask=present)
    tl.store(grad_bias + part * channel_count + channels, total(grad, 0), mask=present)


@kernel
def grad_of_inputs(
    grads, weight, resets, grad_inputs, grad_state, stretch_count, length, channel_count, first,
    REVERSE: tl.constexpr, HAS_RESETS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute gradients of the inputs, from position `first` on: -(width - 1) to include the state, else 0."""
    batch, stretch = (tl.program_id(0) // stretch_count).to(tl.int64), (tl.program_id(0) % stretch_count).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    positions = first + stretch * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    present = channels < channel_count
    sums = tl.full((BLOCK_POSITIONS, BLOCK_CHANNELS), 0.0, tl.float32)
    allowed = positions < length
    for ahead in tl.static_range(WIDTH):
        at = positions + ahead
        row = length - 1 - at if REVERSE else at
        inside = (at >= 0) & (at < length)
        if HAS_RESETS and ahead > 0:  # taps of earlier positions do not reach a record that begins here or in between
            allowed &= tl.load(resets + batch * length + row, mask=inside, other=0) == 0
        mask = (inside & allowed)[:, None] & present[None, :]
        place = grads + (batch * length + row)[:, None] * channel_count + channels[None, :]
        tap = weight + channels * WIDTH + WIDTH - 1 - ahead
        sums += tl.load(tap, mask=present, other=0.0)[None, :] * tl.load(place, mask=mask, other=0.0)
    row = length - 1 - positions if REVERSE else positions
    place = grad_inputs + (batch * length + row)[:, None] * channel_count + channels[None, :]
    mask = ((positions >= 0) & (positions < length))[:, None] & present[None, :]
    tl.store(place, sums.to(grad_inputs.dtype.element_ty), mask=mask)
    if WIDTH > 1:
        place = grad_state + (batch * (WIDTH - 1) + WIDTH - 1 + positions)[:, None] * channel_count + channels[None, :]
        tl.store(place, sums.to(grad_state.dtype.element_ty), mask=(positions < 0)[:, None] & present[None, :])
