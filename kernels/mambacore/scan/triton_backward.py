"""Kernels of the scan's backward pass, split over the length like the forward pass.

The gradient of the state comes from later positions, so chunks are walked from their end, `summary` and
`scan_forward.carry` hand the gradient from the last chunk to the first, and `retreat` computes everything else. It
takes the chunk interval by interval. From the boundary that forward kept, states are computed again and noted, with the
steps, in a small buffer that stays in the cache; the walk back reads them there, so that nothing but one position's
states is held in registers. The gradients of input_matrix and output_matrix, which all channels
share, go to a buffer with one place per block of channels and are added up in its order: no atomics, and the same bits
every time. The formulas are those of `mambacore.scan.fallback.backward`.
"""

# Compile-time switches and sizes are named like constants, and a kernel is one long function.
# ruff: noqa: N803, PLR0912, PLR0915

import triton.language as tl

from mambacore.triton.arithmetic import (
    decay,
    load_numbers,
    load_states,
    load_step,
    sigmoid,
    softplus_and_slope,
    store_states,
    total,
)
from mambacore.triton.launch import kernel


@kernel
def summary(
    grad_outputs, step_size, gate, output_matrix, rates, step_bias, resets, chunk_carries, step_sums,
    length, channel_count, group_channels, blocks_per_group, block_count, state_count, chunk_length, chunk_count,
    grad_batch, grad_row, step_batch, step_row, gate_batch, gate_row, out_of_batch, out_of_row, out_of_group,
    IS_COMPLEX: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr, OUT_OF_FIXED: tl.constexpr, BLOCK_STATES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """What a chunk (from the second on) hands to the one before it if nothing comes from behind; its sum of steps."""
    block, chunk = tl.program_id(0) % block_count, tl.program_id(1).to(tl.int64) + 1
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
    if HAS_BIAS:
        bias = tl.load(step_bias + channels, mask=present, other=0.0)
    if OUT_OF_FIXED:
        out_of, out_of_imaginary = load_states(output_matrix, states, channels, tile, channel_count, IS_COMPLEX)
    held = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0.0, tl.float32)
    held_imaginary = held
    sum_of_steps = tl.full((BLOCK_CHANNELS,), 0.0, step_sums.dtype.element_ty)
    begin = chunk * chunk_length
    count = tl.minimum(begin + chunk_length, length) - begin
    for offset in range(count):
        ordered = begin + count - 1 - offset
        here = length - 1 - ordered if REVERSE else ordered
        grad = tl.load(grad_outputs + batch * grad_batch + here * grad_row + channels, mask=present, other=0.0)
        grad = grad.to(tl.float32) * read_factor
        if HAS_GATE:
            opening = tl.load(gate + batch * gate_batch + here * gate_row + channels, mask=present, other=0.0)
            opening = opening.to(tl.float32)
            grad *= opening * sigmoid(opening)
        _, step = load_step(step_size + batch * step_batch + here * step_row, channels, present, bias, SOFTPLUS)
        if not OUT_OF_FIXED:
            row = output_matrix + batch * out_of_batch + here * out_of_row + group * out_of_group
            out_of, out_of_imaginary = load_numbers(row, numbers * states[:, None], some_states[:, None], IS_COMPLEX)
        left, left_imaginary = decay(step, rate, frequency, IS_COMPLEX)
        held += grad[None, :] * out_of
        if IS_COMPLEX:
            held_imaginary -= grad[None, :] * out_of_imaginary
            real = left * held + left_imaginary * held_imaginary
            held_imaginary = left * held_imaginary - left_imaginary * held
            held = real
        else:
            held = left * held
        if HAS_RESETS:
            begins = tl.load(resets + batch * length + here) != 0
            held = tl.where(begins, 0.0, held)
            held_imaginary = tl.where(begins, 0.0, held_imaginary)
        sum_of_steps += step.to(step_sums.dtype.element_ty)
    of_chunk = chunk_carries + (batch * chunk_count + chunk) * numbers * state_count * channel_count
    store_states(of_chunk, states, channels, tile, channel_count, held, held_imaginary, IS_COMPLEX)
    tl.store(step_sums + (batch * chunk_count + chunk) * channel_count + channels, sum_of_steps, mask=present)


