"""Residual blocks and the stack of them, each a function ``(sequence, state) -> (sequence, state)``."""

import torch
from torch import Tensor, nn

from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.selective import SelectiveMixer, SelectiveState

# Without gradients a long sequence is walked in pieces of this many positions (over the batch), whose buffers stay in
# the cache and are used again: about twice as fast on a CPU as one sweep over freshly mapped memory.
PIECE_POSITIONS = 4096


class ResidualBlock(nn.Module):
    """sequence + mixer(norm(sequence)), normalised by root mean square."""

    def __init__(self, model_width: int, mixer: SelectiveMixer, norm_epsilon: float = 1e-5) -> None:
        super().__init__()
        self.norm = RootMeanSquareNorm(model_width, norm_epsilon)
        self.mixer = mixer

    def forward(self, sequence: Tensor, state: SelectiveState | None = None) -> tuple[Tensor, SelectiveState]:
        """(batch, length, model_width) and the incoming state to the same shape and the outgoing state."""
        mixed, state = self.mixer(self.norm(sequence), state)
        return sequence + mixed, state


class ResidualStack(nn.Module):
    """Residual selective blocks one after the other and a final norm.

    The output projections are scaled down by the square root of the number of layers (GPT-2's rule, which the Mamba
    paper follows), so that the sum of all residual branches starts at the size of one.
    """

    def __init__(
        self,
        model_width: int,
        layers: int,
        state_size: int = 16,
        kernel_width: int = 4,
        expansion: int = 2,
        step_rank: int | None = None,
        norm_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        blocks = [
            ResidualBlock(
                model_width, SelectiveMixer(model_width, state_size, kernel_width, expansion, step_rank), norm_epsilon
            )
            for _ in range(layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RootMeanSquareNorm(model_width, norm_epsilon)
        with torch.no_grad():
            for block in blocks:
                block.mixer.output_projection.weight /= layers**0.5

    def forward(
        self, sequence: Tensor, state: tuple[SelectiveState, ...] | None = None
    ) -> tuple[Tensor, tuple[SelectiveState, ...]]:
        """(batch, length, model_width) and one incoming state per block to the same shape and the outgoing states."""
        positions = max(1, PIECE_POSITIONS // max(1, sequence.shape[0]))
        if torch.is_grad_enabled() or sequence.shape[1] <= positions:
            return self._walk(sequence, state)
        outputs = torch.empty_like(sequence)
        for begin in range(0, sequence.shape[1], positions):
            piece = slice(begin, begin + positions)
            outputs[:, piece], state = self._walk(sequence[:, piece], state)
        assert state is not None  # the sequence is longer than one piece
        return outputs, state

    def _walk(
        self, sequence: Tensor, state: tuple[SelectiveState, ...] | None
    ) -> tuple[Tensor, tuple[SelectiveState, ...]]:
        incoming = state if state is not None else (None,) * len(self.blocks)
        outgoing = []
        for block, block_state in zip(self.blocks, incoming, strict=True):
            sequence, new_state = block(sequence, block_state)
            outgoing.append(new_state)
        return self.final_norm(sequence), tuple(outgoing)
