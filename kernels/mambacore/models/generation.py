"""Generation: the prompt is processed in one pass, then token by token with the state.

On a CPU, stacks of selective and S4D mixers run as a program of native steps (`mambacore.layers.step_program`), in
which hundreds of tokens are one call. Everything else runs through the modules, with equal results; on a GPU as
captured graphs (`mambacore.models.captured_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambacore.devices import wide_dtype
from mambacore.errors import InputError
from mambacore.layers.plain_modules import calls_are_watched
from mambacore.models.captured_step import CapturedStep
from mambacore.models.language_steps import LanguageSteps, TokenModel, steps_library
from mambacore.models.sampling import check_sampling, sample_tokens, token_log_likelihoods
from mambacore.non_finite import require_numbers
from mambacore.state import map_state

# Tokens between two checks of whether every row has ended.
TOKENS_AT_ONCE = 256
# Creating a program copies all weights, which pays off from this many tokens on.
FEWEST_FOR_A_PROGRAM = 16
# And capturing a graph on a GPU takes as long as several steps.
FEWEST_FOR_A_GRAPH = 32


class Generated(NamedTuple):
    """Generated tokens.

    Attributes:
        tokens: (batch, count), the new tokens; after the end of a row only `eos`.
        log_likelihoods: (batch, count), float64: the natural log-probability of every token under the model as it is,
            before temperature, top-k and top-p; 0 after the end of a row.
        lengths: (batch,), how many tokens each row has, `eos` included.
        state: of the model after everything but the last token. To go on, give the last token as the prompt and this
            state. None where prompts were of unequal lengths and the mixers' states cannot be stacked.
    """

    tokens: Tensor
    log_likelihoods: Tensor
    lengths: Tensor
    state: Any


class _Settings(NamedTuple):
    temperature: float
    top_p: float
    top_k: int | None


def generate(
    model: TokenModel,
    prompt: Tensor | Sequence[Tensor],
    count: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    top_k: int | None = None,
    eos: int | None = None,
    state: Any = None,
) -> Generated:
    """Continue prompts with a causal language model: see `CausalLanguageModel.generate`."""
    check_sampling(temperature, top_p, top_k)
    if count < 0:
        raise InputError(f"count must not be negative but is {count}")
    vocabulary = model.config.vocabulary_size
    if eos is not None and not 0 <= eos < vocabulary:
        raise InputError(f"eos is the token {eos}, which is not one of the {vocabulary} of the model")
    groups = _groups(model, prompt)
    if state is not None and len(groups) > 1:
        raise InputError("a state goes on from one place in every row; give prompts of one length with it")
    batch = sum(len(rows) for rows, _ in groups)
    device = model.embedding.weight.device
    if temperature > 0:
        # By position and then by row, so that the numbers of a position depend on neither the count nor the grouping.
        uniforms = torch.rand(
            count, batch, dtype=torch.float64, generator=generator,
            device="cpu" if generator is None else generator.device,
        ).T.cpu()  # fmt: skip
    else:
        uniforms = torch.zeros(batch, count, dtype=torch.float64)
    settings = _Settings(temperature, top_p, top_k)
    order = [row for rows, _ in groups for row in rows]
    walks = []
    for rows, tokens in groups:
        held = state
        if tokens.shape[1] > 1:
            _, held = model.hidden(tokens[:, :-1].to(device), state)
        walks.append((rows, tokens[:, -1].to(device), held))
    merged = _merged([held for _, _, held in walks])
    if len(walks) > 1 and merged is not None:
        walks = [(order, torch.cat([last for _, last, _ in walks]), merged)]
    parts = [(rows, _continue(model, last, held, uniforms[rows], settings, eos, count)) for rows, last, held in walks]
    inverse = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    tokens, likelihoods, lengths = (
        torch.cat([found[place] for _, found in parts])[inverse.to(device)] for place in range(3)
    )
    if len(parts) > 1:
        return Generated(tokens, likelihoods, lengths, None)
    final = parts[0][1][3]
    if order != sorted(order):
        final = map_state(lambda tensor: tensor[inverse.to(tensor.device)], final)
    return Generated(tokens, likelihoods, lengths, final)


def _continue(
    model: TokenModel,
    last: Tensor,
    state: Any,
    uniforms: Tensor,
    settings: _Settings,
    eos: int | None,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Continue from the last tokens (batch,) of prompts and the state before them."""
    batch, device = last.shape[0], last.device
    tokens = torch.zeros(batch, count, dtype=torch.int64, device=device)
    likelihoods = torch.zeros(batch, count, dtype=wide_dtype(device), device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    lengths = torch.full((batch,), count, dtype=torch.int64, device=device)
    library = steps_library(model) if count >= FEWEST_FOR_A_PROGRAM and settings.top_k is None and batch > 0 else None
    walk: _Walk = (
        _composed(model, last, state, settings, capture=count >= FEWEST_FOR_A_GRAPH)
        if library is None
        else LanguageSteps(model, library).walk(last, state, settings.temperature, settings.top_p)
    )
    for begin in range(0, count, TOKENS_AT_ONCE):
        end = min(count, begin + TOKENS_AT_ONCE)
        found, of_found, state = walk(uniforms[:, begin:end])
        require_numbers(of_found, "probabilities")
        if eos is not None:
            is_end = found == eos
            # Everything after the first end, this piece's or an earlier one's.
            after = ended.unsqueeze(1) | (is_end.cumsum(1) - is_end.long() > 0)
            first = is_end.any(1) & ~ended
            lengths = torch.where(first, begin + 1 + is_end.long().argmax(1), lengths)
            found, of_found = found.masked_fill(after, eos), of_found.masked_fill(after, 0.0)
            ended = ended | is_end.any(1)
        tokens[:, begin:end], likelihoods[:, begin:end] = found, of_found
        if eos is not None and bool(ended.all()):
            tokens[:, end:] = eos
            break
    return tokens, likelihoods, lengths, state


# (batch, count) uniforms to tokens, their log-likelihoods, and the state after all but the last token.
_Walk = Callable[[Tensor], tuple[Tensor, Tensor, Any]]


def _composed(model: TokenModel, last: Tensor, state: Any, settings: _Settings, capture: bool) -> _Walk:
    """Generate token by token through the modules."""

    def advance(uniform: Tensor, carried: Any) -> tuple[tuple[Tensor, ...], Any]:
        token, held = carried
        hidden, held = model.hidden(token.unsqueeze(1), held)
        logits = model.logits(hidden[:, -1])[:, : model.config.vocabulary_size]
        token = sample_tokens(logits, settings.temperature, settings.top_p, top_k=settings.top_k, uniforms=uniform)
        return (token, token_log_likelihoods(logits, token)), (token, held)

    # A graph would call hooks once, however often it is replayed.
    watched = isinstance(model, nn.Module) and calls_are_watched(model)
    step = CapturedStep(advance, (last, state), last.device, capture and not watched)

    def walk(uniforms: Tensor) -> tuple[Tensor, Tensor, Any]:
        on_device = uniforms.to(dtype=wide_dtype(last.device)).to(last.device)
        tokens, likelihoods = zip(*(step(uniform) for uniform in on_device.unbind(1)), strict=True)
        return torch.stack(tokens, dim=1), torch.stack(likelihoods, dim=1), step.state[1]

    return walk


def _groups(model: TokenModel, prompt: Tensor | Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Rows of one length together: their numbers and their tokens (rows, length).

    Raises:
        InputError: if a prompt is empty or invalid, or has a token that the model does not have.
    """
    if isinstance(prompt, Tensor):
        if prompt.dim() != 2 or prompt.shape[1] < 1:
            raise InputError(
                f"prompt must be (batch, length) with at least one token but has shape {tuple(prompt.shape)}"
            )
        groups = [(list(range(prompt.shape[0])), prompt)]
    else:
        by_length: dict[int, list[int]] = {}
        for row, tokens in enumerate(prompt):
            if not isinstance(tokens, Tensor) or tokens.dim() != 1 or tokens.shape[0] < 1:
                raise InputError(f"prompt {row} must be (length,) tokens, at least one of them")
            by_length.setdefault(tokens.shape[0], []).append(row)
        if not by_length:
            raise InputError("the list of prompts is empty; give at least one")
        groups = [(rows, torch.stack([prompt[row] for row in rows])) for rows in by_length.values()]
    rows_of_table = model.config.padded_vocabulary_size
    for _, tokens in groups:
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise InputError(f"prompt must be tokens, which are integers, but is {tokens.dtype}")
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < rows_of_table):
            raise InputError(
                f"prompt has tokens from {int(tokens.min())} to {int(tokens.max())} but the model has those from 0 to "
                f"{rows_of_table - 1}"
            )
    return groups


def _merged(states: list[Any]) -> Any:
    """Merge the states of all rows, or return None if they cannot be stacked (such as keys of attention)."""
    first = states[0]
    if len(states) == 1 or any(one is None for one in states):
        return first if len(states) == 1 else None
    if isinstance(first, Tensor):
        shapes = {one.shape[1:] for one in states}
        return torch.cat(states) if len(shapes) == 1 else None
    if not isinstance(first, tuple):
        return first if all(one == first for one in states) else None
    members: list[Any] = []
    for parts in zip(*states, strict=True):
        if all(part is None for part in parts):
            members.append(None)
            continue
        together = _merged(list(parts))
        if together is None:
            return None
        members.append(together)
    return type(first)(*members) if hasattr(first, "_fields") else tuple(members)
