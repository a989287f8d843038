"""Sampling of the next token from its logits, with temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from mambacore.devices import widened
from mambacore.errors import InputError


def check_sampling(temperature: float, top_p: float, top_k: int | None = None) -> None:
    """Check sampling settings.

    Raises:
        InputError: if temperature is negative or infinite, top_p outside (0, 1], or top_k below 1.
    """
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 (the most likely token) or positive but is {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1 but is {top_p}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1 but is {top_k}")


def sampling_probabilities(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None
) -> Tensor:
    """Return the probabilities that tokens are sampled with.

    Args:
        logits: (..., vocabulary_size), unnormalised log-probabilities; -inf excludes a token.
        temperature: logits are divided by it; 0 chooses the most likely token, the first of equal ones.
        top_p: sample from the smallest set of tokens whose probabilities sum to at least this (nucleus sampling,
            Holtzman et al., arXiv 1904.09751, equation 2).
        top_k: sample from this many of the most likely tokens (Fan et al., arXiv 1805.04833, section 5.1).

    Returns:
        Probabilities of the same shape; float64, or float32 on devices without it.

    Raises:
        InputError: see `check_sampling`.
    """
    check_sampling(temperature, top_p, top_k)
    logits = widened(logits)
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # No scaled logit is above zero: with a small temperature all but the largest underflow and none overflows.
    probabilities = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_p >= 1 and (top_k is None or top_k >= logits.shape[-1]):
        return probabilities
    # Sorted by logits, which have fewer ties than their exponentials.
    order = logits.argsort(dim=-1, descending=True, stable=True)
    ordered = probabilities.gather(-1, order)
    left_out = ordered.cumsum(dim=-1) - ordered >= top_p
    if top_k is not None:
        left_out |= torch.arange(ordered.shape[-1], device=ordered.device) >= top_k
    ordered = ordered.masked_fill(left_out, 0.0)
    kept = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return kept / kept.sum(dim=-1, keepdim=True)


def sample_tokens(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    top_k: int | None = None,
    uniforms: Tensor | None = None,
) -> Tensor:
    """Sample one token per row.

    Args:
        logits: (batch, vocabulary_size).
        temperature, top_p, top_k: see `sampling_probabilities`.
        generator: the source of the random numbers.
        uniforms: (batch,), from 0 to below 1, used instead of random numbers: the token is where the cumulative
            probabilities exceed them, so that the same number always gives the same token.

    Returns:
        (batch,), int64.

    Raises:
        InputError: see `check_sampling`.
    """
    probabilities = sampling_probabilities(logits, temperature, top_p, top_k)
    if uniforms is None:
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
    through = probabilities.cumsum(dim=-1)
    wanted = uniforms.to(through).unsqueeze(-1) * through[..., -1:]
    # By rounding, no cumulative probability may exceed the number: use the last token that may be sampled.
    last = (probabilities > 0).cumsum(-1).argmax(-1)
    return torch.minimum((through <= wanted).sum(-1), last)


def token_log_likelihoods(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities (nats) of tokens under unmodified logits.

    Args:
        logits: (..., vocabulary_size).
        tokens: (...), integers.

    Returns:
        (...), float64, or float32 on devices without it.
    """
    return torch.log_softmax(widened(logits), -1).gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
