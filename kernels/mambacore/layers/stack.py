"""Residual blocks and stacks of them, each a function `(sequence, state) -> (sequence, state)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambacore.devices import halve_positions, positions_at_once
from mambacore.errors import InputError
from mambacore.layers.feed_forward import GatedFeedForward
from mambacore.layers.mixer import Mixer, MixerDescription, build_mixer, parameters_without_decay
from mambacore.layers.norm import RootMeanSquareNorm, adds_in_kernel, norm_and_sum
from mambacore.layers.plain_modules import calls_are_watched, is_plain, is_plain_tensor, operators_are_watched
from mambacore.parallel import active_ranks

# One state per block, each of the kind of its mixer.
StackState = tuple[Any, ...]

# Without gradients a long sequence is walked in pieces of this many positions (over the batch), whose buffers stay in
# the cache and are used again: about twice as fast on a CPU as one sweep over freshly mapped memory. On other devices
# pieces are as long as fits (`mambacore.devices.positions_at_once`).
PIECE_POSITIONS = 4096
# A piece of a large batch has at least this many positions: calling the operators costs as much as so many.
SHORTEST_PIECE = 64
# Of blocks that are one call each (`Mixer.steps_many`), which keep to the cache by themselves.
PIECE_POSITIONS_OF_CALLS = 65_536
# What fewer pieces save does not make up for putting their outputs together.
FEWEST_PIECES = 3


class ResidualBlock(nn.Module):
    """Residual block sequence + mixer(norm(sequence)), optionally followed by a gated feed-forward block.

    Args:
        model_width: channels of the sequence.
        mixer: the sequence mixer.
        norm_epsilon: keeps positions of zeros finite in the norms.
        feed_forward_width: hidden channels of the feed-forward layer; None for no such layer.
        dropout: dropout probability of the channels of each residual branch.

    Raises:
        InputError: if feed_forward_width is below 1, or dropout outside [0, 1).
    """

    def __init__(
        self,
        model_width: int,
        mixer: Mixer,
        norm_epsilon: float = 1e-5,
        feed_forward_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1 but is {dropout}")
        self.norm = RootMeanSquareNorm(model_width, norm_epsilon)
        self.norm.before_linear = vars(type(mixer)).get("begins_with_linear", False)
        self.mixer = mixer
        wide = feed_forward_width is not None
        self.feed_forward_norm = RootMeanSquareNorm(model_width, norm_epsilon) if wide else None
        self.feed_forward = None if feed_forward_width is None else GatedFeedForward(model_width, feed_forward_width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics of the mixer."""
        return parameters_without_decay(self)

    @property
    def state_matrix(self) -> Tensor | None:
        """State matrix of the mixer."""
        return self.mixer.state_matrix

    def forward(self, sequence: Tensor, state: Any = None, sequence_starts: Tensor | None = None) -> tuple[Tensor, Any]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state."""
        stepped = self.mixer.step(self.norm, sequence, state) if self._may_step(sequence, sequence_starts) else None
        if stepped is None:
            sequence, branch, state = self.without_last_sum(sequence, None, state, sequence_starts)
            return sequence + branch, state
        sequence, state = stepped
        if self.feed_forward is not None:
            assert self.feed_forward_norm is not None  # it comes with the layer
            sequence = sequence + self._dropped(self.feed_forward(self.feed_forward_norm(sequence)))
        return sequence, state

    def without_last_sum(
        self, sequence: Tensor, branch: Tensor | None, state: Any, sequence_starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        """Compute the block but for its last sum, which the next norm makes on the way (`RootMeanSquareNorm.of_sum`).

        Args:
            sequence: (batch, length, model_width).
            branch: what is still to be added to the sequence, of the same shape; None for nothing.
            state, sequence_starts: as in `forward`.

        Returns:
            The sequence, what is still to be added to it, and the outgoing state.
        """
        normalised, sequence = norm_and_sum(self.norm, sequence, branch)
        mixed, state = self.mixer(normalised, state, sequence_starts)
        branch = self._dropped(mixed)
        if self.feed_forward is not None:
            assert self.feed_forward_norm is not None  # it comes with the layer
            normalised, sequence = norm_and_sum(self.feed_forward_norm, sequence, branch)
            branch = self._dropped(self.feed_forward(normalised))
        return sequence, branch, state

    @property
    def drops_channels(self) -> bool:
        """Whether the branch is changed before it is added, by dropout or by what has taken its place."""
        return self.dropout is not None and (self.dropout.training or not is_plain(self.dropout, nn.Dropout))

    def _dropped(self, branch: Tensor) -> Tensor:
        return branch if self.dropout is None else self.dropout(branch)

    def _may_step(self, sequence: Tensor, sequence_starts: Tensor | None) -> bool:
        """Return whether the mixer's `step` may be used, bypassing its `forward` and that of the norm."""
        if torch.is_grad_enabled() or sequence.dim() != 3 or sequence_starts is not None:
            return False
        mixer = type(self.mixer)
        if sequence.shape[1] != 1 and not vars(mixer).get("steps_many", False):
            return False
        return (
            "step" in vars(mixer)
            and is_plain(self.mixer, mixer)
            and is_plain(self.norm, RootMeanSquareNorm)
            and sequence.shape[-1:] == self.norm.weight.shape
            and is_plain_tensor(sequence)
            and not self.drops_channels
            and active_ranks() is None
            and not operators_are_watched()
        )


