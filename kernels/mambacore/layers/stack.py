"""Residual blocks and the stack of them, each a function ``(sequence, state) -> (sequence, state)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambacore.layers.mixer import Mixer, build_mixer
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.step import step_block, step_library, step_on_device, steps_on_device
from mambacore.parallel import active_ranks

# One state per block, each whatever its mixer hands on.
StackState = tuple[Any, ...]

# Without gradients a long sequence is walked in pieces of this many positions (over the batch), whose buffers stay in
# the cache and are used again: about twice as fast on a CPU as one sweep over freshly mapped memory.
PIECE_POSITIONS = 4096


class ResidualBlock(nn.Module):
    """sequence + mixer(norm(sequence)), normalised by root mean square."""

    def __init__(self, model_width: int, mixer: Mixer, norm_epsilon: float = 1e-5) -> None:
        super().__init__()
        self.norm = RootMeanSquareNorm(model_width, norm_epsilon)
        self.mixer = mixer

    def forward(self, sequence: Tensor, state: Any = None, sequence_starts: Tensor | None = None) -> tuple[Tensor, Any]:
        """(batch, length, model_width) and the incoming state to the same shape and the outgoing state."""
        alone = sequence_starts is None and active_ranks() is None
        library = step_library(self, sequence) if alone else None
        if library is not None:
            return step_block(library, self, sequence, state)
        if alone and steps_on_device(self, sequence):
            return step_on_device(self, sequence, state)
        mixed, state = self.mixer(self.norm(sequence), state, sequence_starts)
        return sequence + mixed, state


class ResidualStack(nn.Module):
    """Residual blocks one after the other and a final norm.

    The output projections are scaled down by the square root of the number of layers (GPT-2's rule, which the Mamba
    paper follows), so that the sum of all residual branches starts at the size of one.

    Args:
        model_width: channels of the sequence.
        mixers: one per layer: its name, or a mapping of its name and options (``build_mixer``). A hybrid is a list of
            different ones.
        norm_epsilon: keeps positions of zeros finite.

    Raises:
        InputError: an unknown mixer or option.
    """

    def __init__(self, model_width: int, mixers: Sequence[str | Mapping[str, Any]], norm_epsilon: float = 1e-5) -> None:
        super().__init__()
        blocks = [
            ResidualBlock(model_width, build_mixer(model_width, description), norm_epsilon) for description in mixers
        ]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RootMeanSquareNorm(model_width, norm_epsilon)
        with torch.no_grad():
            for block in blocks:
                block.mixer.output_projection.weight /= len(blocks) ** 0.5

    def forward(
        self, sequence: Tensor, state: StackState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, StackState]:
        """(batch, length, model_width) and one incoming state per block to the same shape and the outgoing states.

        ``sequence_starts`` (batch, length), boolean, is True where a new record begins: nothing crosses from one record
        to the next.
        """
        positions = max(1, PIECE_POSITIONS // max(1, sequence.shape[0]))
        # Ranks exchange states once per layer, however long their stretches are, so these are not cut into pieces.
        if torch.is_grad_enabled() or sequence.shape[1] <= positions or active_ranks() is not None:
            return self._walk(sequence, state, sequence_starts)
        outputs = torch.empty_like(sequence)
        for begin in range(0, sequence.shape[1], positions):
            piece = slice(begin, begin + positions)
            starts = None if sequence_starts is None else sequence_starts[:, piece]
            outputs[:, piece], state = self._walk(sequence[:, piece], state, starts)
        assert state is not None  # the sequence is longer than one piece
        return outputs, state

    def _walk(
        self, sequence: Tensor, state: StackState | None, sequence_starts: Tensor | None
    ) -> tuple[Tensor, StackState]:
        incoming = state if state is not None else (None,) * len(self.blocks)
        outgoing = []
        for block, block_state in zip(self.blocks, incoming, strict=True):
            sequence, new_state = block(sequence, block_state, sequence_starts)
            outgoing.append(new_state)
        return self.final_norm(sequence), tuple(outgoing)
