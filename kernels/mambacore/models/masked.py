"""The bidirectional masked language model: Caduceus (Schiff et al., arXiv 2403.03234).

Two kinds: *equivariant* (Caduceus-PS), whose logits of a reverse complement are the reverse complement of its logits,
exactly and by construction; and the plain one (Caduceus-Ph), trained on both strands, whose logits of both strands are
averaged afterwards (`conjoined_logits`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.errors import InputError
from mambacore.layers.bidirectional import BidirectionalStack
from mambacore.layers.equivariant import (
    EquivariantEmbedding,
    EquivariantStack,
    complement_tokens,
    equivariant_logits,
    restore_complement,
    starts_of_reversed,
)
from mambacore.layers.mixer import parameters_without_decay
from mambacore.models.causal import EMBEDDING_DEVIATION, padded_size


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModelConfig:
    """Configuration of a `MaskedLanguageModel`.

    Attributes:
        vocabulary_size: number of tokens.
        model_width: channels between the layers, of one strand.
        layers: number of blocks.
        complement: the complement of every token; padding tokens are their own complements. Without it there is no
            reverse complement.
        equivariant: share parameters between the strands (Caduceus-PS).
        mixer: a name and options, see `mambacore.layers.BidirectionalMixer`.
        combination, tied_projections: see `mambacore.layers.BidirectionalMixer`.
        exchange_strands: see `mambacore.layers.EquivariantStack`; for equivariant models only.
        norm_epsilon, residual_in_float32, tied_head, vocabulary_multiple: see `CausalLanguageModelConfig`.
    """

    vocabulary_size: int
    model_width: int
    layers: int
    complement: tuple[int, ...] | None = None
    equivariant: bool = False
    mixer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    combination: str = "add"
    tied_projections: bool = True
    exchange_strands: bool = False
    norm_epsilon: float = 1e-5
    residual_in_float32: bool = False
    tied_head: bool = True
    vocabulary_multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "model_width", "layers", "vocabulary_multiple"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1 but is {getattr(self, name)}")
        if self.equivariant and self.complement is None:
            raise InputError("an equivariant model needs complement, the partner of each token on the other strand")
        if self.exchange_strands and not self.equivariant:
            raise InputError("exchange_strands is for equivariant models, others have one strand; leave it out")

    @property
    def padded_vocabulary_size(self) -> int:
        """Number of rows of the tables."""
        return padded_size(self.vocabulary_size, self.vocabulary_multiple)


class MaskedLanguageModel(nn.Module):
    """Predicts the token at every position from everything before and after it.

    It is not causal, so it has no state: give it whole sequences.

    Args:
        config: see `MaskedLanguageModelConfig`.

    Raises:
        InputError: if the mixer does not have an option, or the complement is not its own inverse.
    """

    complement: Tensor | None

    def __init__(self, config: MaskedLanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        rows, width = config.padded_vocabulary_size, config.model_width
        options: dict[str, Any] = {
            "mixer": config.mixer,
            "combination": config.combination,
            "tied_projections": config.tied_projections,
            "norm_epsilon": config.norm_epsilon,
            "residual_in_float32": config.residual_in_float32,
        }
        self.embedding: nn.Embedding | EquivariantEmbedding
        self.head: nn.Linear | None = None if config.tied_head else nn.Linear(width, rows, bias=False)
        if config.equivariant:
            assert config.complement is not None  # checked by the configuration
            self.embedding = EquivariantEmbedding(rows, width, config.complement)
            self.stack: BidirectionalStack = EquivariantStack(
                width, config.layers, **options, exchange_strands=config.exchange_strands
            )
        else:
            self.embedding = nn.Embedding(rows, width)
            self.stack = BidirectionalStack(width, config.layers, **options)
        for table in (self.embedding, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=EMBEDDING_DEVIATION)
        self._complement_tokens = None if config.complement is None else complement_tokens(config.complement, rows)
        complement = None if self._complement_tokens is None else torch.tensor(self._complement_tokens)
        self.register_buffer("complement", complement, persistent=False)

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics of all mixers."""
        return parameters_without_decay(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert everything and rewrite the complement, since `to_empty` leaves memory uninitialised."""
        super()._apply(fn, recurse)
        restore_complement(self.complement, self._complement_tokens)
        return self

    def forward(self, tokens: Tensor, sequence_starts: Tensor | None = None) -> Tensor:
        """Compute logits (batch, length, padded_vocabulary_size) for tokens (batch, length).

        `sequence_starts` (batch, length), boolean, is True where a new record begins (`mambacore.packing`); padding
        is a record of its own. Nothing crosses from one record to another, in either direction.
        """
        return self.logits(self.hidden(tokens, sequence_starts))

    def hidden(self, tokens: Tensor, sequence_starts: Tensor | None = None) -> Tensor:
        """Compute the input of the head: (batch, length, model_width), or twice the width if equivariant."""
        return self.stack(self.embedding(tokens), sequence_starts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head to the output of `hidden`, to (..., padded_vocabulary_size).

        In the precision of its weights even under autocast: DNA models differ in the third digit of a logit.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            if self.config.equivariant:
                assert self.complement is not None
                weight = self.embedding.weight if self.head is None else self.head.weight
                return equivariant_logits(hidden.to(weight.dtype), weight, self.complement)
            if self.head is not None:
                return self.head(hidden.to(next(self.head.parameters(), hidden).dtype))
            return F.linear(hidden.to(self.embedding.weight.dtype), self.embedding.weight)

    def reverse_complement(self, tokens: Tensor) -> Tensor:
        """Return the reverse complement of (batch, length) tokens.

        Raises:
            InputError: if the model has no complement.
        """
        return self._complement()[tokens.flip(1)]

    def conjoined_logits(self, tokens: Tensor, sequence_starts: Tensor | None = None) -> Tensor:
        """Return the mean of the logits of both strands, (batch, length, padded_vocabulary_size).

        Those of the reverse complement are mapped back to the given strand. This makes any model equivariant ("post-hoc
        conjoining"); for an equivariant one it changes nothing.

        Raises:
            InputError: if the model has no complement.
        """
        starts = None if sequence_starts is None else starts_of_reversed(sequence_starts)
        other = self(self.reverse_complement(tokens), starts)
        return (self(tokens, sequence_starts) + other.flip(1)[..., self._complement()]) / 2

    def _complement(self) -> Tensor:
        if self.complement is None:
            raise InputError("this model has no complement, so there is no other strand; build it with complement")
        return self.complement
