"""The GPU's kernels of the state space dual scan: forward in three passes, of which two are products on tensor cores.

What a chunk adds to the state (`add_states`), the states before the chunks (`pass_states`), the outputs (`read_out`).
What decays make of a chunk (`mambacore.ssd.triton`) is prepared by PyTorch: it is as small as the decays.

Products of float32 numbers are exact to float32 (`ieee`): in tf32 they would keep 10 bits.
"""

# Compile-time switches and sizes are named like constants.
# ruff: noqa: N803

import triton.language as tl

from mambacore.triton.launch import kernel


@kernel
def rows_in_memory(
    chunk, length, REVERSE: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Of the rows of a chunk in the direction of the walk: position in the walk, row in memory, whether it is there."""
    row = tl.arange(0, BLOCK_ROWS)
    position = chunk * CHUNK + row // RANK
    there = (row < CHUNK * RANK) & (position < length)
    place = length - 1 - position if REVERSE else position
    return position, place * RANK + row % RANK, there


@kernel
def add_states(
    inputs, input_rows, written, added,
    length, chunks, heads, groups, head_width, state_size,
    inputs_batch, inputs_row, inputs_head, into_batch, into_row, into_group,
    REVERSE: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """sum over the rows of written * x B^T, (head_width, state_size), for one chunk and head."""
    batch, chunk, head = tl.program_id(0) // chunks, tl.program_id(0) % chunks, tl.program_id(1)
    position, row, there = rows_in_memory(chunk, length, REVERSE, RANK, CHUNK, BLOCK_ROWS)
    width, state = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_STATES)
    group = head // (heads // groups)
    x = tl.load(
        inputs + batch.to(tl.int64) * inputs_batch + head * inputs_head + row[None, :] * inputs_row + width[:, None],
        mask=there[None, :] & (width < head_width)[:, None], other=0.0,
    )  # fmt: skip
    b = tl.load(
        input_rows + batch.to(tl.int64) * into_batch + group * into_group + row[:, None] * into_row + state[None, :],
        mask=there[:, None] & (state < state_size)[None, :], other=0.0,
    )  # fmt: skip
    weight = tl.load(written + (batch.to(tl.int64) * heads + head) * length + position, mask=there, other=0.0)
    weighted = (x.to(tl.float32) * weight[None, :]).to(x.dtype)
    total = tl.dot(weighted, b, input_precision="ieee")
    place = ((batch.to(tl.int64) * chunks + chunk) * heads + head) * head_width * state_size
    tl.store(added + place + width[:, None] * state_size + state[None, :], total,
             mask=(width < head_width)[:, None] & (state < state_size)[None, :])  # fmt: skip


@kernel
def pass_states(
    added, chunk_decays, first_state, final_state, chunks, heads, numbers,
    HAS_STATE: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds, in its place the state before it; one program for a head's numbers.

    Backward the walk begins at the last chunk: from what each chunk's outputs say of the state before it, in its place
    the gradient of the state after it.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = number < numbers
    of_head = (batch.to(tl.int64) * heads + head) * numbers + number
    state = tl.full([BLOCK], 0.0, tl.float32)
    if HAS_STATE:
        state = tl.load(first_state + of_head, mask=there, other=0.0)
    for number_of_chunk in range(chunks):
        chunk = chunks - 1 - number_of_chunk if BACKWARD else number_of_chunk
        place = added + ((batch.to(tl.int64) * chunks + chunk) * heads + head) * numbers + number
        more = tl.load(place, mask=there, other=0.0)
        left = tl.load(chunk_decays + (batch.to(tl.int64) * heads + head) * chunks + chunk)
        tl.store(place, state, mask=there)
        state = left * state + more
    tl.store(final_state + of_head, state, mask=there)


@kernel
def read_out(
    inputs, input_rows, output_rows, outputs, states, high, low, record, weight, own, skip_weight,
    length, chunks, heads, groups, head_width, state_size,
    inputs_batch, inputs_row, inputs_head, into_batch, into_row, into_group, out_of_batch, out_of_row, out_of_group,
    REVERSE: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, HAS_SKIP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_STATES: tl.constexpr,
):  # fmt: skip
    """(scores * mask) x + exp(c) C h + D x of one chunk and head."""
    batch, chunk, head = tl.program_id(0) // chunks, tl.program_id(0) % chunks, tl.program_id(1)
    position, row, there = rows_in_memory(chunk, length, REVERSE, RANK, CHUNK, BLOCK_ROWS)
    width, state = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_STATES)
    group = head // (heads // groups)
    of_states, of_width = state < state_size, width < head_width
    c = tl.load(
        output_rows + batch.to(tl.int64) * out_of_batch + group * out_of_group + row[:, None] * out_of_row
        + state[None, :],
        mask=there[:, None] & of_states[None, :], other=0.0,
    )  # fmt: skip
    b = tl.load(
        input_rows + batch.to(tl.int64) * into_batch + group * into_group + row[None, :] * into_row + state[:, None],
        mask=there[None, :] & of_states[:, None], other=0.0,
    )  # fmt: skip
    x = tl.load(
        inputs + batch.to(tl.int64) * inputs_batch + head * inputs_head + row[:, None] * inputs_row + width[None, :],
        mask=there[:, None] & of_width[None, :], other=0.0,
    )  # fmt: skip
    before = tl.load(
        states + ((batch.to(tl.int64) * chunks + chunk) * heads + head) * head_width * state_size
        + width[None, :] * state_size + state[:, None],
        mask=of_width[None, :] & of_states[:, None], other=0.0,
    )  # fmt: skip
    place = (batch.to(tl.int64) * heads + head) * length + position
    total, rest = tl.load(high + place, mask=there, other=0.0), tl.load(low + place, mask=there, other=0.0)
    records = tl.load(record + place, mask=there, other=0).to(tl.int32)
    weights, owns = tl.load(weight + place, mask=there, other=0.0), tl.load(own + place, mask=there, other=0.0)
    earlier = (position[:, None] > position[None, :]) & (records[:, None] == records[None, :])
    # The sum c in two numbers: differences of large ones stay exact. Masked before the exponential, which may overflow.
    distance = (total[:, None] - total[None, :]) + (rest[:, None] - rest[None, :])
    fading = tl.exp(tl.where(earlier, distance, 0.0))
    mask = tl.where(earlier, fading * weights[None, :], 0.0)
    mask = tl.where(position[:, None] == position[None, :], owns[None, :], mask)
    scores = tl.dot(c, b, input_precision="ieee") * mask
    result = tl.dot(scores.to(x.dtype), x, input_precision="ieee")
    seen = tl.where(records == 0, tl.exp(total + rest), 0.0)
    result += seen[:, None] * tl.dot(c, before.to(c.dtype), input_precision="ieee")
    if HAS_SKIP:
        result += tl.load(skip_weight + head) * x.to(tl.float32)
    target = (batch.to(tl.int64) * length * RANK + row[:, None]) * heads * head_width + head * head_width
    tl.store(outputs + target + width[None, :], result.to(x.dtype), mask=there[:, None] & of_width[None, :])
