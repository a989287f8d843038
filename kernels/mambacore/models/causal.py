"""The causal language model for next-token prediction (Gu & Dao, arXiv 2312.00752, section 3.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.errors import InputError
from mambacore.layers import ContextEmbedding, ResidualBlock, ResidualStack, parameters_without_decay
from mambacore.layers.bidirectional import widened
from mambacore.layers.stack import StackState
from mambacore.models.generation import Generated, generate

# Initial standard deviation of embeddings (as in GPT-2 and the Mamba paper).
EMBEDDING_DEVIATION = 0.02
# Largest number of rows of a context table: 13 letters out of 4, whose float32 logits take 1 GB.
MAXIMUM_CONTEXTS = 4**13


@dataclasses.dataclass(frozen=True)
class CausalLanguageModelConfig:
    """Configuration of a `CausalLanguageModel`.

    Attributes:
        vocabulary_size: number of tokens.
        model_width: channels between the layers.
        mixers: one per layer, its name or a mapping of its name and options (`mambacore.layers.build_mixer`).
        norm_epsilon: keeps positions of zeros finite in the norms.
        residual_in_float32: keep the residual sum in float32 if the parameters have fewer bits.
        tied_head: whether the head shares the embedding's matrix.
        vocabulary_multiple: the tables are padded to a multiple of this many tokens; padding tokens do not occur.
        context_symbols: the first and the number of the consecutive tokens that form contexts.
        context_widths: for each of these widths, an embedding of the last so many symbols is added to that of the token
            (`mambacore.layers.ContextEmbedding`), so that a small model can use short words from the start.
        output_context_widths: for each of these widths, a table gives every context of so many symbols a logit per
            symbol, as an additional input of the head: a Markov model of as many orders, trained jointly with the
            layers. The head cannot be tied then.
    """

    vocabulary_size: int
    model_width: int
    mixers: tuple[str | Mapping[str, Any], ...]
    norm_epsilon: float = 1e-5
    residual_in_float32: bool = False
    tied_head: bool = True
    vocabulary_multiple: int = 1
    context_symbols: tuple[int, int] = (0, 0)
    context_widths: tuple[int, ...] = ()
    output_context_widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("context_symbols", "context_widths", "output_context_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("vocabulary_size", "model_width", "vocabulary_multiple"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1 but is {getattr(self, name)}")
        if not self.mixers:
            raise InputError("a language model needs at least one layer; give one mixer per layer")
        self._check_contexts()

    @property
    def padded_vocabulary_size(self) -> int:
        """Number of rows of the tables."""
        return padded_size(self.vocabulary_size, self.vocabulary_multiple)

    @property
    def hidden_width(self) -> int:
        """Number of input channels of the head."""
        return self.model_width + (self.context_symbols[1] if self.output_context_widths else 0)

    def _check_contexts(self) -> None:
        widths = (*self.context_widths, *self.output_context_widths)
        if not widths:
            return
        first, count = self.context_symbols
        if first < 0 or count < 2 or first + count > self.vocabulary_size:
            raise InputError(
                f"context_symbols is {first}, {count}, which are not two or more tokens among {self.vocabulary_size}; "
                "give the first token of contexts and how many there are"
            )
        if min(widths) < 1 or count ** max(widths) > MAXIMUM_CONTEXTS:
            raise InputError(
                f"contexts of {min(widths)} to {max(widths)} symbols out of {count} cannot be tabulated; "
                f"use widths from 1 that give at most {MAXIMUM_CONTEXTS} contexts"
            )
        if self.output_context_widths and self.tied_head:
            raise InputError("output_context_widths need an untied head; set tied_head to false")


class ContextLanguageState(NamedTuple):
    """The state of a model with contexts."""

    contexts: Tensor | None  # (batch, history) for the embedding
    output_contexts: Tensor | None  # the same for the head's tables
    stack: StackState


LanguageState = StackState | ContextLanguageState


class CausalLanguageModel(nn.Module):
    """Embedding, residual stack, final norm and a head that gives the logits of the next token.

    Args:
        config: see `CausalLanguageModelConfig`.

    Raises:
        InputError: if a mixer or option is unknown.
    """

    def __init__(self, config: CausalLanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.padded_vocabulary_size
        self.embedding = nn.Embedding(rows, config.model_width)
        self.stack = ResidualStack(config.model_width, config.mixers, config.norm_epsilon)
        self.head = None if config.tied_head else nn.Linear(config.hidden_width, rows, bias=False)
        for table in (self.embedding, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=EMBEDDING_DEVIATION)
        first, symbols = config.context_symbols
        self.contexts = self.output_contexts = None
        if config.context_widths:
            self.contexts = ContextEmbedding(symbols, config.context_widths, config.model_width)
            # With the scale of the token embedding; invalid contexts stay zero.
            with torch.no_grad():
                for parameter in self.contexts.parameters():
                    parameter.mul_(EMBEDDING_DEVIATION)
        if config.output_context_widths:
            assert self.head is not None  # checked by the configuration
            self.output_contexts = ContextEmbedding(symbols, config.output_context_widths, symbols)
            for parameter in self.output_contexts.parameters():
                nn.init.zeros_(parameter)
            with torch.no_grad():
                # Initially, the output of a context for a symbol is that symbol's logit.
                self.head.weight[:, config.model_width :] = 0
                self.head.weight[first : first + symbols, config.model_width :] = torch.eye(symbols)
        if config.residual_in_float32:
            for block in self.stack.blocks:
                cast(ResidualBlock, block).norm.in_dtype_of_weight = True

    @property
    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Parameters of the dynamics of all mixers."""
        return parameters_without_decay(self)

    def forward(
        self, tokens: Tensor, state: LanguageState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, LanguageState]:
        """Compute the logits of the token after each position.

        Args:
            tokens: (batch, length), integers below `vocabulary_size`.
            state: state after the previous piece; None at the start.
            sequence_starts: (batch, length), boolean, True where a new record begins (`mambacore.packing`).

        Returns:
            Logits (batch, length, padded_vocabulary_size) and the state for the next piece.

        Raises:
            ValueError: if `sequence_starts` is given to a model with contexts, which reach into the previous record.
        """
        hidden, state = self.hidden(tokens, state, sequence_starts)
        return self.logits(hidden), state

    def hidden(
        self, tokens: Tensor, state: LanguageState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, LanguageState]:
        """Compute the input of the head, (batch, length, config.hidden_width), and the state for the next piece."""
        embedded = self.embedding(tokens)
        if self.contexts is None and self.output_contexts is None:
            return self._through_stack(embedded, state, sequence_starts)
        if sequence_starts is not None:
            raise ValueError("contexts reach across record boundaries; give a model with contexts one record per row")
        incoming = ContextLanguageState(None, None, (None,) * len(self.stack.blocks)) if state is None else state
        assert isinstance(incoming, ContextLanguageState)
        symbols = tokens.long() - self.config.context_symbols[0]
        histories: list[Tensor | None] = [None, None]
        if self.contexts is not None:
            added, histories[0] = self.contexts(symbols, incoming.contexts)
            embedded = embedded + added
        hidden, stack_state = self._through_stack(embedded, incoming.stack, None)
        if self.output_contexts is not None:
            spoken, histories[1] = self.output_contexts(symbols, incoming.output_contexts)
            hidden = torch.cat([hidden, spoken.to(hidden.dtype)], dim=-1)
        return hidden, ContextLanguageState(histories[0], histories[1], stack_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head: (..., config.hidden_width) to (..., padded_vocabulary_size).

        In the precision of its weights even under autocast: DNA models differ in the third digit of a logit.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            if self.head is not None:
                return self.head(hidden.to(next(self.head.parameters(), hidden).dtype))
            return F.linear(hidden.to(self.embedding.weight.dtype), self.embedding.weight)

    def _through_stack(self, embedded: Tensor, state: Any, sequence_starts: Tensor | None) -> tuple[Tensor, StackState]:
        if self.config.residual_in_float32:
            embedded = widened(embedded)
        return self.stack(embedded, state, sequence_starts)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor | Sequence[Tensor],
        count: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        top_k: int | None = None,
        eos: int | None = None,
        state: LanguageState | None = None,
    ) -> Generated:
        """Continue prompts: process them in one pass, then token by token with the state.

        Args:
            prompt: (batch, length), at least one token; or a list of (length,) tensors, whose lengths may differ.
            count: number of tokens to add to each.
            temperature, top_p, top_k: see `mambacore.models.sampling_probabilities`; temperature 0 is greedy.
            generator: the source of the random numbers, which are the same for the same seed and number of rows,
                however many tokens are added at once.
            eos: the token that ends a row; None to always generate `count` tokens.
            state: state of the model before the prompt; only for prompts of equal length.

        Returns:
            The new tokens, their log-likelihoods, the lengths and the state (`Generated`). No padding token is among
            them.

        Raises:
            InputError: an empty prompt, tokens that the model does not have, a negative count, or settings of the
                sampling that mean nothing.
        """
        return generate(
            self, prompt, count, temperature, top_p, generator, top_k=top_k, eos=eos, state=state
        )  # fmt: skip


def padded_size(vocabulary_size: int, multiple: int) -> int:
    """Return the smallest multiple that is at least the size."""
    return -(-vocabulary_size // multiple) * multiple
