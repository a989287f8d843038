"""Layers that commute with the reverse complement, by sharing their parameters between the strands.

Schiff et al., "Caduceus" (arXiv 2403.03234, "MambaDNA" and "Caduceus-PS"), after Zhou et al. (PMLR 165:1-33, 2022).
A sequence of two strands has 2 D channels: D of the given strand and D of the other one, the latter with its channels
in reverse order, so that the reverse complement RC flips both positions and channels. With a block M,
x1 and x2 the halves and [,] their concatenation:

    embedding(t) = [E(t), flip_channels(E(complement(t)))]
    block(x)     = [M(x1), RC(M(RC(x2)))]
    logits(x)    = W x1 + W[complement] flip_channels(x2)

Then layer(RC(x)) = RC(layer(x)). The second strand is not flipped in memory: kernels scan in the other direction and
channels are flipped in the weights. The complement of each token is an argument; for DNA it swaps A with T and C with
G. These layers are not causal and so have no state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.errors import InputError
from mambacore.layers.bidirectional import BidirectionalStack, normalise, widened


def reverse_complement(sequence: Tensor) -> Tensor:
    """Return the reverse complement of a sequence of two strands, (batch, length, 2 * model_width)."""
    return sequence.flip(1, 2)


def complement_tokens(complement: Sequence[int], vocabulary_size: int) -> list[int]:
    """Return the complement of every token; tokens beyond `complement` are their own complements.

    Raises:
        InputError: if the table is too long, or is not its own inverse.
    """
    if len(complement) > vocabulary_size:
        raise InputError(
            f"complement has {len(complement)} tokens but the vocabulary has {vocabulary_size}; give one per token"
        )
    table = [*complement, *range(len(complement), vocabulary_size)]
    for token, other in enumerate(table):
        if not 0 <= other < vocabulary_size or table[other] != token:
            raise InputError(
                f"complement maps token {token} to {other}, which is not mapped back to {token}; "
                "give a table that is its own inverse"
            )
    return table


def complement_table(complement: Sequence[int], vocabulary_size: int) -> Tensor:
    """Return `complement_tokens` as a tensor (vocabulary_size,)."""
    return torch.tensor(complement_tokens(complement, vocabulary_size), dtype=torch.long)


def restore_complement(buffer: Tensor | None, tokens: Sequence[int] | None) -> None:
    """Write a complement into its buffer, whatever the buffer's device."""
    if buffer is not None and tokens is not None and buffer.device.type != "meta":
        buffer.copy_(torch.tensor(tokens, dtype=torch.long))


def starts_of_reversed(sequence_starts: Tensor) -> Tensor:
    """Return where records begin, (batch, length), once all rows are reversed, which is where they ended."""
    ends = torch.ones_like(sequence_starts)
    ends[:, :-1] = sequence_starts[:, 1:]
    return ends.flip(1)


class EquivariantEmbedding(nn.Module):
    """The embeddings of a token and of its complement, the latter with flipped channels.

    Args:
        vocabulary_size: number of tokens.
        model_width: channels of one strand.
        complement: complement of every token (`complement_table`).
    """

    complement: Tensor

    def __init__(self, vocabulary_size: int, model_width: int, complement: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary_size, model_width))
        self._complement_tokens = complement_tokens(complement, vocabulary_size)
        self.register_buffer("complement", torch.tensor(self._complement_tokens), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert everything and rewrite the complement, since `to_empty` leaves memory uninitialised."""
        super()._apply(fn, recurse)
        restore_complement(self.complement, self._complement_tokens)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length) to (batch, length, 2 * model_width)."""
        return F.embedding(tokens, torch.cat([self.weight, self.weight[self.complement].flip(1)], dim=1))


def equivariant_logits(sequence: Tensor, weight: Tensor, complement: Tensor) -> Tensor:
    """Compute W x1 + W[complement] flip_channels(x2) as one product with both matrices concatenated.

    Args:
        sequence: (batch, length, 2 * model_width).
        weight: (vocabulary_size, model_width).
        complement: (vocabulary_size,).
    """
    return F.linear(sequence, torch.cat([weight, weight[complement].flip(1)], dim=1))


class EquivariantStack(BidirectionalStack):
    """The bidirectional stack over two strands with shared parameters. It has no state.

    Args:
        model_width: channels of one strand.
        layers: number of blocks.
        mixer, combination, tied_projections, norm_epsilon, residual_in_float32: see `BidirectionalStack`.
        exchange_strands: swap the strands before every block. The published Caduceus-PS models do so (and are just as
            equivariant), so their weights only work this way.
    """

    def __init__(
        self,
        model_width: int,
        layers: int,
        mixer: Mapping[str, Any] | None = None,
        combination: str = "add",
        tied_projections: bool = True,
        norm_epsilon: float = 1e-5,
        residual_in_float32: bool = False,
        exchange_strands: bool = False,
    ) -> None:
        super().__init__(model_width, layers, mixer, combination, tied_projections, norm_epsilon, residual_in_float32)
        self.exchange_strands = exchange_strands

    def forward(self, sequence: Tensor, sequence_starts: Tensor | None = None) -> Tensor:
        """Map (batch, length, 2 * model_width) to the same shape.

        `sequence_starts` (batch, length), boolean, is True where a new record begins: nothing crosses from one record
        to another. It refers to positions of the given strand, for both strands.
        """
        if sequence.shape[-1] != 2 * self.model_width:
            raise ValueError(
                f"sequence must have two strands of {self.model_width} channels each but has {sequence.shape[-1]} "
                "channels; use EquivariantEmbedding"
            )
        if self.residual_in_float32:
            sequence = widened(sequence)
        first, second = sequence.chunk(2, dim=-1)
        for block in self.blocks:
            if self.exchange_strands:
                first, second = second, first
            first = block(first, sequence_starts)
            second = block(second, sequence_starts, reverse_complement=True)
        return torch.cat([normalise(self.final_norm, first), normalise(self.final_norm, second, flipped=True)], dim=-1)
