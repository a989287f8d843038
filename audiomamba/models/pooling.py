"""Pooling between the scales of a waveform model, causal by construction (SaShiMi, arXiv 2202.09729, section 4.1).

Downsampling turns each group of `factor` neighbouring positions into one coarse position once its last member has
arrived. Upsampling turns a coarse position into a group again, shifted by one group: the output of group g is added to
group g + 1, since its first position would otherwise see its last. Groups are counted from the start of the sequence,
so a piece may begin and end anywhere: an incomplete group is kept in the state.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class DownPoolingState(NamedTuple):
    """The members of the incomplete group."""

    partial: Tensor  # (batch, members, fine_width), with fewer members than a group has


class UpPoolingState(NamedTuple):
    """The upsampled group that is being emitted."""

    current: Tensor  # (batch, factor, fine_width)
    phase: int  # positions of the group that have been emitted


class DownPooling(nn.Module):
    """Folds groups of positions into channels, which a linear layer mixes.

    Args:
        fine_width: input channels.
        coarse_width: output channels.
        factor: positions in a group.
    """

    def __init__(self, fine_width: int, coarse_width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(factor * fine_width, coarse_width)

    def forward(self, sequence: Tensor, state: DownPoolingState | None = None) -> tuple[Tensor, DownPoolingState]:
        """Map (batch, length, fine_width) to (batch, groups completed, coarse_width), and return the state."""
        if state is not None:
            sequence = torch.cat([state.partial, sequence], dim=1)
        groups = sequence.shape[1] // self.factor
        complete, partial = sequence.split([groups * self.factor, sequence.shape[1] - groups * self.factor], dim=1)
        folded = complete.unflatten(1, (groups, self.factor)).flatten(2)
        return self.linear(folded), DownPoolingState(partial)


class UpPooling(nn.Module):
    """Unfolds the channels of coarse positions into groups, each emitted one group later.

    Args:
        coarse_width: input channels.
        fine_width: output channels.
        factor: positions in a group.
    """

    def __init__(self, coarse_width: int, fine_width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(coarse_width, factor * fine_width)

    def forward(
        self, coarse: Tensor, length: int, state: UpPoolingState | None = None
    ) -> tuple[Tensor, UpPoolingState]:
        """Expand the coarse positions completed in a piece of `length` fine positions.

        Args:
            coarse: (batch, groups completed in the piece, coarse_width).
            length: fine positions of the piece.
            state: the state after the previous piece; None at the start.

        Returns:
            (batch, length, fine_width), zero in the very first group, and the state.

        Raises:
            ValueError: if the number of coarse positions is not that completed in the piece.
        """
        batch, groups, _ = coarse.shape
        phase = 0 if state is None else state.phase
        completed, next_phase = divmod(phase + length, self.factor)
        if groups != completed:
            raise ValueError(f"{length} positions from {phase} complete {completed} groups but {groups} were given")
        unfolded = self.linear(coarse).unflatten(2, (self.factor, -1))
        current = unfolded.new_zeros(batch, self.factor, unfolded.shape[-1]) if state is None else state.current
        known = torch.cat([current.unsqueeze(1), unfolded], dim=1)
        fine = known.flatten(1, 2)[:, phase : phase + length]
        return fine, UpPoolingState(known[:, -1], next_phase)
