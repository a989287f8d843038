"""Choosing the next token from its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from mambacore.errors import InputError


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse settings that mean nothing.

    Raises:
        InputError: a negative or infinite temperature, or a share outside (0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 (the likeliest token) or positive but is {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1 but is {top_p}")


def sample_tokens(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """One token per row of (batch, vocabulary_size) logits, as (batch,) whole numbers.

    Args:
        logits: unnormalised log-probabilities; -inf excludes a token.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: choose among the fewest tokens whose probabilities add up to this much (nucleus sampling, Holtzman et
            al., arXiv 1904.09751, equation 2).
        generator: where the random numbers come from.

    Raises:
        InputError: see ``check_sampling``.
    """
    check_sampling(temperature, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Logits below zero only: a small temperature then sends what is not the likeliest to zero instead of to infinity.
    probabilities = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1:
        sorted_probabilities, order = probabilities.sort(dim=-1, descending=True)
        before = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities
        kept = torch.where(before < top_p, sorted_probabilities, torch.zeros_like(sorted_probabilities))
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
