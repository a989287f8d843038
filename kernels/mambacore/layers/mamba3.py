"""The Mamba-3 mixer (arXiv 2603.15569): trapezoidal discretisation, rotating states, several inputs per step (MIMO)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.backends import compute_dtype
from mambacore.devices import wide_dtype, widened
from mambacore.layers.dual_blocks import Mamba3States, step_mamba3
from mambacore.layers.mamba2 import check_groups, head_width_for
from mambacore.layers.mixer import Mixer, check_state, register_mixer
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.plain_modules import are_plain_linear, is_plain, is_plain_state
from mambacore.layers.selective import initial_step_bias
from mambacore.packing import resets_before
from mambacore.parallel import active_ranks, history_over_ranks, recurrence_over_ranks, ssd_over_ranks

# No state decays more slowly than this rate times the step size.
SLOWEST_DECAY = 1e-4


class Mamba3State(NamedTuple):
    """State of a Mamba-3 mixer: the scan's state, and the last position's vectors for the trapezoidal rule."""

    angle: Tensor  # (batch, heads, angles), float64, from 0 to below 2 pi
    scan: Tensor  # (batch, heads, head_width, state_size), float32 or float64
    key: Tensor  # (batch, rank, heads, state_size): the last input matrix, rotated
    value: Tensor  # (batch, heads, head_width): the last inputs


def heavy_tailed(raw: Tensor) -> Tensor:
    """Return 1 + x above zero and 1 / (1 - x) below: a decay rate that is positive and smooth at zero."""
    return raw.clamp(min=0) + (1 - raw.clamp(max=0)).reciprocal()


def running_angles(turns: Tensor, initial: Tensor | None, resets: Tensor | None, reverse: bool) -> Tensor:
    """Return cumulative sums of (batch, length, heads, angles) in scan order, restarted at each record.

    In float64: over a million positions, float32 would lose the phase. Records are summed separately, in a logarithmic
    number of passes: differences of total sums would contain rounding errors of other records.
    """
    total = widened(turns.flip(1) if reverse else turns)
    if resets is None:
        total = total.cumsum(1)
        inside = None
    else:
        inside = (resets.flip(1) if reverse else resets)[..., None, None]  # whether the sum is complete
        distance = 1
        while distance < total.shape[1]:
            earlier, complete = (F.pad(part[:, :-distance], (0, 0, 0, 0, distance, 0)) for part in (total, inside))
            total = total + torch.where(inside, 0.0, earlier)
            inside = inside | complete
            distance *= 2
    if initial is not None:
        total = total + (initial.unsqueeze(1) if inside is None else torch.where(inside, 0.0, initial.unsqueeze(1)))
    return total.flip(1) if reverse else total


@register_mixer
class Mamba3Mixer(Mixer):
    """Mix along the sequence with a state space model whose states rotate by angles that depend on the input.

    With a step size `dt`, a decay ``a = exp(dt A)`` whose A depends on the input as well, a share ``t`` and vectors k
    (input matrix), q (output matrix) and v (inputs)::

        state_t  = a_t state_{t-1} + (1 - t_t) dt_t a_t v_{t-1} k_{t-1}^T + t_t dt_t v_t k_t^T
        output_t = state_t q_t + skip_weight * v_t

    k and q are normalised, get a bias per head, and are rotated by angles that accumulate along the sequence: a complex
    state in real numbers, which can count modulo a number and hence solves parity. Part of the trapezoid's next term is
    known only at the next position, so it is written one position early but not yet read (`own_weight` of
    `mambacore.ssd_scan`): a single scan suffices.

    Args:
        model_width: channels of the sequence.
        state_size: states per inner channel (the paper's N).
        head_width: inner channels of a head (the paper's P); by default 64, or a divisor of the inner channels.
        expansion: inner channels per model channel.
        groups: number of input and output matrices, shared by the heads.
        rotated_share: share of the states that rotate, at least one pair; 0 for a real state.
        trapezoidal: the rule above; otherwise Euler's, where t is 1 and the previous position has no weight.
        rank: number of vectors k, q and v per position (the paper's MIMO rank R); v is scaled by a learned weight for
            each, and outputs are summed with other learned weights.
        output_norm: normalise the outputs of each head before the gate.

    Raises:
        ValueError: if the heads do not divide the inner channels, the groups do not divide the heads, the share is
            outside 0 to 1, the states cannot rotate in pairs, or the rank is below 1.
    """

    name = "mamba3"
    supports_context_parallel = True

    def __init__(
        self,
        model_width: int,
        state_size: int = 64,
        head_width: int | None = None,
        expansion: int = 2,
        groups: int = 1,
        rotated_share: float = 0.5,
        trapezoidal: bool = True,
        rank: int = 1,
        output_norm: bool = False,
    ) -> None:
        super().__init__()
        self.model_width = model_width
        self.inner_width = expansion * model_width
        self.head_width = head_width_for(self.inner_width, head_width)
        self.heads = self.inner_width // self.head_width
        check_groups(self.heads, groups)
        if not 0 <= rotated_share <= 1 or (rotated_share > 0 and state_size % 2):
            raise ValueError(
                f"a share of {rotated_share} of {state_size} states cannot rotate in pairs; choose a share from 0 to 1 "
                "and an even number of states, or the share 0"
            )
        self.angles = max(1, int(state_size * rotated_share) // 2) if rotated_share > 0 else 0
        if rank < 1:
            raise ValueError(f"rank must be at least 1 but is {rank}")
        self.state_size, self.groups, self.rank = state_size, groups, rank
        self.rotated_share, self.trapezoidal = rotated_share, trapezoidal
        self.matrix_width = rank * groups * state_size
        self.parts = [
            self.inner_width, self.inner_width, self.matrix_width, self.matrix_width, self.heads, self.heads,
            self.heads if trapezoidal else 0, self.angles,
        ]  # fmt: skip
        self.input_projection = nn.Linear(model_width, sum(self.parts), bias=False)
        self.step_bias = nn.Parameter(initial_step_bias(self.heads))
        self.input_matrix_norm = RootMeanSquareNorm(state_size)
        self.output_matrix_norm = RootMeanSquareNorm(state_size)
        self.input_matrix_bias = nn.Parameter(torch.ones(self.heads, rank, state_size))
        self.output_matrix_bias = nn.Parameter(torch.ones(self.heads, rank, state_size))
        several = rank > 1
        of_rank = (self.heads, rank, self.head_width)
        self.rank_inputs = nn.Parameter(torch.full(of_rank, 1 / rank)) if several else None
        self.rank_gates = nn.Parameter(torch.ones(of_rank)) if several else None
        self.rank_outputs = nn.Parameter(torch.full(of_rank, 1 / rank)) if several else None
        self.skip_weight = nn.Parameter(torch.ones(self.heads))
        self.output_norm_weight = nn.Parameter(torch.ones(self.inner_width)) if output_norm else None
        self.output_norm_epsilon = 1e-5
        self.output_projection = nn.Linear(self.inner_width, model_width, bias=False)

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics, which weight decay must not pull towards zero."""
        return [self.step_bias, self.skip_weight, self.input_matrix_bias, self.output_matrix_bias]

    def forward(
        self,
        sequence: Tensor,
        state: Mamba3State | None = None,
        sequence_starts: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, Mamba3State]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state.

        `reverse` scans from the last position to the first.
        """
        outputs, state = self.mix(self.input_projection(sequence), state, sequence_starts, reverse)
        return self.output_projection(outputs), state

    def step(self, norm: RootMeanSquareNorm, sequence: Tensor, state: Any) -> tuple[Tensor, Mamba3State] | None:
        """Compute one position with the native library (see `Mixer.step`)."""
        come, go, norms = self.input_projection, self.output_projection, self._matrix_norms()
        if not (
            are_plain_linear(come, go)
            and all(is_plain(part, RootMeanSquareNorm) for part in norms)
            and self.has_native_step
            and (state is None or is_plain_state(state, Mamba3State, self._state_shapes(sequence), sequence.device))
        ):
            return None
        states = Mamba3States(*((None,) * 4 if state is None else state))
        stepped = step_mamba3(norm, self, sequence, states)
        return None if stepped is None else (stepped[0], Mamba3State(*stepped[1:]))

    @property
    def has_native_step(self) -> bool:
        """Whether the native library computes this mixer: projections without biases, one epsilon for both norms."""
        one, other = self._matrix_norms()
        return (
            self.input_projection.bias is None and self.output_projection.bias is None and one.epsilon == other.epsilon
        )

    def _matrix_norms(self) -> tuple[RootMeanSquareNorm, RootMeanSquareNorm]:
        return self.input_matrix_norm, self.output_matrix_norm

    def _state_shapes(self, sequence: Tensor) -> tuple[tuple[int, ...], ...]:
        batch, heads, width = sequence.shape[0], self.heads, self.head_width
        return (
            (batch, heads, self.angles), (batch, heads, width, self.state_size),
            (batch, self.rank, heads, self.state_size), (batch, heads, width),
        )  # fmt: skip

    def mix(
        self, projected: Tensor, state: Mamba3State | None, sequence_starts: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Mamba3State]:
        """Compute everything between the two projections, to (batch, length, inner_width)."""
        if state is not None:
            for name, tensor, shape in zip(state._fields, state, self._state_shapes(projected), strict=True):
                check_state(f"state.{name}", tensor, shape)
        gate, inputs, into, out_of, raw_step, raw_decay, raw_share, raw_turn = projected.split(self.parts, dim=-1)
        dtype = compute_dtype(projected.dtype)
        gate, inputs = (part.unflatten(-1, (self.heads, self.head_width)) for part in (gate, inputs))
        step = F.softplus(raw_step.to(dtype) + self.step_bias.to(dtype))
        log_decay = -heavy_tailed(raw_decay.to(dtype)).clamp(min=SLOWEST_DECAY) * step

        angle, angle_state = self._angles(raw_turn.to(dtype), step, state, sequence_starts, reverse)
        keys, queries = (
            self._rotated(norm(matrix.unflatten(-1, (self.rank, self.groups, self.state_size))), bias, angle)
            for norm, matrix, bias in (
                (self.input_matrix_norm, into, self.input_matrix_bias),
                (self.output_matrix_norm, out_of, self.output_matrix_bias),
            )
        )
        last, outgoing = self._last_vectors(keys, inputs, state, sequence_starts, reverse)
        own, weight, entering = step, step, None
        if self.trapezoidal:
            share = torch.sigmoid(raw_share.to(dtype))
            own, ahead = share * step, (1 - share) * step
            # Weight of an input from the next position on, which is known only there; 0 at the end of the piece.
            later = F.pad(ahead[:, :-1], (0, 0, 1, 0)) if reverse else F.pad(ahead[:, 1:], (0, 0, 0, 1))
            weight = own + (later if ahead.shape[1] else ahead)
            if ahead.shape[1]:
                first = ahead[:, -1 if reverse else 0, :, None, None]
                key, value = (vectors.to(dtype) for vectors in last)
                entering = first * torch.einsum("brhp,brhn->bhpn", self._of_rank(value, self.rank_inputs), key)
        outputs, scan_state = ssd_over_ranks(
            self._of_rank(inputs, self.rank_inputs),
            log_decay,
            keys,
            queries,
            input_weight=weight,
            own_weight=own,
            skip_weight=self.skip_weight,
            initial_state=None if state is None else state.scan,
            reverse=reverse,
            sequence_starts=sequence_starts,
            entering=entering,
        )
        return self._gated(outputs, gate).flatten(-2), Mamba3State(angle_state, scan_state, *outgoing)

    def _angles(
        self, raw_turn: Tensor, step: Tensor, state: Mamba3State | None, sequence_starts: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the angles at every position, (batch, length, heads, angles), and after the sequence, modulo 2 pi."""
        turns = (math.pi * torch.tanh(raw_turn)).unsqueeze(2) * step.unsqueeze(-1)
        resets = None if sequence_starts is None else resets_before(sequence_starts, reverse)
        nothing = turns.new_zeros(turns.shape[0], *turns.shape[2:], dtype=wide_dtype(turns.device))

        def run(initial: Tensor | None) -> tuple[Tensor, Tensor]:
            total = running_angles(turns, initial, resets, reverse)
            if total.shape[1] == 0:
                return total, nothing if initial is None else initial
            return total, total[:, 0 if reverse else -1]

        total, final = recurrence_over_ranks(
            run,
            final_state=lambda initial: run(initial)[1],
            total_decay=lambda: torch.ones_like(nothing[:, :1, :1]),
            initial_state=None if state is None else widened(state.angle),
            sequence_starts=sequence_starts,
            reverse=reverse,
        )
        return total.remainder(2 * math.pi).to(step.dtype), final.remainder(2 * math.pi)

    def _rotated(self, matrix: Tensor, bias: Tensor, angle: Tensor) -> Tensor:
        """Add the biases to (batch, length, rank, groups, state_size) and rotate, for every head.

        Pairs are neighbouring states; with a rank above 1, states n and n + state_size / 2, as in the published
        kernels.
        """
        of_heads = matrix.to(angle.dtype).repeat_interleave(self.heads // self.groups, dim=-2)
        of_heads = of_heads + bias.transpose(0, 1).to(angle.dtype)
        if self.angles == 0:
            return of_heads.to(matrix.dtype)
        pairs = of_heads.unflatten(-1, (-1, 2)) if self.rank == 1 else of_heads.unflatten(-1, (2, -1)).mT
        turning, still = pairs.split([self.angles, pairs.shape[-2] - self.angles], dim=-2)
        cosine, sine = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
        first, second = turning.unbind(-1)
        turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
        pairs = torch.cat([turned, still], dim=-2)
        return (pairs if self.rank == 1 else pairs.mT).flatten(-2).to(matrix.dtype)

    def _last_vectors(
        self, keys: Tensor, inputs: Tensor, state: Mamba3State | None, sequence_starts: Tensor | None, reverse: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return key and value of the position before this rank's part and of the last one of the whole sequence."""
        batch = keys.shape[0]
        shapes = keys.shape[2:], inputs.shape[2:]
        together = torch.cat([keys.flatten(2), inputs.flatten(2)], dim=-1)

        def apart(vectors: Tensor) -> tuple[Tensor, Tensor]:
            key, value = vectors.split([math.prod(shapes[0]), math.prod(shapes[1])], dim=-1)
            return key.reshape(batch, *shapes[0]), value.reshape(batch, *shapes[1])

        initial = together.new_zeros(batch, 1, together.shape[-1])
        if state is not None:
            initial = torch.cat([state.key.flatten(1), state.value.flatten(1)], dim=-1).unsqueeze(1).to(together.dtype)
        ranks = active_ranks()
        if ranks is not None:
            incoming, outgoing = history_over_ranks(ranks, together, 1, initial, reverse, sequence_starts)
            return apart(incoming[:, 0]), apart(outgoing[:, 0])
        extended = torch.cat([together, initial] if reverse else [initial, together], dim=1)
        return apart(initial[:, 0]), apart(extended[:, 0 if reverse else -1])

    def _of_rank(self, values: Tensor, weight: Tensor | None) -> Tensor:
        """Expand (..., heads, head_width) to (..., rank, heads, head_width), each member scaled by its weight."""
        values = values.unsqueeze(-3)
        return values if weight is None else values * weight.transpose(0, 1).to(values.dtype)

    def _gated(self, outputs: Tensor, gate: Tensor) -> Tensor:
        """Normalise (if configured), gate and sum (batch, length, rank, heads, head_width) over the rank."""
        if self.output_norm_weight is not None:
            wide = outputs.to(compute_dtype(outputs.dtype))
            scale = (wide.square().mean(-1, keepdim=True) + self.output_norm_epsilon).rsqrt()
            weight = self.output_norm_weight.unflatten(0, (self.heads, self.head_width))
            outputs = (wide * scale * weight).to(outputs.dtype)
        outputs = outputs * F.silu(self._of_rank(gate, self.rank_gates))
        if self.rank_outputs is not None:
            outputs = outputs * self.rank_outputs.transpose(0, 1).to(outputs.dtype)
        return outputs.sum(2)
