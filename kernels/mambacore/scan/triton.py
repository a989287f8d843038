"""The scan's Triton kernels (`triton_forward`, `triton_backward`) on tensors, and the plan of their programs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambacore.layout import (
    DEVICE_INTERVAL,
    as_numbers,
    as_states,
    boundary_shape,
    channels_contiguous,
    group_count,
    matrix_strides,
    optional_contiguous,
    segments_without_reset,
    sequence_strides,
    states_contiguous,
    sum_of_parts,
)
from mambacore.scan.arguments import ScanArguments, ScanGradients
from mambacore.scan.triton_backward import add_up, retreat, summary
from mambacore.scan.triton_forward import carry, walk
from mambacore.triton.launch import multiprocessors, or_first


class Block(NamedTuple):
    """Channels and warps of a program."""

    channels: int
    warps: int


# For so many states per channel (complex numbers counted twice), the programs forward and backward: the fewest
# instructions per state that keep everything in registers (`benchmarks/gpu_static.py`).
BLOCKS = {
    8: (Block(128, 1), Block(128, 1)),
    16: (Block(64, 1), Block(64, 1)),
    32: (Block(64, 2), Block(64, 2)),
    64: (Block(16, 1), Block(4, 1)),
    128: (Block(8, 1), Block(2, 1)),
}
# Where a matrix is the same at all positions, backward also keeps the sums of its gradient.
FIXED_BLOCKS = BLOCKS | {
    8: (Block(128, 1), Block(64, 1)),
    16: (Block(64, 1), Block(32, 1)),
    32: (Block(64, 2), Block(32, 2)),
}
# Complex states take more registers each.
COMPLEX_BLOCKS = FIXED_BLOCKS | {8: (Block(64, 1), Block(64, 1)), 32: (Block(16, 2), Block(16, 2))}
# A device is full with so many warps per multiprocessor, four schedulers with four warps each...
WARPS_TO_FILL = 16
# ...and a single pass is faster than two when it has this many: each scheduler has one, whose states are independent.
WARPS_FOR_ONE_PASS = 4
SHORTEST_CHUNK = 128
CARRY_CHANNELS = 32
SUM_BLOCK, SUM_WARPS = 1024, 4


class Plan(NamedTuple):
    """How the work is cut into programs."""

    block_channels: int
    blocks_per_group: int
    chunk_length: int
    chunk_count: int
    warps: int


def plan_of(
    batch: int,
    length: int,
    channels: int,
    groups: int,
    numbers: int,
    backward: bool,
    processors: int,
    is_complex: bool = False,
    fixed: bool = False,
) -> Plan:
    """Channels and warps per program and chunks of the length, from the sizes alone: the same sizes give the same bits.

    Args:
        batch: sequences.
        length: positions.
        channels: channels of all groups.
        groups: groups of channels with matrices of their own.
        numbers: states per channel, complex ones counted twice.
        backward: of the backward pass.
        processors: multiprocessors of the device.
        is_complex: whether the states are complex.
        fixed: whether the input or the output matrix is the same at all positions.
    """
    blocks_of = COMPLEX_BLOCKS if is_complex else FIXED_BLOCKS if fixed else BLOCKS
    fitting = next((row for padded, row in blocks_of.items() if numbers <= padded), (Block(1, 1), Block(1, 1)))
    block, warps = fitting[backward]
    block = min(block, _power_of_two(channels // groups))
    blocks = -(-channels // groups // block)
    in_flight = batch * groups * blocks * warps
    if in_flight >= WARPS_FOR_ONE_PASS * processors:
        return Plan(block, blocks, max(length, 1), 1, warps)
    wanted = -(-WARPS_TO_FILL * processors // max(in_flight, 1))
    chunk_length = max(SHORTEST_CHUNK, DEVICE_INTERVAL * math.ceil(length / wanted / DEVICE_INTERVAL))
    return Plan(block, blocks, chunk_length, max(1, -(-length // chunk_length)), warps)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _rates(state_matrix: Tensor) -> Tensor:
    """A as kernels use it: its real part for powers of two, its imaginary part in turns."""
    if not state_matrix.is_complex():
        rates = state_matrix.new_empty(state_matrix.shape[::-1])
        return torch.mul(state_matrix.t(), math.log2(math.e), out=rates)
    scaled = torch.complex(state_matrix.real * math.log2(math.e), state_matrix.imag / (2 * math.pi))
    return as_numbers(scaled)


class _Matrix(NamedTuple):
    """An input or output matrix as kernels read it, and its strides in numbers (batch, row, group)."""

    values: Tensor
    strides: tuple[int, int, int]
    fixed: bool


def _matrix(matrix: Tensor) -> _Matrix:
    if matrix.dim() == 2:
        return _Matrix(as_numbers(matrix), matrix_strides(matrix), True)
    matrix = states_contiguous(matrix)
    return _Matrix(torch.view_as_real(matrix) if matrix.is_complex() else matrix, matrix_strides(matrix), False)


class _Call:
    """What both passes share: tensors in the kernels' layout, sizes, strides and switches."""

    def __init__(self, arguments: ScanArguments, backward: bool) -> None:
        inputs = arguments.inputs
        self.inputs, self.step_size = channels_contiguous(inputs), channels_contiguous(arguments.step_size)
        self.gate = None if arguments.gate is None else channels_contiguous(arguments.gate)
        self.into, self.out_of = _matrix(arguments.input_matrix), _matrix(arguments.output_matrix)
        self.rates, self.is_complex, self.reverse = (
            _rates(arguments.state_matrix), arguments.is_complex, arguments.reverse,
        )  # fmt: skip
        self.skip_weight, self.step_bias = (
            optional_contiguous(tensor) for tensor in (arguments.skip_weight, arguments.step_bias)
        )
        self.resets = None if arguments.resets is None else arguments.resets.contiguous().view(torch.uint8)
        self.batch, self.length, self.channels = inputs.shape
        self.state_size, self.numbers = arguments.state_size, self.rates.shape[0]
        self.groups = group_count(arguments.input_matrix, arguments.output_matrix)
        sizes = (self.batch, self.length, self.channels, self.groups, self.numbers)
        fixed = self.into.fixed or self.out_of.fixed
        self.plan = plan_of(*sizes, backward, multiprocessors(inputs), self.is_complex, fixed)
        self.blocks = self.groups * self.plan.blocks_per_group
        self.switches: dict[str, Any] = {
            "IS_COMPLEX": self.is_complex, "SOFTPLUS": arguments.step_softplus, "REVERSE": self.reverse,
            "HAS_GATE": self.gate is not None, "HAS_BIAS": self.step_bias is not None,
            "HAS_RESETS": self.resets is not None, "OUT_OF_FIXED": self.out_of.fixed,
            "BLOCK_STATES": _power_of_two(self.state_size), "BLOCK_CHANNELS": self.plan.block_channels,
            "num_warps": self.plan.warps,
        }  # fmt: skip
        self.cut = (
            self.length, self.channels, self.channels // max(self.groups, 1), self.plan.blocks_per_group, self.blocks,
            self.state_size, self.plan.chunk_length, self.plan.chunk_count,
        )  # fmt: skip

    def grid(self, chunks: int) -> tuple[int, int]:
        """Programs: the blocks of every batch item along the only axis that takes more than 65,535, and chunks."""
        return self.batch * self.blocks, chunks

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inputs.new_empty(shape, dtype=dtype)

    def state_buffer(self, count: int) -> Tensor:
        return self.buffer(self.batch, count, self.numbers, self.channels)

    def step_sums(self) -> Tensor:
        """Of every chunk, (batch, chunks, channels); in double precision where states turn (`mambacore.layout`)."""
        dtype = torch.float64 if self.is_complex else torch.float32
        return self.buffer(self.batch, self.plan.chunk_count, self.channels, dtype=dtype)

    def hand_on(self, chunk_states: Tensor, step_sums: Tensor, first: Tensor | None, backward: bool) -> None:
        """Hand states (or their gradients) from chunk to chunk."""
        chunks, blocks = self.plan.chunk_count, -(-self.channels // CARRY_CHANNELS)
        kept = None
        if self.resets is not None:
            kept = segments_without_reset(self.resets, chunks, self.plan.chunk_length, self.reverse)
        carry.start(
            (self.batch * blocks, self.state_size),
            chunk_states, step_sums, self.rates, or_first(kept, self.rates), or_first(first, self.rates),
            self.channels, blocks, chunks, chunks - 1 if backward else 0, -1 if backward else 1,
            state_count=self.state_size, IS_COMPLEX=self.is_complex, CONJUGATE=backward, HAS_STATE=first is not None,
            HAS_RESETS=kept is not None, BLOCK_CHANNELS=CARRY_CHANNELS,
        )  # fmt: skip


def forward(arguments: ScanArguments, keep_boundaries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `mambacore.scan.fallback.forward`, with boundary states every `DEVICE_INTERVAL` positions."""
    run, inputs = _Call(arguments, backward=False), arguments.inputs
    chunks = run.plan.chunk_count
    outputs = inputs.new_empty(inputs.shape)
    shape = boundary_shape(
        run.batch, run.length if keep_boundaries else 0, run.channels, run.state_size, run.is_complex, DEVICE_INTERVAL
    )
    boundaries = run.buffer(*shape)
    first = None if arguments.initial_state is None else as_numbers(arguments.initial_state)
    if run.length == 0:
        last = run.buffer(run.batch, run.numbers, run.channels).zero_() if first is None else first
        return outputs, as_states(last, run.is_complex).clone(), boundaries
    final_state = run.buffer(run.batch, run.numbers, run.channels)
    chunk_states, step_sums = first, None
    if chunks > 1:
        chunk_states, step_sums = run.state_buffer(chunks), run.step_sums()

    def run_chunks(summary: bool) -> None:
        walk.start(
            run.grid(chunks - 1 if summary else chunks),
            run.inputs, run.step_size, or_first(run.gate, run.inputs), run.into.values, run.out_of.values, run.rates,
            or_first(run.skip_weight, run.rates), or_first(run.step_bias, run.rates), or_first(run.resets, run.rates),
            or_first(chunk_states, run.rates), or_first(step_sums, run.rates), outputs, final_state, boundaries,
            *run.cut, boundaries.shape[1], *sequence_strides(run.inputs), *sequence_strides(run.step_size),
            *sequence_strides(run.gate), *run.into.strides, *run.out_of.strides, **run.switches, SUMMARY=summary,
            HAS_SKIP=run.skip_weight is not None, INTO_FIXED=run.into.fixed,
            HAS_STATE=not summary and chunk_states is not None, KEEP_BOUNDARIES=keep_boundaries and not summary,
            INTERVAL=DEVICE_INTERVAL,
        )  # fmt: skip

    if chunks > 1:
        run_chunks(summary=True)
        assert chunk_states is not None
        assert step_sums is not None
        run.hand_on(chunk_states, step_sums, first, backward=False)
    run_chunks(summary=False)
    return outputs, as_states(final_state, run.is_complex), boundaries


def backward(
    grad_outputs: Tensor, grad_final_state: Tensor | None, arguments: ScanArguments, boundary_states: Tensor
) -> ScanGradients:
    """As `mambacore.scan.fallback.backward`, from boundary states every `DEVICE_INTERVAL` positions."""
    run, inputs = _Call(arguments, backward=True), arguments.inputs
    chunks = run.plan.chunk_count
    grad_outputs, boundary_states = channels_contiguous(grad_outputs), boundary_states.contiguous()
    grad_inputs, grad_step_size = inputs.new_empty(inputs.shape), inputs.new_empty(inputs.shape)
    grad_gate = inputs.new_empty(0 if run.gate is None else inputs.shape)
    parts = (run.batch * chunks, run.numbers, run.channels)
    shared = (run.plan.blocks_per_group, run.batch, run.length, run.groups, run.numbers)
    grad_into, grad_out_of = (run.buffer(*(parts if matrix.fixed else shared)) for matrix in (run.into, run.out_of))
    grad_rates = run.buffer(*parts)
    block = run.plan.block_channels
    programs = (run.batch * chunks, run.blocks, DEVICE_INTERVAL)
    scratch = run.buffer(*programs, run.numbers // run.state_size * _power_of_two(run.state_size), block)
    steps = run.buffer(*programs, 2, block)
    grad_skip, grad_bias = (run.buffer(run.batch * chunks, run.channels) for _ in range(2))
    grad_first_state = run.buffer(run.batch, run.numbers, run.channels)
    first = None if grad_final_state is None else as_numbers(grad_final_state)
    if run.length == 0:  # no program runs: everything but the state's own gradient is zero
        grad_first_state.zero_()
        if first is not None:
            grad_first_state.copy_(first)
        for partial in (grad_rates, grad_into, grad_out_of, grad_skip, grad_bias):
            partial.zero_()
    carries = first
    strides = (*sequence_strides(run.step_size), *sequence_strides(run.gate))
    if chunks > 1:
        carries, step_sums = run.state_buffer(chunks), run.step_sums()
        summary.start(
            run.grid(chunks - 1),
            grad_outputs, run.step_size, or_first(run.gate, run.inputs), run.out_of.values, run.rates,
            or_first(run.step_bias, run.rates), or_first(run.resets, run.rates), carries, step_sums, *run.cut,
            *sequence_strides(grad_outputs), *strides, *run.out_of.strides, **run.switches,
        )  # fmt: skip
        run.hand_on(carries, step_sums, first, backward=True)
    retreat.start(
        run.grid(chunks if run.length > 0 else 0),
        grad_outputs, run.inputs, run.step_size, or_first(run.gate, run.inputs), run.into.values, run.out_of.values,
        run.rates, or_first(run.skip_weight, run.rates), or_first(run.step_bias, run.rates),
        or_first(run.resets, run.rates), boundary_states, scratch, steps, or_first(carries, run.rates), grad_inputs,
        grad_step_size, or_first(None if run.gate is None else grad_gate, inputs), grad_into, grad_out_of, grad_rates,
        grad_skip, grad_bias, grad_first_state, run.batch, run.groups, *run.cut, boundary_states.shape[1],
        *sequence_strides(grad_outputs), *sequence_strides(run.inputs), *strides, *run.into.strides,
        *run.out_of.strides, **run.switches,
        HAS_SKIP=run.skip_weight is not None, HAS_CARRY=carries is not None, INTO_FIXED=run.into.fixed,
        INTERVAL=DEVICE_INTERVAL,
    )  # fmt: skip
    grad_into, grad_out_of = _added_up(grad_into, grad_out_of, run, arguments)
    return ScanGradients(
        grad_inputs,
        grad_step_size,
        as_states(sum_of_parts(grad_rates), run.is_complex),
        _grad_of_matrix(grad_into, run.into, arguments.input_matrix),
        _grad_of_matrix(grad_out_of, run.out_of, arguments.output_matrix),
        sum_of_parts(grad_skip) if run.skip_weight is not None else inputs.new_empty(0),
        grad_gate,
        sum_of_parts(grad_bias) if run.step_bias is not None else inputs.new_empty(0),
        as_states(grad_first_state, run.is_complex),
    )


def _added_up(into: Tensor, out_of: Tensor, run: _Call, arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """The sums of the parts of both matrices' gradients, in the matrices' dtype where that is real."""
    if run.into.fixed or run.out_of.fixed or into[0].numel() == 0:
        return sum_of_parts(into), sum_of_parts(out_of)
    sums = [
        parts.new_empty(parts.shape[1:], dtype=parts.dtype if run.is_complex else like.dtype)
        for parts, like in ((into, arguments.input_matrix), (out_of, arguments.output_matrix))
    ]
    count = into[0].numel()
    add_up.start(
        (-(-count // SUM_BLOCK), 2), into, out_of, *sums, into.shape[0], count, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS
    )
    return sums[0], sums[1]


def _grad_of_matrix(summed: Tensor, matrix: _Matrix, like: Tensor) -> Tensor:
    """The gradient of a matrix as the matrix is, from the sum of the programs' parts."""
    if matrix.fixed:
        return as_states(summed, like.is_complex())
    return torch.view_as_complex(summed.unflatten(-1, (-1, 2))) if like.is_complex() else summed.to(like.dtype)
