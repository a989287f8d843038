"""The stages of a waveform model: residual blocks at one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.layers import ResidualBlock, RootMeanSquareNorm, build_mixer


class FeedForwardState(NamedTuple):
    """Nothing: positions do not see each other."""


class FeedForwardBlock(nn.Module):
    """sequence + linear(GELU(linear(norm(sequence)))), the second kind of block of SaShiMi (section 4.2).

    Args:
        model_width: channels of the sequence.
        expansion: hidden channels per channel.
    """

    def __init__(self, model_width: int, expansion: int) -> None:
        super().__init__()
        self.norm = RootMeanSquareNorm(model_width)
        self.input_projection = nn.Linear(model_width, expansion * model_width)
        self.output_projection = nn.Linear(expansion * model_width, model_width)

    def forward(self, sequence: Tensor, state: FeedForwardState | None = None) -> tuple[Tensor, FeedForwardState]:
        """(batch, length, model_width) to the same shape, and an empty state."""
        hidden = F.gelu(self.input_projection(self.norm(sequence)))
        return sequence + self.output_projection(hidden), FeedForwardState()


def stage_blocks(
    model_width: int, mixers: Sequence[str | Mapping[str, Any]], feed_forward_expansion: int
) -> nn.ModuleList:
    """The residual blocks of a stage: a mixer per layer, each followed by a feed-forward block if these are wanted.

    Args:
        model_width: channels at this scale.
        mixers: one per layer (`mambacore.layers.build_mixer`).
        feed_forward_expansion: hidden channels per channel of the feed-forward blocks; 0 for none.

    Raises:
        InputError: an unknown mixer or option.
    """
    blocks: list[nn.Module] = []
    for description in mixers:
        blocks.append(ResidualBlock(model_width, build_mixer(model_width, description)))
        if feed_forward_expansion:
            blocks.append(FeedForwardBlock(model_width, feed_forward_expansion))
    return nn.ModuleList(blocks)
