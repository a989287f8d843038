"""A causal language model as a program of native steps: generation without calls between tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor, nn

from mambacore.backends import native_library_for
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.plain_modules import is_plain, operators_are_watched
from mambacore.layers.stack import ResidualBlock, ResidualStack
from mambacore.layers.step_program import EMBED, STEP_DTYPES, StepProgram, can_step
from mambacore.native_library import Library

CAUSAL_MODULE: Final = "mambacore.models.causal"
"""What defines the `hidden` and `logits` that programs compute; it imports this module."""


class TokenModel(Protocol):
    """Interface of causal language models for generation, as in `mambacore.models.CausalLanguageModel`."""

    config: Any
    embedding: nn.Embedding
    contexts: Any
    stack: Any
    output_contexts: Any
    head: Any

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        ...

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the output of the stack for `tokens` (batch, length), and its state."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token, (batch, length, vocabulary)."""
        ...


def steps_library(model: TokenModel) -> Library | None:
    """Return the native library if it can run all of this model step by step, else None."""
    weight, head = model.embedding.weight, model.head
    fits = (
        weight.dtype in STEP_DTYPES
        and all(parameter.dtype == weight.dtype for parameter in model.parameters())
        and model.contexts is None
        and model.output_contexts is None
        and not torch.is_autocast_enabled(weight.device.type)
        and not operators_are_watched()
        and not vars(model).keys() & {"hidden", "logits"}
        and type(model).hidden.__module__ == type(model).logits.__module__ == CAUSAL_MODULE  # not of a subclass
        and is_plain(model.embedding, nn.Embedding)
        and model.embedding.max_norm is None
        and is_plain(model.stack, ResidualStack)
        and is_plain(model.stack.final_norm, RootMeanSquareNorm)
        and (head is None or (is_plain(head, nn.Linear) and head.bias is None))
        and all(can_step(block) for block in model.stack.blocks)
    )
    return native_library_for(weight) if fits else None


class LanguageSteps:
    """A snapshot of a model, compiled to native steps.

    Args:
        model: one for which `steps_library` gives a library.
        library: that one.
    """

    def __init__(self, model: TokenModel, library: Library) -> None:
        self.library, self.model = library, model
        self.classes, width = model.config.vocabulary_size, model.config.model_width
        self.program = StepProgram(model.embedding.weight.dtype)
        hidden, self.logits = self.program.place(width), self.program.place(self.classes)
        self.program.add(EMBED, [model.embedding.weight], target=hidden, width=width)
        self.blocks = [cast(ResidualBlock, block) for block in model.stack.blocks]
        self.places = [self.program.block(block, hidden) for block in self.blocks]
        self.program.norm(model.stack.final_norm, hidden, hidden)
        # The padding of the vocabulary is left out: it is never sampled.
        head = nn.utils.skip_init(nn.Linear, width, self.classes, bias=False, dtype=self.program.dtype)
        table = model.embedding.weight if model.head is None else model.head.weight
        head.weight = nn.Parameter(table.detach()[: self.classes], requires_grad=False)
        self.program.linear(head, hidden, self.logits)

    def walk(
        self, last: Tensor, state: Any, temperature: float, top_p: float
    ) -> Callable[[Tensor], tuple[Tensor, Tensor, Any]]:
        """Go on after the last tokens (batch,) of the prompts with the state before them.

        Returns:
            A function of (batch, count) uniforms that gives tokens, log-likelihoods and the state after all but the
            last token, and goes on from there when it is called again.
        """
        memory = torch.zeros(last.shape[0], self.program.memory_size, dtype=self.program.dtype)
        if state is not None:
            for place, of_block in zip(self.places, state, strict=True):
                self.program.write_state(memory, place, of_block)
        tokens, position = last.long().clone().contiguous(), 0

        def walk(uniforms: Tensor) -> tuple[Tensor, Tensor, Any]:
            nonlocal position
            sampled, likelihoods = self.program.run(
                self.library, memory, tokens, position=position, logits=self.logits, classes=self.classes,
                uniforms=uniforms.contiguous(), temperature=temperature, top_p=top_p,
            )  # fmt: skip
            position += uniforms.shape[1]
            states = tuple(
                self.program.read_state(memory, place, block.mixer)
                for place, block in zip(self.places, self.blocks, strict=True)
            )
            return sampled, likelihoods, states

        return walk
