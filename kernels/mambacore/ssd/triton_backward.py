"""The GPU's backward kernels of the state space dual scan: the gradients of a chunk, in products on tensor cores.

What reaches the state before a chunk (`triton_kernels.add_states` of the outputs' gradients and output matrices) and
the gradients of the states after the chunks (`triton_kernels.pass_states`, from the last to the first) come before
them. Then `read_back_inputs` computes what belongs to a head, and `read_back_matrix`, once for each of the two, what
the heads of a group share, from the gradients of the scores, which `read_back_inputs` leaves in memory: as much as the
inputs take. In one kernel, 1,888 bytes per thread do not fit into the registers.
The formulas are those of `mambacore.ssd.chunked.backward`; no atomics, and the same bits every time.

`grad_numbers` (4 + blocks of states, batch, heads, rows) takes for each row the gradients of the weight, of the weight
at its own position, of the decay of the next position (from the last row of a position), what it adds to the gradient
of the skip weight, and the gradient of the decay of its own position in parts.
"""

# Compile-time switches and sizes are named like constants, and a kernel is one long function.
# ruff: noqa: N803

import triton.language as tl
from triton.language.standard import _sum_combine

from mambacore.triton.arithmetic import total
from mambacore.triton.launch import kernel


@kernel
def rows_of_chunk(
    chunk, length, REVERSE: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """The first row of a chunk in memory, and of its rows the position in the chunk and the distance in memory.

    Few of these numbers are of 64 bits: registers are scarce.
    """
    row = tl.arange(0, BLOCK_ROWS)
    position = row // RANK
    first = length - 1 - chunk.to(tl.int64) * CHUNK if REVERSE else chunk.to(tl.int64) * CHUNK
    offset = row % RANK - position * RANK if REVERSE else row
    there = (row < CHUNK * RANK) & (position < length - chunk.to(tl.int64) * CHUNK)
    return first * RANK, position, offset, there


@kernel
def masks(high, low, record, weight, own, place, position, there):
    """What a row fades by until each later row of its record and chunk, and the mask that it is multiplied by there."""
    sums, rest = tl.load(high + place, mask=there, other=0.0), tl.load(low + place, mask=there, other=0.0)
    records = tl.load(record + place, mask=there, other=0).to(tl.int32)
    weights, owns = tl.load(weight + place, mask=there, other=0.0), tl.load(own + place, mask=there, other=0.0)
    earlier = (position[:, None] > position[None, :]) & (records[:, None] == records[None, :])
    distance = (sums[:, None] - sums[None, :]) + (rest[:, None] - rest[None, :])
    fading = tl.where(earlier, tl.exp(tl.where(earlier, distance, 0.0)), 0.0)
    mask = tl.where(position[:, None] == position[None, :], owns[None, :], fading * weights[None, :])
    return fading, mask, weights


@kernel
def load_rows(pointer, offset, stride, columns, there, present):
    """A tile (rows, columns) of contiguous columns."""
    return tl.load(
        pointer + offset[:, None] * stride + columns[None, :], mask=there[:, None] & present[None, :], other=0.0
    )


@kernel
def read_back_inputs(
    grad_outputs, inputs, input_rows, output_rows, grad_states, high, low, record, weight, own, to_end, skip_weight,
    grad_inputs, grad_scores, grad_numbers,
    length, chunks, heads, groups, head_width, state_size, batch_count,
    grad_batch, grad_row, grad_head, inputs_batch, inputs_row, inputs_head, into_batch, into_row, into_group,
    out_of_batch, out_of_row, out_of_group,
    REVERSE: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, HAS_SKIP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs, the weights, the skip weight and, as far as inputs of the chunk fade, of the decays."""
    batch, chunk, head = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks, tl.program_id(1)
    first, position, offset, there = rows_of_chunk(chunk, length, REVERSE, RANK, CHUNK, BLOCK_ROWS)
    width, state = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_STATES)
    of_states, of_width = state < state_size, width < head_width
    group = head // (heads // groups)
    c = load_rows(output_rows + batch * out_of_batch + group * out_of_group + first * out_of_row, offset, out_of_row,
                  state, there, of_states)  # fmt: skip
    b = load_rows(input_rows + batch * into_batch + group * into_group + first * into_row, offset, into_row, state,
                  there, of_states)  # fmt: skip
    scores = tl.dot(c, tl.trans(b), input_precision="ieee")
    after = tl.load(
        grad_states + ((batch * chunks + chunk) * heads + head) * head_width * state_size
        + width[None, :] * state_size + state[:, None],
        mask=of_width[None, :] & of_states[:, None], other=0.0,
    )  # fmt: skip
    through_state = tl.dot(b, after.to(b.dtype), input_precision="ieee")
    x = load_rows(inputs + batch * inputs_batch + head * inputs_head + first * inputs_row, offset, inputs_row, width,
                  there, of_width)  # fmt: skip
    grad = load_rows(grad_outputs + batch * grad_batch + head * grad_head + first * grad_row, offset, grad_row, width,
                     there, of_width)  # fmt: skip
    place = (batch * heads + head) * length + chunk.to(tl.int64) * CHUNK + position
    left_at_end = tl.load(to_end + place, mask=there, other=0.0)
    fading, mask, weights = masks(high, low, record, weight, own, place, position, there)
    grad_x = tl.dot(tl.trans((scores * mask).to(x.dtype)), grad, input_precision="ieee")
    grad_x += (weights * left_at_end)[:, None] * through_state
    if HAS_SKIP:
        grad_x += tl.load(skip_weight + head) * grad.to(tl.float32)
    target = grad_inputs + ((batch * length * RANK + first) * heads + head) * head_width
    tl.store(target + offset[:, None] * (heads * head_width) + width[None, :], grad_x.to(x.dtype),
             mask=there[:, None] & of_width[None, :])  # fmt: skip

    in_state = total(through_state * x.to(tl.float32), 1) * left_at_end
    numbers = grad_numbers + (batch * heads + head) * length * RANK + first + offset
    step = batch_count * heads * length * RANK
    tl.store(numbers + 3 * step, total(grad.to(tl.float32) * x.to(tl.float32), 1), mask=there)
    pairs = tl.dot(grad, tl.trans(x), input_precision="ieee")
    tile = grad_scores + ((batch * chunks + chunk) * heads + head) * BLOCK_ROWS * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    tl.store(tile + row[:, None] * BLOCK_ROWS + row[None, :], (pairs * mask).to(x.dtype))
    pairs *= scores
    tl.store(numbers + step, total(tl.where(position[:, None] == position[None, :], pairs, 0.0), 0), mask=there)
    pairs *= fading
    tl.store(numbers, total(pairs, 0) + in_state, mask=there)
    # The decay of a position stands between all later rows and all earlier ones.
    until = tl.associative_scan(pairs * weights[None, :], 1, _sum_combine)
    later = position[:, None] > position[None, :]
    to_next = tl.where(later, until, (in_state * weights)[:, None])
    tl.store(numbers + 2 * step, total(to_next, 0), mask=there)


@kernel
def read_back_matrix(
    grad_outputs, inputs, input_rows, output_rows, states, grad_states, grad_scores, from_start, written, chunk_decays,
    grad_matrix, grad_numbers,
    length, chunks, heads, groups, head_width, state_size, heads_at_once, batch_count,
    grad_batch, grad_row, grad_head, inputs_batch, inputs_row, inputs_head, into_batch, into_row, into_group,
    out_of_batch, out_of_row, out_of_group,
    INTO: tl.constexpr, REVERSE: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """Gradient of the input matrix (`INTO`) or the output matrix by `heads_at_once` heads, added up head by head.

    A program takes a block of the states. With the output matrix come the decays, as far as the state before the chunk
    fades.
    """
    batch, chunk, part = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks, tl.program_id(1)
    first, position, offset, there = rows_of_chunk(chunk, length, REVERSE, RANK, CHUNK, BLOCK_ROWS)
    width, state = tl.arange(0, BLOCK_WIDTH), tl.program_id(2) * BLOCK_STATES + tl.arange(0, BLOCK_STATES)
    row = tl.arange(0, BLOCK_ROWS)
    of_states, of_width = state < state_size, width < head_width
    group = part * heads_at_once // (heads // groups)
    if INTO:  # what a row's score is multiplied by
        other = load_rows(output_rows + batch * out_of_batch + group * out_of_group + first * out_of_row, offset,
                          out_of_row, state, there, of_states)  # fmt: skip
    else:
        other = load_rows(input_rows + batch * into_batch + group * into_group + first * into_row, offset, into_row,
                          state, there, of_states)  # fmt: skip
    summed = tl.full([BLOCK_ROWS, BLOCK_STATES], 0.0, tl.float32)
    for number in tl.range(heads_at_once, num_stages=1):  # loads ahead of their head would take registers
        head = part * heads_at_once + number
        of_head = (batch * chunks + chunk) * heads + head
        tile = grad_scores + of_head * BLOCK_ROWS * BLOCK_ROWS
        of_scores = tl.load(tile + row[:, None] * BLOCK_ROWS + row[None, :])
        inside = of_head * head_width * state_size + width[:, None] * state_size + state[None, :]
        present = of_width[:, None] & of_states[None, :]
        place = (batch * heads + head) * length + chunk.to(tl.int64) * CHUNK + position
        if INTO:
            x = load_rows(inputs + batch * inputs_batch + head * inputs_head + first * inputs_row, offset, inputs_row,
                          width, there, of_width)  # fmt: skip
            after = tl.load(grad_states + inside, mask=present, other=0.0)
            weights = tl.load(written + place, mask=there, other=0.0)
            summed += weights[:, None] * tl.dot(x, after.to(x.dtype), input_precision="ieee")
            summed += tl.dot(tl.trans(of_scores), other, input_precision="ieee")
        else:
            grad = load_rows(grad_outputs + batch * grad_batch + head * grad_head + first * grad_row, offset, grad_row,
                             width, there, of_width)  # fmt: skip
            before = tl.load(states + inside, mask=present, other=0.0)
            seen = tl.load(from_start + place, mask=there, other=0.0)
            read = seen[:, None] * tl.dot(grad, before.to(grad.dtype), input_precision="ieee")
            decayed = total(total(before * tl.load(grad_states + inside, mask=present, other=0.0), 1), 0)
            decayed *= tl.load(chunk_decays + (batch * heads + head) * chunks + chunk)
            summed += read + tl.dot(of_scores, other, input_precision="ieee")
            # A position sees the state before the chunk through all decays up to its own.
            c = load_rows(output_rows + batch * out_of_batch + group * out_of_group + first * out_of_row, offset,
                          out_of_row, state, there, of_states)  # fmt: skip
            from_state = total(read * c.to(tl.float32), 1)
            until_here = position[:, None] >= position[None, :]
            to_this = total(tl.where(until_here, from_state[:, None], 0.0), 0) + decayed
            numbers = ((4 + tl.program_id(2)) * batch_count + batch) * heads + head
            tl.store(grad_numbers + numbers * length * RANK + first + offset, to_this, mask=there)
    parts_of_group = (heads // groups) // heads_at_once
    target = ((part % parts_of_group) * batch_count + batch) * length * RANK + first
    target = grad_matrix + (target * groups + group) * state_size
    inside = offset[:, None] * (groups * state_size) + state[None, :]
    tl.store(target + inside, summed, mask=there[:, None] & of_states[None, :])
