"""The causal language model: what comes next, given everything before (Gu & Dao, arXiv 2312.00752, section 3.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.errors import InputError
from mambacore.layers import ResidualStack, RootMeanSquareNorm
from mambacore.layers.bidirectional import widened
from mambacore.layers.stack import StackState
from mambacore.models.sampling import check_sampling, sample_tokens

# Standard deviation of embeddings at the start of training (GPT-2's, which the Mamba paper follows).
EMBEDDING_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class CausalLanguageModelConfig:
    """Everything needed to build a :class:`CausalLanguageModel`.

    Attributes:
        vocabulary_size: number of tokens.
        model_width: channels between the layers.
        mixers: one per layer, its name or a mapping of its name and options (``mambacore.layers.build_mixer``).
        norm_epsilon: keeps positions of zeros finite in the norms.
        residual_in_float32: keep the sum of residuals in float32 where the parameters have fewer bits.
        tied_head: logits are read with the embedding's matrix.
        vocabulary_multiple: the tables are padded to a multiple of this many tokens, which no text has.
    """

    vocabulary_size: int
    model_width: int
    mixers: tuple[str | Mapping[str, Any], ...]
    norm_epsilon: float = 1e-5
    residual_in_float32: bool = False
    tied_head: bool = True
    vocabulary_multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "model_width", "vocabulary_multiple"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1 but is {getattr(self, name)}")
        if not self.mixers:
            raise InputError("a language model needs at least one layer; give one mixer per layer")

    @property
    def padded_vocabulary_size(self) -> int:
        """Rows of the tables."""
        return padded_size(self.vocabulary_size, self.vocabulary_multiple)


class CausalLanguageModel(nn.Module):
    """Embedding, residual stack, final norm and a head that gives the logits of the next token.

    Args:
        config: see :class:`CausalLanguageModelConfig`.

    Raises:
        InputError: an unknown mixer or option.
    """

    def __init__(self, config: CausalLanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.padded_vocabulary_size
        self.embedding = nn.Embedding(rows, config.model_width)
        self.stack = ResidualStack(config.model_width, config.mixers, config.norm_epsilon)
        self.head = None if config.tied_head else nn.Linear(config.model_width, rows, bias=False)
        for table in (self.embedding, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=EMBEDDING_DEVIATION)
        if config.residual_in_float32:
            for block in self.stack.blocks:
                block.norm = _NarrowingNorm(config.model_width, config.norm_epsilon)

    def forward(
        self, tokens: Tensor, state: StackState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, StackState]:
        """Logits of what follows each position.

        Args:
            tokens: (batch, length), whole numbers below ``vocabulary_size``.
            state: what the piece before this one left; None at the start.
            sequence_starts: (batch, length), boolean, True where a new record begins (``mambacore.packing``).

        Returns:
            Logits (batch, length, padded_vocabulary_size) and the state for what follows.
        """
        hidden, state = self.hidden(tokens, state, sequence_starts)
        return self.logits(hidden), state

    def hidden(
        self, tokens: Tensor, state: StackState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, StackState]:
        """What the head reads, (batch, length, model_width), and the state for what follows."""
        embedded = self.embedding(tokens)
        if self.config.residual_in_float32:
            embedded = widened(embedded)
        return self.stack(embedded, state, sequence_starts)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: (..., model_width) to (..., padded_vocabulary_size)."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(hidden.to(weight.dtype), weight)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        count: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt: read it once, then go on token by token with the state.

        Args:
            prompt: (batch, length), at least one token.
            count: how many tokens to add.
            temperature, top_p, generator: see ``mambacore.models.sample_tokens``; temperature 0 is greedy.

        Returns:
            The new tokens, (batch, count). None is one of the padding tokens.

        Raises:
            InputError: an empty prompt, a negative count, or settings of the sampling that mean nothing.
        """
        check_sampling(temperature, top_p)
        if prompt.dim() != 2 or prompt.shape[1] < 1:
            raise InputError(
                f"prompt must be (batch, length) with at least one token but has shape {tuple(prompt.shape)}"
            )
        if count < 0:
            raise InputError(f"count must not be negative but is {count}")
        tokens = prompt.new_empty(prompt.shape[0], count)
        piece, state = prompt, None
        for position in range(count):
            hidden, state = self.hidden(piece, state)
            logits = self.logits(hidden[:, -1])[:, : self.config.vocabulary_size]
            tokens[:, position] = sample_tokens(logits, temperature, top_p, generator)
            piece = tokens[:, position : position + 1]
        return tokens


def padded_size(vocabulary_size: int, multiple: int) -> int:
    """The smallest multiple that is not below the size."""
    return -(-vocabulary_size // multiple) * multiple


class _NarrowingNorm(RootMeanSquareNorm):
    """A norm whose result has its weight's dtype: what the mixer computes in, beside residuals in float32."""

    def forward(self, sequence: Tensor) -> Tensor:
        return super().forward(sequence).to(self.weight.dtype)