class ResidualStack(nn.Module):
    """A sequence of residual blocks and a final norm.

    The output projections are scaled down by the square root of the number of residual branches (as in GPT-2 and the
    Mamba paper), so that their sum initially has the scale of one. Mixers given as instances are used unchanged.

        stack = ResidualStack(64, ["selective", {"name": "s4d", "state_size": 32}, SelectiveMixer(64, kernel_width=3)])

    Args:
        model_width: channels of the sequence.
        mixers: one per layer: an instance, a class, a name, or a mapping of a name and options (`build_mixer`). A
            hybrid is a list of different ones.
        norm_epsilon: keeps positions of zeros finite.
        feed_forward_width: hidden channels of a gated feed-forward layer after every mixer; None for no such layers.
        dropout: dropout probability of the channels of each residual branch.
        activation_checkpointing: keep only the sequence between blocks for the backward pass and recompute each block
            there: less memory for one more forward pass.

    Raises:
        InputError: if a mixer or option is unknown, `mixers` is not a list, or a width or dropout is out of range.
    """

    def __init__(
        self,
        model_width: int,
        mixers: Sequence[MixerDescription],
        norm_epsilon: float = 1e-5,
        *,
        feed_forward_width: int | None = None,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(mixers, str | Mapping | nn.Module) or not isinstance(mixers, Sequence):
            raise InputError(
                f"mixers must be a list with one mixer per layer but is {_shown(mixers)}; "
                'write ["selective"] * 4 for four layers'
            )
        self.activation_checkpointing = activation_checkpointing
        blocks = [
            ResidualBlock(model_width, build_mixer(model_width, chosen), norm_epsilon, feed_forward_width, dropout)
            for chosen in mixers
        ]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RootMeanSquareNorm(model_width, norm_epsilon)
        branches = len(blocks) * (1 if feed_forward_width is None else 2)
        with torch.no_grad():
            for block, chosen in zip(blocks, mixers, strict=True):
                if not isinstance(chosen, Mixer):
                    block.mixer.output_projection.weight /= branches**0.5
                if block.feed_forward is not None:
                    block.feed_forward.output_projection.weight /= branches**0.5

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics of all mixers."""
        return parameters_without_decay(self)

    def forward(
        self, sequence: Tensor, state: StackState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, StackState]:
        """Map (batch, length, model_width) and one incoming state per block to the same shape and the outgoing states.

        `sequence_starts` (batch, length), boolean, is True where a new record begins: nothing crosses from one record
        to the next.

        Raises:
            InputError: if the sequence has another shape, or the state does not have one member per block.
        """
        width = self.final_norm.weight.shape[0]
        if sequence.dim() != 3 or sequence.shape[-1] != width:
            raise InputError(
                f"the sequence must be (batch, length, model_width={width}) but has shape {tuple(sequence.shape)}"
            )
        if state is not None and len(state) != len(self.blocks):
            raise InputError(
                f"the state is of {len(state)} blocks but the stack has {len(self.blocks)}; "
                "pass the state that this stack returned"
            )
        if not self._walks_in_pieces(sequence):
            return self._walk(sequence, state, sequence_starts)
        outputs: Tensor | None = None
        batch, length, begin = sequence.shape[0], sequence.shape[1], 0
        while begin < length:
            positions = max(SHORTEST_PIECE, positions_at_once(sequence.device, self._piece_positions) // batch)
            piece = slice(begin, begin + positions)
            starts = None if sequence_starts is None else sequence_starts[:, piece]
            try:
                found = self._walk(sequence[:, piece], state, starts)
            except torch.OutOfMemoryError:
                found = None
            if found is None:  # outside of the handler, which holds on to the memory of what failed
                halve_positions(sequence.device, at_least=batch * SHORTEST_PIECE)
                continue
            if positions >= length:
                return found
            outputs = torch.empty_like(sequence) if outputs is None else outputs
            outputs[:, piece], state = found
            begin += positions
        assert outputs is not None and state is not None  # the sequence is longer than one piece
        return outputs, state

    def _walks_in_pieces(self, sequence: Tensor) -> bool:
        """Return whether a sequence is long enough that processing it in pieces is faster, or may be necessary."""
        # A compiled or exported graph has to hold for any length. Ranks exchange states once per layer, whatever the
        # length of their parts, so these are not cut either.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or active_ranks() is not None:
            return False
        batch, length = sequence.shape[:2]
        shortest = SHORTEST_PIECE
        if sequence.device.type == "cpu":
            shortest = (FEWEST_PIECES - 1) * max(SHORTEST_PIECE, self._piece_positions // max(batch, 1))
        return length > shortest and not calls_are_watched(self)  # a hook that keeps outputs would keep the last piece

    @property
    def _piece_positions(self) -> int:
        """Positions of a piece, over the batch, on a CPU."""
        calls = all(vars(type(block.mixer)).get("steps_many", False) for block in self.blocks)
        return PIECE_POSITIONS_OF_CALLS if calls else PIECE_POSITIONS

    def _walk(
        self, sequence: Tensor, state: StackState | None, sequence_starts: Tensor | None
    ) -> tuple[Tensor, StackState]:
        incoming = state if state is not None else (None,) * len(self.blocks)
        outgoing = []
        recomputed = self.activation_checkpointing and torch.is_grad_enabled()
        if not recomputed and sequence.shape[1] > 1 and self._sums_in_norms(sequence):
            branch = None
            for block, block_state in zip(self.blocks, incoming, strict=True):
                sequence, branch, new_state = cast(ResidualBlock, block).without_last_sum(
                    sequence, branch, block_state, sequence_starts
                )
                outgoing.append(new_state)
            return norm_and_sum(self.final_norm, sequence, branch)[0], tuple(outgoing)
        for block, block_state in zip(self.blocks, incoming, strict=True):
            if recomputed:
                sequence, new_state = checkpoint(block, sequence, block_state, sequence_starts, use_reentrant=False)
            else:
                sequence, new_state = block(sequence, block_state, sequence_starts)
            outgoing.append(new_state)
        return self.final_norm(sequence), tuple(outgoing)

    def _sums_in_norms(self, sequence: Tensor) -> bool:
        """Return whether the blocks' last sums may be left to the norms after them, bypassing the blocks' `forward`."""
        return adds_in_kernel(sequence) and all(is_plain(block, ResidualBlock) for block in self.blocks)


def _shown(mixers: object) -> str:
    return f"an instance of {type(mixers).__name__}" if isinstance(mixers, nn.Module) else repr(mixers)
