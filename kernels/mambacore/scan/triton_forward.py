"""Kernels of the scan's forward pass, split over the length.

A program walks one stretch of the length (a chunk) for one batch item and a block of channels. The states are a tile
(states, channels) in registers: neighbouring lanes hold neighbouring channels, a lane holds most states of its channel,
so that the sum over the states is mostly inside a lane. One exponential per state and position, and nothing of size
length x channels x states in memory.

With several chunks, `walk` first runs with `SUMMARY`, from zero, and leaves each chunk's last state and sum of steps;
`carry` hands states from chunk to chunk through the affine map that a chunk is, exp(A sum of Delta) h + last state; and
`walk` runs again from the right states. Offsets that count the length are 64 bit. The sum of Delta is kept in double
precision where states are complex: it is the angle that a state turns by, thousands of turns, whose fraction counts.
"""

# Compile-time switches and sizes are named like constants, and a kernel is one long function.
# ruff: noqa: N803, PLR0912, PLR0915

import triton.language as tl

from mambacore.triton.arithmetic import (
    cosine_and_sine,
    decay,
    load_numbers,
    load_states,
    load_step,
    sigmoid,
    store_states,
    total,
)
from mambacore.triton.launch import kernel


@kernel
def walk(
    inputs, step_size, gate, input_matrix, output_matrix, rates, skip_weight, step_bias, resets,
    chunk_states, step_sums, outputs, final_state, boundaries,
    length, channel_count, group_channels, blocks_per_group, block_count, state_count, chunk_length, chunk_count,
    interval_count, inputs_batch, inputs_row, step_batch, step_row, gate_batch, gate_row,
    into_batch, into_row, into_group, out_of_batch, out_of_row, out_of_group,
    SUMMARY: tl.constexpr, IS_COMPLEX: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr,
    HAS_STATE: tl.constexpr, KEEP_BOUNDARIES: tl.constexpr, INTO_FIXED: tl.constexpr, OUT_OF_FIXED: tl.constexpr,
    INTERVAL: tl.constexpr, BLOCK_STATES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One chunk: its outputs, boundary and final states from `chunk_states`; or, for a summary, from zero to it."""
    block, chunk = tl.program_id(0) % block_count, tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // block_count).to(tl.int64)
    numbers: tl.constexpr = 2 if IS_COMPLEX else 1
    read_factor: tl.constexpr = 2.0 if IS_COMPLEX else 1.0
    group = block // blocks_per_group
    within = (block % blocks_per_group) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channels = group * group_channels + within
    states = tl.arange(0, BLOCK_STATES)
    present = within < group_channels
    some_states = states < state_count
    tile = some_states[:, None] & present[None, :]
    rate, frequency = load_states(rates, states, channels, tile, channel_count, IS_COMPLEX)
    bias = tl.full((BLOCK_CHANNELS,), 0.0, tl.float32)
    skip = tl.full((BLOCK_CHANNELS,), 0.0, tl.float32)
    if HAS_BIAS:
        bias = tl.load(step_bias + channels, mask=present, other=0.0)
    if HAS_SKIP:
        skip = tl.load(skip_weight + channels, mask=present, other=0.0)
    if INTO_FIXED:
        into, into_imaginary = load_states(input_matrix, states, channels, tile, channel_count, IS_COMPLEX)
    if OUT_OF_FIXED:
        out_of, out_of_imaginary = load_states(output_matrix, states, channels, tile, channel_count, IS_COMPLEX)
    held = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0.0, tl.float32)
    held_imaginary = held
    of_chunk = chunk_states + (batch * chunk_count + chunk) * numbers * state_count * channel_count
    if HAS_STATE:
        held, held_imaginary = load_states(of_chunk, states, channels, tile, channel_count, IS_COMPLEX)
    sum_of_steps = tl.full((BLOCK_CHANNELS,), 0.0, step_sums.dtype.element_ty)
    begin = chunk * chunk_length
    count = tl.minimum(begin + chunk_length, length) - begin
    position = length - 1 - begin if REVERSE else begin
    direction = -1 if REVERSE else 1
    for offset in range(count):
        here = position + offset * direction
        if KEEP_BOUNDARIES:  # noqa: SIM102  one is decided when the kernel is compiled, the other when it runs
            if offset % INTERVAL == 0:
                interval = (begin + offset) // INTERVAL
                boundary = boundaries + (batch * interval_count + interval) * numbers * state_count * channel_count
                store_states(boundary, states, channels, tile, channel_count, held, held_imaginary, IS_COMPLEX)
        if HAS_RESETS:
            begins = tl.load(resets + batch * length + here) != 0
            held = tl.where(begins, 0.0, held)
            held_imaginary = tl.where(begins, 0.0, held_imaginary)
        present_input = tl.load(
            inputs + batch * inputs_batch + here * inputs_row + channels, mask=present, other=0.0
        ).to(tl.float32)
        _, step = load_step(step_size + batch * step_batch + here * step_row, channels, present, bias, SOFTPLUS)
        if not INTO_FIXED:
            row = input_matrix + batch * into_batch + here * into_row + group * into_group
            into, into_imaginary = load_numbers(row, numbers * states[:, None], some_states[:, None], IS_COMPLEX)
        left, left_imaginary = decay(step, rate, frequency, IS_COMPLEX)
        drive = (step * present_input)[None, :]
        if IS_COMPLEX:
            real = left * held - left_imaginary * held_imaginary + drive * into
            held_imaginary = left * held_imaginary + left_imaginary * held + drive * into_imaginary
            held = real
        else:
            held = left * held + drive * into
        if SUMMARY:
            sum_of_steps += step.to(step_sums.dtype.element_ty)
        else:
            if not OUT_OF_FIXED:
                row = output_matrix + batch * out_of_batch + here * out_of_row + group * out_of_group
                out_of, out_of_imaginary = load_numbers(
                    row, numbers * states[:, None], some_states[:, None], IS_COMPLEX
                )
            product = held * out_of
            if IS_COMPLEX:
                product -= held_imaginary * out_of_imaginary
            output = read_factor * total(product, 0) + skip * present_input
            if HAS_GATE:
                opening = tl.load(gate + batch * gate_batch + here * gate_row + channels, mask=present, other=0.0)
                opening = opening.to(tl.float32)
                output *= opening * sigmoid(opening)
            tl.store(
                outputs + (batch * length + here) * channel_count + channels,
                output.to(outputs.dtype.element_ty),
                mask=present,
            )
    if SUMMARY:
        store_states(of_chunk, states, channels, tile, channel_count, held, held_imaginary, IS_COMPLEX)
        tl.store(step_sums + (batch * chunk_count + chunk) * channel_count + channels, sum_of_steps, mask=present)
    elif chunk == chunk_count - 1:
        last = final_state + batch * numbers * state_count * channel_count
        store_states(last, states, channels, tile, channel_count, held, held_imaginary, IS_COMPLEX)


@kernel
def carry(
    chunk_states, step_sums, rates, kept, first_state, channel_count, block_count, chunk_count, first_chunk, direction,
    IS_COMPLEX: tl.constexpr, CONJUGATE: tl.constexpr, HAS_STATE: tl.constexpr, HAS_RESETS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, state_count,
):  # fmt: skip
    """Replace each chunk's last state from zero by the state that comes into it, from `first_chunk` on.

    States do not meet each other here, so a program is one state of a block of channels and walks all chunks. Backward
    hands gradients on in the other direction, through the conjugate map.
    """
    state, batch = tl.program_id(1), (tl.program_id(0) // block_count).to(tl.int64)
    numbers: tl.constexpr = 2 if IS_COMPLEX else 1
    channels = (tl.program_id(0) % block_count) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    present = channels < channel_count
    place = numbers * state * channel_count + channels
    rate = tl.load(rates + place, mask=present, other=0.0)
    held = tl.full((BLOCK_CHANNELS,), 0.0, tl.float32)
    held_imaginary = held
    frequency = rate
    if IS_COMPLEX:
        frequency = tl.load(rates + place + channel_count, mask=present, other=0.0)
    if CONJUGATE:
        frequency = -frequency
    if HAS_STATE:
        first = first_state + batch * numbers * state_count * channel_count + place
        held = tl.load(first, mask=present, other=0.0)
        if IS_COMPLEX:
            held_imaginary = tl.load(first + channel_count, mask=present, other=0.0)
    for number in range(chunk_count):
        chunk = batch * chunk_count + first_chunk + number * direction
        here = chunk_states + chunk * numbers * state_count * channel_count + place
        step = tl.load(step_sums + chunk * channel_count + channels, mask=present, other=0.0)
        if number == chunk_count - 1:  # nothing comes after it, so it has no summary
            step = tl.full((BLOCK_CHANNELS,), 0.0, step_sums.dtype.element_ty)
        left = tl.exp2(step.to(tl.float32) * rate)
        left_imaginary = left
        if IS_COMPLEX:
            # Only the fraction of many turns counts: in double precision until it is taken.
            turns = step * frequency.to(tl.float64)
            cosine, sine = cosine_and_sine((turns - tl.floor(turns)).to(tl.float32))
            left, left_imaginary = left * cosine, left * sine
        before, before_imaginary = held, held_imaginary
        if HAS_RESETS:
            goes_on = tl.load(kept + chunk) != 0
            before = tl.where(goes_on, held, 0.0)
            before_imaginary = tl.where(goes_on, held_imaginary, 0.0)
        from_zero = tl.load(here, mask=present, other=0.0)
        tl.store(here, held, mask=present)
        if IS_COMPLEX:
            imaginary_from_zero = tl.load(here + channel_count, mask=present, other=0.0)
            tl.store(here + channel_count, held_imaginary, mask=present)
            held = left * before - left_imaginary * before_imaginary + from_zero
            held_imaginary = left * before_imaginary + left_imaginary * before + imaginary_from_zero
        else:
            held = left * before + from_zero
