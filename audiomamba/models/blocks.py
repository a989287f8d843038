"""The stages of a waveform model: residual blocks at one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.layers import ResidualBlock, RootMeanSquareNorm, build_mixer


class FeedForwardState(NamedTuple):
    """Empty: positions are processed independently."""


class FeedForwardBlock(nn.Module):
    """Residual block sequence + linear(GELU(linear(norm(sequence)))), SaShiMi's second kind (section 4.2).

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
        """Map (batch, length, model_width) to the same shape, with an empty state."""
        hidden = F.gelu(self.input_projection(self.norm(sequence)))
        return sequence + self.output_projection(hidden), FeedForwardState()


def stage_blocks(
    model_width: int, mixers: Sequence[str | Mapping[str, Any]], feed_forward_expansion: int
) -> nn.ModuleList:
    """Build the residual blocks of a stage: one mixer per layer, each optionally followed by a feed-forward block.

    Args:
        model_width: channels at this scale.
        mixers: one per layer (`mambacore.layers.build_mixer`).
        feed_forward_expansion: hidden channels per channel in the feed-forward blocks; 0 for no such blocks.

    Raises:
        InputError: if a mixer or option is unknown.
    """
    blocks: list[nn.Module] = []
    for description in mixers:
        blocks.append(ResidualBlock(model_width, build_mixer(model_width, description)))
        if feed_forward_expansion:
            blocks.append(FeedForwardBlock(model_width, feed_forward_expansion))
    return nn.ModuleList(blocks)
