"""Kernels of a single position: what lies between the projections of a selective block, for generation.

`convolve` computes the convolution and SiLU for a batch item and a block of channels, `advance` the scan and the gate.
A program reads all it needs of a state before it writes, so the old and the new state may be one buffer: a captured
graph can then be replayed without copies. Matrices are read directly from the projections' outputs, and parameters in
their own dtype.
"""

# Compile-time switches and sizes are named like constants, and a kernel is one long function.
# ruff: noqa: N803, PLR0915

import triton.language as tl

from mambacore.triton.arithmetic import cosine_and_sine, sigmoid, softplus, total
from mambacore.triton.launch import kernel


@kernel
def convolve(
    inputs, weight, bias, state, new_state, outputs, channel_count, inputs_batch,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute silu(convolution) of (batch, channels) and the new state (batch, width - 1, channels).

    Weight is (channels, width), as the parameter is.
    """
    batch = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    present = channels < channel_count
    given = tl.load(inputs + batch * inputs_batch + channels, mask=present, other=0.0)
    sums = tl.load(weight + channels * WIDTH + WIDTH - 1, mask=present, other=0.0).to(tl.float32)
    sums *= given.to(tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + channels, mask=present, other=0.0).to(tl.float32)
    earlier = ()
    for tap in tl.static_range(WIDTH - 1):
        values = tl.full((BLOCK_CHANNELS,), 0.0, state.dtype.element_ty)
        if HAS_STATE:
            row = (batch * (WIDTH - 1) + tap) * channel_count
            values = tl.load(state + row + channels, mask=present, other=0.0)
        sums += tl.load(weight + channels * WIDTH + tap, mask=present, other=0.0).to(tl.float32) * values.to(tl.float32)
        earlier += (values,)  # type: ignore[assignment]
    earlier += (given,)  # type: ignore[assignment]
    tl.debug_barrier()  # lanes may hold other channels when they write than when they read
    for tap in tl.static_range(WIDTH - 1):
        row = (batch * (WIDTH - 1) + tap) * channel_count
        tl.store(new_state + row + channels, earlier[tap + 1].to(new_state.dtype.element_ty), mask=present)
    outcome = sums * sigmoid(sums)
    tl.store(outputs + batch * channel_count + channels, outcome.to(outputs.dtype.element_ty), mask=present)


@kernel
def advance(
    inputs, gate, step_size, matrices, log_decay_rate, frequency, skip_weight, step_bias, scan_state, new_scan_state,
    outputs, channel_count, state_count, gate_batch, matrices_batch,
    IS_COMPLEX: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK_STATES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute gated outputs (batch, channels) and the new state (batch, channels, states), complex numbers as pairs.

    ``matrices`` has rows of input_matrix and output_matrix; A is -exp(log_decay_rate) + i frequency. The states lie
    along the lanes, as they do in memory.
    """
    batch = tl.program_id(0).to(tl.int64)
    numbers: tl.constexpr = 2 if IS_COMPLEX else 1
    read_factor: tl.constexpr = 2.0 if IS_COMPLEX else 1.0
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    states = tl.arange(0, BLOCK_STATES)
    present = channels < channel_count
    some_states = states < state_count
    tile = present[:, None] & some_states[None, :]
    at = batch * channel_count + channels
    given = tl.load(inputs + at, mask=present, other=0.0).to(tl.float32)
    raw = tl.load(step_size + at, mask=present, other=0.0).to(tl.float32)
    step = softplus(raw + tl.load(step_bias + channels, mask=present, other=0.0).to(tl.float32))
    place = channels[:, None] * state_count + states[None, :]
    log_rate = tl.load(log_decay_rate + place, mask=tile, other=0.0).to(tl.float32)
    # Powers of two and turns.
    rate = tl.exp2(log_rate * 1.4426950408889634) * -1.4426950408889634
    turns = rate
    if IS_COMPLEX:
        turns = tl.load(frequency + place, mask=tile, other=0.0).to(tl.float32) * 0.15915494309189535
    left = tl.exp2(step[:, None] * rate)
    left_imaginary = left
    if IS_COMPLEX:
        cosine, sine = cosine_and_sine(step[:, None] * turns)
        left, left_imaginary = left * cosine, left * sine
    row = matrices + batch * matrices_batch + numbers * states
    into = tl.load(row, mask=some_states, other=0.0).to(tl.float32)[None, :]
    out_of = tl.load(row + numbers * state_count, mask=some_states, other=0.0).to(tl.float32)[None, :]
    drive = (step * given)[:, None]
    place = (at * state_count * numbers)[:, None] + numbers * states[None, :]
    held = tl.full((BLOCK_CHANNELS, BLOCK_STATES), 0.0, tl.float32)
    held_imaginary = held
    if HAS_STATE:
        held = tl.load(scan_state + place, mask=tile, other=0.0)
    if IS_COMPLEX:
        if HAS_STATE:
            held_imaginary = tl.load(scan_state + place + 1, mask=tile, other=0.0)
        into_imaginary = tl.load(row + 1, mask=some_states, other=0.0).to(tl.float32)[None, :]
        out_of_imaginary = tl.load(row + numbers * state_count + 1, mask=some_states, other=0.0)
        real = left * held - left_imaginary * held_imaginary + drive * into
        held_imaginary = left * held_imaginary + left_imaginary * held + drive * into_imaginary
        held = real
        product = held * out_of - held_imaginary * out_of_imaginary.to(tl.float32)[None, :]
    else:
        held = left * held + drive * into
        product = held * out_of
    output = read_factor * total(product, 1)
    output += tl.load(skip_weight + channels, mask=present, other=0.0).to(tl.float32) * given
    opening = tl.load(gate + batch * gate_batch + channels, mask=present, other=0.0).to(tl.float32)
    output *= opening * sigmoid(opening)
    tl.debug_barrier()  # a small tile is held by several warps at once
    tl.store(new_scan_state + place, held, mask=tile)
    if IS_COMPLEX:
        tl.store(new_scan_state + place + 1, held_imaginary, mask=tile)
    tl.store(outputs + at, output.to(outputs.dtype.element_ty), mask=present)
