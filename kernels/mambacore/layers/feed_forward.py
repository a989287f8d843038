"""The gated feed-forward layer of a residual block."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.errors import InputError


class GatedFeedForward(nn.Module):
    """SwiGLU layer: `output_projection(silu(gate) * values)` (Shazeer, arXiv 2002.05202, equation 6). It has no state.

    Args:
        model_width: channels of the sequence.
        width: hidden channels.

    Raises:
        InputError: if the width is below 1.
    """

    def __init__(self, model_width: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"feed_forward_width must be at least 1 but is {width}")
        # The values and their gate.
        self.input_projection = nn.Linear(model_width, 2 * width, bias=False)
        self.output_projection = nn.Linear(width, model_width, bias=False)

    def forward(self, sequence: Tensor) -> Tensor:
        """Map (batch, length, model_width) to the same shape."""
        values, gate = torch.chunk(self.input_projection(sequence), 2, dim=-1)
        return self.output_projection(values * F.silu(gate))
