"""The retention of RetNet as a mixer."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.backends import compute_dtype
from mambacore.devices import wide_dtype
from mambacore.layers.attention import even_head_count, rotated
from mambacore.layers.linear_attention import chunkwise_attention
from mambacore.layers.mixer import Mixer, check_state, register_mixer
from mambacore.layers.plain_modules import is_plain
from mambacore.parallel import positions_over_ranks, recurrence_over_ranks

# Head h retains 1 - 2^-(5 + h) of its memory per position (equation 8).
FIRST_DECAY_EXPONENT = 5


class RetentionState(NamedTuple):
    """The state of retention."""

    memory: Tensor  # (batch, heads, key_width, value_width), float32 or float64
    positions: int  # walked so far


@register_mixer
class RetentionMixer(Mixer):
    """Multi-scale retention with a swish gate (Sun et al., arXiv 2307.08621, section 2.2 and equation 8).

    Each head's memory decays at its own constant rate. Queries and keys are rotated by their position (equation 5), and
    every head's output is normalised (group norm), so that the scale of the memory does not matter.

    Args:
        model_width: channels of the sequence.
        heads: number of heads, each of even width. By default at most 8, of at least 8 channels each.
        expansion: value channels per model channel.
        rotary_base: the rotations' wavelengths are between 2 pi and 2 pi times this many positions.
        norm_epsilon: keeps the norm of zeros finite.
        linear_bias: the input and output projections have biases.

    Raises:
        ValueError: if the heads do not divide the width, or their width is odd.
    """

    name = "retention"
    supports_context_parallel = True

    def __init__(
        self,
        model_width: int,
        heads: int | None = None,
        expansion: int = 2,
        rotary_base: float = 10_000.0,
        norm_epsilon: float = 1e-5,
        linear_bias: bool = False,
    ) -> None:
        super().__init__()
        self.model_width = model_width
        self.heads = even_head_count(model_width, heads)
        self.inner_width = expansion * model_width
        self.rotary_base = rotary_base
        self.widths = [model_width, model_width, self.inner_width, self.inner_width]
        self.input_projection = nn.Linear(model_width, sum(self.widths), bias=linear_bias)
        self.norm = nn.GroupNorm(self.heads, self.inner_width, norm_epsilon)
        self.output_projection = nn.Linear(self.inner_width, model_width, bias=linear_bias)

    def _normed(self, read: Tensor) -> Tensor:
        """Apply the group norm to (positions, inner_width), in their dtype."""
        if not is_plain(self.norm, nn.GroupNorm):
            return self.norm(read.to(self.norm.weight.dtype))
        weight, bias = self.norm.weight.to(read.dtype), self.norm.bias.to(read.dtype)
        return F.group_norm(read, self.heads, weight, bias, self.norm.eps)

    @property
    def log_decay(self) -> Tensor:
        """Return the logarithm of the retained share per position, (heads,), float64."""
        device = self.norm.weight.device
        number = torch.arange(self.heads, dtype=wide_dtype(device), device=device)
        return torch.log1p(-(2.0 ** -(FIRST_DECAY_EXPONENT + number)))

    def forward(
        self, sequence: Tensor, state: RetentionState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, RetentionState]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state."""
        *projected, gate = self.input_projection(sequence).split(self.widths, dim=-1)
        queries, keys, values = (tensor.unflatten(-1, (self.heads, -1)) for tensor in projected)
        dtype = compute_dtype(sequence.dtype)
        before, after = positions_over_ranks(sequence, 0 if state is None else state.positions)
        queries, keys = (rotated(vectors.to(dtype), before, self.rotary_base) for vectors in (queries, keys))
        batch, length, heads, width = keys.shape
        keys, values = keys * width**-0.5, values.to(dtype)
        nothing = keys.new_zeros(batch, heads, width, values.shape[-1])
        check_state("state.memory", None if state is None else state.memory, tuple(nothing.shape))

        def run(memory: Tensor | None) -> tuple[Tensor, Tensor]:
            memory = nothing if memory is None else memory
            return chunkwise_attention(queries, keys, values, memory, self.log_decay, sequence_starts)

        read, memory = recurrence_over_ranks(
            run,
            final_state=lambda memory: run(memory)[1],
            total_decay=lambda: torch.exp(length * self.log_decay).to(dtype).view(1, -1, 1, 1).expand(batch, -1, 1, 1),
            initial_state=None if state is None else state.memory,
            sequence_starts=sequence_starts,
        )
        # Group norm treats every position as a separate sample, so nothing is shared along the sequence. Outputs over a
        # long past exceed float16 until they are normalised.
        with torch.autocast(sequence.device.type, enabled=False):
            normed = self._normed(read.flatten(-2).flatten(0, 1)).to(sequence.dtype).view_as(gate)
        return self.output_projection(F.silu(gate) * normed), RetentionState(memory, after)
