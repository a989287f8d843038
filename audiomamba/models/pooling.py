"""Pooling between the scales of a waveform model, causal by construction (SaShiMi, arXiv 2202.09729, section 4.1).

Going down, each group of `factor` neighbouring positions becomes one coarse position once its last member is there.
Going up, a coarse position becomes a group again, one group later: what group g knows is added to group g + 1, since
its first position would otherwise know its last one. The groups are counted from the start of the sequence, so a piece
may begin and end anywhere: what has arrived of a group waits in the state.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class DownPoolingState(NamedTuple):
    """The members of the group in progress."""

    partial: Tensor  # (batch, members, fine_width), with fewer members than a group has


class UpPoolingState(NamedTuple):
    """What the group in progress receives from the one before it."""

    current: Tensor  # (batch, factor, fine_width)
    phase: int  # positions of the group that have been given out


class DownPooling(nn.Module):
    """Fold groups of positions into channels, and mix these by a linear layer.

    Args:
        fine_width: channels that come.
        coarse_width: channels that go.
        factor: positions in a group.
    """

    def __init__(self, fine_width: int, coarse_width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(factor * fine_width, coarse_width)

    def forward(self, sequence: Tensor, state: DownPoolingState | None = None) -> tuple[Tensor, DownPoolingState]:
        """(batch, length, fine_width) to (batch, groups completed, coarse_width), and the state."""
        if state is not None:
            sequence = torch.cat([state.partial, sequence], dim=1)
        groups = sequence.shape[1] // self.factor
        complete, partial = sequence.split([groups * self.factor, sequence.shape[1] - groups * self.factor], dim=1)
        folded = complete.unflatten(1, (groups, self.factor)).flatten(2)
        return self.linear(folded), DownPoolingState(partial)


class UpPooling(nn.Module):
    """Unfold the channels of coarse positions into groups, each given out one group later.

    Args:
        coarse_width: channels that come.
        fine_width: channels that go.
        factor: positions in a group.
    """

    def __init__(self, coarse_width: int, fine_width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(coarse_width, factor * fine_width)

    def forward(
        self, coarse: Tensor, length: int, state: UpPoolingState | None = None
    ) -> tuple[Tensor, UpPoolingState]:
        """Spread the coarse positions that a piece of `length` fine positions has completed.

        Args:
            coarse: (batch, groups completed in the piece, coarse_width).
            length: fine positions of the piece.
            state: what the pieces before this one left; None at the start.

        Returns:
            (batch, length, fine_width), zero in the first group of all, and the state.

        Raises:
            ValueError: another number of coarse positions than the piece completes.
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
