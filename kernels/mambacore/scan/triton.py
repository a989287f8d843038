"""Adapter from tensors to the scan's kernels (``scan_forward``, ``scan_backward``), and the plan of their programs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mambacore.scan import triton_backward as scan_backward
from mambacore.scan import triton_forward as scan_forward
from mambacore.scan.fallback import DEVICE_BORDER_INTERVAL, border_shape
from mambacore.scan.native import channels_contiguous
from mambacore.triton.launch import multiprocessors, or_first

# Positions from one kept state to the next: kept states take state_size / 16 of the inputs' memory in float32.
INTERVAL = DEVICE_BORDER_INTERVAL
# Positions whose states backward holds in registers; with 4 of them ptxas moves some to memory (Hopper, 16 states).
KEPT = 2
# For so many states per channel (complex numbers counted twice), channels of a program forward, and channels and warps
# backward: at least half a warp's lanes lie along the channels, and a lane holds what its registers can hold beside an
# interval's states. (32 numbers of 8 channels in one warp are the same share, but ptxas moves 8 bytes to memory.)
BLOCKS = {8: (32, 32, 1), 16: (32, 16, 1), 32: (32, 16, 2), 64: (16, 4, 1), 128: (8, 2, 1)}
# A device is full with so many warps per multiprocessor, four schedulers with four warps each...
WARPS_TO_FILL = 16
# ...and a single pass is faster than two when it has this many: each scheduler has one, whose states are independent.
WARPS_FOR_ONE_PASS = 4
SHORTEST_CHUNK = 128
CARRY_CHANNELS = 32


class Plan(NamedTuple):
    """How the work is cut into programs."""

    block_channels: int
    blocks_per_group: int
    chunk_length: int
    chunk_count: int
    warps: int


def plan_of(batch: int, length: int, channels: int, groups: int, numbers: int, backward: bool, processors: int) -> Plan:
    """Channels and warps per program and chunks of the length, from the sizes alone: the same sizes give the same bits.

    Args:
        batch: sequences.
        length: positions.
        channels: channels of all groups.
        groups: groups of channels with matrices of their own.
        numbers: states per channel, complex ones counted twice.
        backward: of the backward pass.
        processors: multiprocessors of the device.
    """
    fitting = next((row for padded, row in BLOCKS.items() if numbers <= padded), (1, 1, 1))
    block, warps = fitting[1:] if backward else (fitting[0], 1)
    block = min(block, _power_of_two(channels // groups))
    blocks = -(-channels // groups // block)
    in_flight = batch * groups * blocks * warps
    if in_flight >= WARPS_FOR_ONE_PASS * processors:
        return Plan(block, blocks, max(length, 1), 1, warps)
    wanted = -(-WARPS_TO_FILL * processors // max(in_flight, 1))
    chunk_length = max(SHORTEST_CHUNK, INTERVAL * math.ceil(length / wanted / INTERVAL))
    return Plan(block, blocks, chunk_length, max(1, -(-length // chunk_length)), warps)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def by_number(states: Tensor) -> Tensor:
    """(..., channels, state_size) as kernels read it: (..., numbers, channels), real and imaginary parts in turn."""
    states = states.resolve_conj()
    pairs = torch.view_as_real(states).flatten(-2) if states.is_complex() else states
    return pairs.transpose(-1, -2).contiguous()


def from_numbers(numbers: Tensor, is_complex: bool) -> Tensor:
    """The opposite of :func:`by_number`."""
    pairs = numbers.transpose(-1, -2).contiguous()
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2))) if is_complex else pairs


def _rates(state_matrix: Tensor) -> Tensor:
    """A as kernels use it: its real part for powers of two, its imaginary part in turns."""
    if not state_matrix.is_complex():
        return by_number(state_matrix * math.log2(math.e))
    scaled = torch.complex(state_matrix.real * math.log2(math.e), state_matrix.imag / (2 * math.pi))
    return by_number(scaled)


class _Matrix(NamedTuple):
    """input_matrix or output_matrix as kernels read it, and its strides in numbers (batch, row, group)."""

    values: Tensor
    strides: tuple[int, int, int]
    fixed: bool


def _matrix(matrix: Tensor) -> _Matrix:
    if matrix.dim() == 2:
        return _Matrix(by_number(matrix), (0, 0, 0), True)
    matrix = channels_contiguous(matrix.resolve_conj())
    numbers = 2 if matrix.is_complex() else 1
    batch, row, group = (numbers * stride for stride in matrix.stride()[:3])
    return _Matrix(torch.view_as_real(matrix) if matrix.is_complex() else matrix, (batch, row, group), False)


class _Arguments:
    """What both passes share: tensors in the kernels' layout, sizes, strides and switches."""

    def __init__(
        self,
        inputs: Tensor,
        step_size: Tensor,
        state_matrix: Tensor,
        input_matrix: Tensor,
        output_matrix: Tensor,
        skip_weight: Tensor | None,
        gate: Tensor | None,
        step_bias: Tensor | None,
        resets: Tensor | None,
        step_softplus: bool,
        reverse: bool,
        backward: bool,
    ) -> None:
        self.inputs, self.step_size = channels_contiguous(inputs), channels_contiguous(step_size)
        self.gate = None if gate is None else channels_contiguous(gate)
        self.into, self.out_of = _matrix(input_matrix), _matrix(output_matrix)
        self.rates, self.is_complex, self.reverse = _rates(state_matrix), state_matrix.is_complex(), reverse
        self.skip_weight, self.step_bias = (
            None if tensor is None else tensor.contiguous() for tensor in (skip_weight, step_bias)
        )
        self.resets = None if resets is None else resets.contiguous().view(torch.uint8)
        self.batch, self.length, self.channels = inputs.shape
        self.state_size, self.numbers = state_matrix.shape[1], self.rates.shape[0]
        self.groups = max(matrix.shape[2] if matrix.dim() == 4 else 1 for matrix in (input_matrix, output_matrix))
        sizes = (self.batch, self.length, self.channels, self.groups, self.numbers)
        self.plan = plan_of(*sizes, backward, multiprocessors(inputs))
        self.switches: dict[str, Any] = {
            "IS_COMPLEX": self.is_complex, "SOFTPLUS": step_softplus, "REVERSE": reverse,
            "HAS_GATE": gate is not None, "HAS_BIAS": step_bias is not None, "HAS_RESETS": resets is not None,
            "OUT_OF_FIXED": self.out_of.fixed, "BLOCK_STATES": _power_of_two(self.state_size),
            "BLOCK_CHANNELS": self.plan.block_channels, "num_warps": self.plan.warps,
        }  # fmt: skip
        self.cut = (
            self.length, self.channels, self.channels // self.groups, self.plan.blocks_per_group, self.state_size,
            self.plan.chunk_length, self.plan.chunk_count,
        )  # fmt: skip

    def grid(self, chunks: int) -> tuple[int, int, int]:
        return self.groups * self.plan.blocks_per_group, chunks, self.batch

    def rows(self, sequence: Tensor | None) -> tuple[int, int]:
        return (0, 0) if sequence is None else (sequence.stride(0), sequence.stride(1))

    def buffer(self, *shape: int) -> Tensor:
        return self.inputs.new_empty(shape, dtype=torch.float32)

    def state_buffer(self, count: int) -> Tensor:
        return self.buffer(self.batch, count, self.numbers, self.channels)

    def carry(self, chunk_states: Tensor, step_sums: Tensor, first: Tensor | None, backward: bool) -> None:
        """Hand states (or their gradients) from chunk to chunk."""
        chunks = self.plan.chunk_count
        kept = None
        if self.resets is not None:
            ordered = self.resets.flip(1) if self.reverse else self.resets
            padded = F.pad(ordered, (0, chunks * self.plan.chunk_length - self.length))
            kept = (padded.unflatten(1, (chunks, -1)).amax(2) == 0).to(torch.uint8)
        scan_forward.carry.start(
            (-(-self.channels // CARRY_CHANNELS), self.state_size, self.batch),
            chunk_states, step_sums, self.rates, or_first(kept, self.rates), or_first(first, self.rates),
            self.channels, chunks, chunks - 1 if backward else 0, -1 if backward else 1, state_count=self.state_size,
            IS_COMPLEX=self.is_complex, CONJUGATE=backward, HAS_STATE=first is not None, HAS_RESETS=kept is not None,
            BLOCK_CHANNELS=CARRY_CHANNELS,
        )  # fmt: skip


def forward(
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None,
    gate: Tensor | None,
    step_bias: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
    step_softplus: bool,
    reverse: bool,
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambacore.scan.fallback.forward`, with borders every ``INTERVAL`` positions."""
    run = _Arguments(
        inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, resets,
        step_softplus, reverse, backward=False,
    )  # fmt: skip
    chunks = run.plan.chunk_count
    outputs = inputs.new_empty(inputs.shape)
    shape = border_shape(
        run.batch, run.length if keep_borders else 0, run.channels, run.state_size, run.is_complex, INTERVAL
    )
    borders = run.buffer(*shape)
    first = None if initial_state is None else by_number(initial_state)
    if run.length == 0:
        last = run.buffer(run.batch, run.numbers, run.channels).zero_() if first is None else first
        return outputs, from_numbers(last, run.is_complex).clone(), borders
    final_state = run.buffer(run.batch, run.numbers, run.channels)
    chunk_states, step_sums = first, None
    if chunks > 1:
        chunk_states, step_sums = run.state_buffer(chunks), run.buffer(run.batch, chunks, run.channels)

    def walk(summary: bool) -> None:
        scan_forward.walk.start(
            run.grid(chunks - 1 if summary else chunks),
            run.inputs, run.step_size, or_first(run.gate, run.inputs), run.into.values, run.out_of.values, run.rates,
            or_first(run.skip_weight, run.rates), or_first(run.step_bias, run.rates), or_first(run.resets, run.rates),
            or_first(chunk_states, run.rates), or_first(step_sums, run.rates), outputs, final_state, borders,
            *run.cut, borders.shape[1], *run.rows(run.inputs), *run.rows(run.step_size), *run.rows(run.gate),
            *run.into.strides, *run.out_of.strides, **run.switches, SUMMARY=summary,
            HAS_SKIP=skip_weight is not None, INTO_FIXED=run.into.fixed,
            HAS_STATE=not summary and chunk_states is not None, KEEP_BORDERS=keep_borders and not summary,
            INTERVAL=INTERVAL,
        )  # fmt: skip

    if chunks > 1:
        walk(summary=True)
        assert chunk_states is not None
        assert step_sums is not None
        run.carry(chunk_states, step_sums, first, backward=False)
    walk(summary=False)
    return outputs, from_numbers(final_state, run.is_complex), borders


def backward(
    grad_outputs: Tensor,
    grad_final_state: Tensor | None,
    inputs: Tensor,
    step_size: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip_weight: Tensor | None,
    gate: Tensor | None,
    step_bias: Tensor | None,
    resets: Tensor | None,
    border_states: Tensor,
    step_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`mambacore.scan.fallback.backward`, from borders every ``INTERVAL`` positions."""
    run = _Arguments(
        inputs, step_size, state_matrix, input_matrix, output_matrix, skip_weight, gate, step_bias, resets,
        step_softplus, reverse, backward=True,
    )  # fmt: skip
    chunks = run.plan.chunk_count
    grad_outputs, border_states = channels_contiguous(grad_outputs), border_states.contiguous()
    grad_inputs, grad_step_size = inputs.new_empty(inputs.shape), inputs.new_empty(inputs.shape)
    grad_gate = inputs.new_empty(0 if gate is None else inputs.shape)
    parts = (run.batch * chunks, run.numbers, run.channels)
    shared = (run.plan.blocks_per_group, run.batch, run.length, run.groups, run.numbers)
    grad_into, grad_out_of = (run.buffer(*(parts if matrix.fixed else shared)) for matrix in (run.into, run.out_of))
    grad_rates = run.buffer(*parts)
    scratch = run.buffer(run.batch * chunks, INTERVAL // KEPT, run.numbers, run.channels)
    grad_skip, grad_bias = (run.buffer(run.batch * chunks, run.channels) for _ in range(2))
    grad_first_state = run.buffer(run.batch, run.numbers, run.channels)
    first = None if grad_final_state is None else by_number(grad_final_state)
    carries = first
    strides = (*run.rows(run.step_size), *run.rows(run.gate))
    if chunks > 1:
        carries, step_sums = run.state_buffer(chunks), run.buffer(run.batch, chunks, run.channels)
        scan_backward.summary.start(
            run.grid(chunks - 1),
            grad_outputs, run.step_size, or_first(run.gate, run.inputs), run.out_of.values, run.rates,
            or_first(run.step_bias, run.rates), or_first(run.resets, run.rates), carries, step_sums, *run.cut,
            *run.rows(grad_outputs), *strides, *run.out_of.strides, **run.switches,
        )  # fmt: skip
        run.carry(carries, step_sums, first, backward=True)
    scan_backward.retreat.start(
        run.grid(chunks),
        grad_outputs, run.inputs, run.step_size, or_first(run.gate, run.inputs), run.into.values, run.out_of.values,
        run.rates, or_first(run.skip_weight, run.rates), or_first(run.step_bias, run.rates),
        or_first(run.resets, run.rates), border_states, scratch, or_first(carries, run.rates), grad_inputs,
        grad_step_size, or_first(None if gate is None else grad_gate, inputs), grad_into, grad_out_of, grad_rates,
        grad_skip, grad_bias, grad_first_state, *run.cut[:4], run.groups, *run.cut[4:], border_states.shape[1],
        *run.rows(grad_outputs), *run.rows(run.inputs), *strides, *run.into.strides, *run.out_of.strides,
        **run.switches,
        HAS_SKIP=skip_weight is not None, HAS_CARRY=carries is not None, INTO_FIXED=run.into.fixed, INTERVAL=INTERVAL,
        KEPT=KEPT,
    )  # fmt: skip
    none = inputs.new_empty(0)
    return (
        grad_inputs,
        grad_step_size,
        from_numbers(grad_rates.sum(0), run.is_complex),
        _grad_of_matrix(grad_into, run.into, input_matrix),
        _grad_of_matrix(grad_out_of, run.out_of, output_matrix),
        grad_skip.sum(0) if skip_weight is not None else none,
        grad_gate,
        grad_bias.sum(0) if step_bias is not None else inputs.new_empty(0),
        from_numbers(grad_first_state, run.is_complex),
    )


def _grad_of_matrix(partial: Tensor, matrix: _Matrix, like: Tensor) -> Tensor:
    """Add up the programs' parts in their order."""
    summed = partial.sum(0)
    if matrix.fixed:
        return from_numbers(summed, like.is_complex())
    return torch.view_as_complex(summed.unflatten(-1, (-1, 2))) if like.is_complex() else summed