@kernel
def retreat(
    grad_outputs, inputs, step_size, gate, input_matrix, output_matrix, rates, skip_weight, step_bias, resets,
    boundaries, scratch_states, scratch_steps, chunk_carries, grad_inputs, grad_step_size, grad_gate,
    grad_into, grad_out_of, grad_rates, grad_skip, grad_bias, grad_first_state,
    batch_count, group_count, length, channel_count, group_channels, blocks_per_group, block_count, state_count,
    chunk_length, chunk_count, interval_count,
    grad_batch, grad_row, inputs_batch, inputs_row, step_batch, step_row, gate_batch, gate_row,
    into_batch, into_row, into_group, out_of_batch, out_of_row, out_of_group,
    IS_COMPLEX: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_CARRY: tl.constexpr,
    INTO_FIXED: tl.constexpr, OUT_OF_FIXED: tl.constexpr, INTERVAL: tl.constexpr,
    BLOCK_STATES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk. `rates` hold log2(e) A, so the gradients by A are scaled back by the caller."""
    block, chunk = tl.program_id(0) % block_count, tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // block_count).to(tl.int64)
    numbers: tl.constexpr = 2 if IS_COMPLEX else 1
    read_factor: tl.constexpr = 2.0 if IS_COMPLEX else 1.0
    per_rate: tl.constexpr = 0.6931471805599453
    per_frequency: tl.constexpr = 6.283185307179586
    group = block // blocks_per_group
    block_in_group = block % blocks_per_group
    within = block_in_group * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channels = group * group_channels + within
    states = tl.arange(0, BLOCK_STATES)
    present = within < group_channels
    some_states = states < state_count
    tile = some_states[:, None] & present[None, :]
    rate, frequency = load_states(rates, states, channels, tile, channel_count, IS_COMPLEX)
    none = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0.0, tl.float32)
    bias = tl.full((BLOCK_CHANNELS,), 0.0, tl.float32)
    skip, sum_skip, sum_bias = bias, bias, bias
    if HAS_BIAS:
        bias = tl.load(step_bias + channels, mask=present, other=0.0)
    if HAS_SKIP:
        skip = tl.load(skip_weight + channels, mask=present, other=0.0)
    if INTO_FIXED:
        into, into_imaginary = load_states(input_matrix, states, channels, tile, channel_count, IS_COMPLEX)
    if OUT_OF_FIXED:
        out_of, out_of_imaginary = load_states(output_matrix, states, channels, tile, channel_count, IS_COMPLEX)
    sum_into, sum_into_imaginary, sum_out_of, sum_out_of_imaginary = none, none, none, none
    sum_rate, sum_rate_imaginary, carried, carried_imaginary = none, none, none, none
    if HAS_CARRY:
        of_chunk = chunk_carries + (batch * chunk_count + chunk) * numbers * state_count * channel_count
        carried, carried_imaginary = load_states(of_chunk, states, channels, tile, channel_count, IS_COMPLEX)
    begin = chunk * chunk_length
    end = tl.minimum(begin + chunk_length, length)
    program = batch * chunk_count + chunk
    # What this program notes for itself lies as its tiles do, padding included, so that places are known when compiled.
    own_channels = tl.arange(0, BLOCK_CHANNELS)
    all_of_tile = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 1, tl.int1)
    position_size: tl.constexpr = numbers * BLOCK_STATES * BLOCK_CHANNELS
    scratch = scratch_states + (program * block_count + block) * INTERVAL * position_size
    noted = scratch_steps + (program * block_count + block) * INTERVAL * 2 * BLOCK_CHANNELS
    # Of the gradients by both matrices, the part of this block of channels.
    shared_row = group_count * numbers * state_count
    shared_part = (block_in_group * batch_count + batch) * length * shared_row + group * numbers * state_count
    intervals = (end - begin + INTERVAL - 1) // INTERVAL
    for backwards in range(intervals):
        first = begin + (intervals - 1 - backwards) * INTERVAL
        boundary = boundaries + (batch * interval_count + first // INTERVAL) * numbers * state_count * channel_count
        held, held_imaginary = load_states(boundary, states, channels, tile, channel_count, IS_COMPLEX)
        # Forward through the interval, noting the state before every position, its step and the slope of the step; then
        # back through it, one position after the other. Past the end of the chunk a step is 0: nothing decays there,
        # and nothing is added.
        for passed in range(INTERVAL):
            store_states(
                scratch + passed * position_size, states, own_channels, all_of_tile, BLOCK_CHANNELS, held,
                held_imaginary, IS_COMPLEX,
            )  # fmt: skip
            there = first + passed < end
            here = length - 1 - first - passed if REVERSE else first + passed
            use = present & there
            step, _ = load_step(step_size + batch * step_batch + here * step_row, channels, use, bias, False)
            if SOFTPLUS:
                step, slope = softplus_and_slope(step)
                slope = tl.where(there, slope, 0.0)
                tl.store(noted + (2 * passed + 1) * BLOCK_CHANNELS + own_channels, slope)
            step = tl.where(there, step, 0.0)
            tl.store(noted + 2 * passed * BLOCK_CHANNELS + own_channels, step)
            if HAS_RESETS:
                begins = tl.load(resets + batch * length + here, mask=there, other=0) != 0
                held = tl.where(begins, 0.0, held)
                held_imaginary = tl.where(begins, 0.0, held_imaginary)
            given = tl.load(inputs + batch * inputs_batch + here * inputs_row + channels, mask=use, other=0.0)
            if not INTO_FIXED:
                row = input_matrix + batch * into_batch + here * into_row + group * into_group
                into, into_imaginary = load_numbers(
                    row, numbers * states[:, None], some_states[:, None] & there, IS_COMPLEX
                )
            left, left_imaginary = decay(step, rate, frequency, IS_COMPLEX)
            drive = (step * given.to(tl.float32))[None, :]
            if IS_COMPLEX:
                real = left * held - left_imaginary * held_imaginary + drive * into
                held_imaginary = left * held_imaginary + left_imaginary * held + drive * into_imaginary
                held = real
            else:
                held = left * held + drive * into
        tl.debug_barrier()
        for offset_back in range(INTERVAL):
            offset = INTERVAL - 1 - offset_back
            there = first + offset < end
            here = length - 1 - first - offset if REVERSE else first + offset
            use = present & there
            before, before_imaginary = load_states(
                scratch + offset * position_size, states, own_channels, all_of_tile, BLOCK_CHANNELS, IS_COMPLEX
            )
            # The state before this position is the one after the position that is next on the way back.
            next_held, next_held_imaginary = before, before_imaginary
            if HAS_RESETS:
                begins = tl.load(resets + batch * length + here, mask=there, other=0) != 0
                before = tl.where(begins, 0.0, before)
                before_imaginary = tl.where(begins, 0.0, before_imaginary)
            step = tl.load(noted + 2 * offset * BLOCK_CHANNELS + own_channels)
            given = tl.load(inputs + batch * inputs_batch + here * inputs_row + channels, mask=use, other=0.0)
            given = given.to(tl.float32)
            grad = tl.load(grad_outputs + batch * grad_batch + here * grad_row + channels, mask=use, other=0.0)
            grad = grad.to(tl.float32)
            if not INTO_FIXED:
                row = input_matrix + batch * into_batch + here * into_row + group * into_group
                into, into_imaginary = load_numbers(
                    row, numbers * states[:, None], some_states[:, None] & there, IS_COMPLEX
                )
            if not OUT_OF_FIXED:
                row = output_matrix + batch * out_of_batch + here * out_of_row + group * out_of_group
                out_of, out_of_imaginary = load_numbers(
                    row, numbers * states[:, None], some_states[:, None] & there, IS_COMPLEX
                )
            at = (batch * length + here) * channel_count + channels
            left, left_imaginary = decay(step, rate, frequency, IS_COMPLEX)
            drive = (step * given)[None, :]
            if HAS_GATE:
                opening = tl.load(gate + batch * gate_batch + here * gate_row + channels, mask=use, other=0.0)
                opening = opening.to(tl.float32)
                open_share = sigmoid(opening)
                product = held * out_of
                if IS_COMPLEX:
                    product -= held_imaginary * out_of_imaginary
                ungated = read_factor * total(product, 0) + skip * given
                slope_of_gate = open_share * (1.0 + opening * (1.0 - open_share))
                tl.store(grad_gate + at, (grad * ungated * slope_of_gate).to(grad_gate.dtype.element_ty), mask=use)
                grad *= opening * open_share
            grad_read = (read_factor * grad)[None, :]
            carried += grad_read * out_of
            if IS_COMPLEX:
                carried_imaginary -= grad_read * out_of_imaginary
            # carried is now the gradient of the state; those of the two matrices come from it and the state.
            of_into, of_out_of = carried * drive, grad_read * held
            of_drive = carried * into
            if IS_COMPLEX:
                of_into_imaginary, of_out_of_imaginary = carried_imaginary * drive, -grad_read * held_imaginary
                of_drive += carried_imaginary * into_imaginary
                real = left * carried + left_imaginary * carried_imaginary
                carried_imaginary = left * carried_imaginary - left_imaginary * carried
                carried = real
                of_exponent = carried * before + carried_imaginary * before_imaginary
                of_exponent_imaginary = carried_imaginary * before - carried * before_imaginary
                of_step = rate * of_exponent + (per_frequency / per_rate) * frequency * of_exponent_imaginary
                sum_rate_imaginary += of_exponent_imaginary * step[None, :]
            else:
                carried *= left
                of_exponent = carried * before
                of_step = rate * of_exponent
            sum_rate += of_exponent * step[None, :]
            if HAS_RESETS:
                carried = tl.where(begins, 0.0, carried)
                carried_imaginary = tl.where(begins, 0.0, carried_imaginary)
            if INTO_FIXED:
                sum_into += of_into
                if IS_COMPLEX:
                    sum_into_imaginary += of_into_imaginary
            else:
                row = grad_into + shared_part + here * shared_row + numbers * states
                tl.store(row, total(of_into, 1), mask=some_states & there)
                if IS_COMPLEX:
                    tl.store(
                        row + 1,
                        total(of_into_imaginary, 1),
                        mask=some_states & there,
                    )
            if OUT_OF_FIXED:
                sum_out_of += of_out_of
                if IS_COMPLEX:
                    sum_out_of_imaginary += of_out_of_imaginary
            else:
                row = grad_out_of + shared_part + here * shared_row + numbers * states
                tl.store(row, total(of_out_of, 1), mask=some_states & there)
                if IS_COMPLEX:
                    tl.store(
                        row + 1,
                        total(of_out_of_imaginary, 1),
                        mask=some_states & there,
                    )
            grad_drive = total(of_drive, 0)
            grad_step = per_rate * total(of_step, 0) + grad_drive * given
            if SOFTPLUS:
                grad_step *= tl.load(noted + (2 * offset + 1) * BLOCK_CHANNELS + own_channels)
            else:
                grad_step = tl.where(there, grad_step, 0.0)
            tl.store(grad_step_size + at, grad_step.to(grad_step_size.dtype.element_ty), mask=use)
            grad_given = grad_drive * step + skip * grad
            tl.store(grad_inputs + at, grad_given.to(grad_inputs.dtype.element_ty), mask=use)
            sum_skip += grad * given
            sum_bias += grad_step
            held, held_imaginary = next_held, next_held_imaginary
        tl.debug_barrier()
    of_part = program * numbers * state_count * channel_count
    store_states(grad_rates + of_part, states, channels, tile, channel_count, sum_rate, sum_rate_imaginary, IS_COMPLEX)
    if INTO_FIXED:
        place = grad_into + of_part
        store_states(place, states, channels, tile, channel_count, sum_into, sum_into_imaginary, IS_COMPLEX)
    if OUT_OF_FIXED:
        place = grad_out_of + of_part
        store_states(place, states, channels, tile, channel_count, sum_out_of, sum_out_of_imaginary, IS_COMPLEX)
    if HAS_SKIP:
        tl.store(grad_skip + program * channel_count + channels, sum_skip, mask=present)
    if HAS_BIAS:
        tl.store(grad_bias + program * channel_count + channels, sum_bias, mask=present)
    if chunk == 0:
        place = grad_first_state + batch * numbers * state_count * channel_count
        store_states(place, states, channels, tile, channel_count, carried, carried_imaginary, IS_COMPLEX)


@kernel
def add_up(into, out_of, sum_into, sum_out_of, parts, count, BLOCK: tl.constexpr):
    """Add up the parts (parts, count) of the gradients of both matrices, in their order, and round the sums once."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = number < count
    summed = tl.full((BLOCK,), 0.0, tl.float32)
    if tl.program_id(1) == 0:
        place = into + number
        for _ in range(parts):
            summed += tl.load(place, mask=present, other=0.0)
            place += count
        tl.store(sum_into + number, summed.to(sum_into.dtype.element_ty), mask=present)
    else:
        place = out_of + number
        for _ in range(parts):
            summed += tl.load(place, mask=present, other=0.0)
            place += count
        tl.store(sum_out_of + number, summed.to(sum_out_of.dtype.element_ty), mask=present)
