"""Generation of DNA with a causal language model: the prompt in one pass, then base by base with the state.

Record i is a function of (seed, i): it does not depend on the number of other records or on the batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genomamba.models.language_model import BASE_COUNT, FIRST_BASE_TOKEN, LanguageModel
from genomamba.tokenizer import Tokens
from mambacore.devices import from_numpy, to_numpy
from mambacore.errors import InputError
from mambacore.models.sampling import check_sampling, sampling_probabilities

_UNIFORM_NUMBERS_AT_ONCE: Final = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next base is sampled from the model's probabilities of A, C, G and T.

    - `temperature`: log-probabilities are divided by it; 0 chooses the most likely base.
    - `top_k`: sample from this many of the most likely bases, 1 to 4.
    - `top_p`: sample from the smallest set of bases whose probabilities sum to at least this (Holtzman et al., arXiv
      1904.09751, equation 2).
    """

    temperature: float = 1.0
    top_k: int = BASE_COUNT
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check that the values are in range."""
        check_sampling(self.temperature, self.top_p, self.top_k)
        if self.top_k > BASE_COUNT:
            raise InputError(f"top_k is {self.top_k}: use 1 to {BASE_COUNT}, the number of bases.")

    def probabilities(self, log_probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Convert log-probabilities (batch, 4) to sampling probabilities (batch, 4)."""
        logits = torch.from_numpy(log_probabilities)
        return sampling_probabilities(logits, self.temperature, self.top_p, self.top_k).numpy()


@dataclass(frozen=True)
class GeneratedRecord:
    """Generated bases and their total log-likelihood (nats) under the model without temperature."""

    index: int
    tokens: Tokens
    log_likelihood: float


def generate(
    language_model: LanguageModel,
    prompts: Sequence[Tokens],
    length: int,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda bases: None,
) -> Iterator[GeneratedRecord]:
    """Yield one record of `length` new bases per prompt, in the order of the prompts.

    After an empty prompt the first base is sampled uniformly, since the model has no prediction for it.

    Args:
        language_model: a causal model.
        prompts: tokens to continue; they are not part of the records.
        length: bp of each record.
        sampling: sampling settings.
        seed: record i uses random numbers from (seed, i).
        batch_size: number of records generated together.
        advance: called regularly with the number of new bases.

    Raises:
        InputError: if the model is masked, or the length is below 1.
    """
    language_model.require("causal", "generation")
    if length < 1:
        raise InputError(f"records of {length} bp cannot be generated: use 1 or more.")
    begin = 0
    while begin < len(prompts):
        # Prompts of equal length are processed together, without padding.
        end = begin + 1
        while end < min(len(prompts), begin + batch_size) and len(prompts[end]) == len(prompts[begin]):
            end += 1
        batch = from_numpy(np.stack(prompts[begin:end])).long()
        tokens, log_likelihoods = _generate_batch(
            language_model,
            batch,
            length,
            sampling,
            [np.random.default_rng([seed, index]) for index in range(begin, end)],
            advance,
        )
        for row, index in enumerate(range(begin, end)):
            yield GeneratedRecord(index, tokens[row], float(log_likelihoods[row]))
        begin = end


def _generate_batch(
    language_model: LanguageModel,
    prompt: Tensor,
    length: int,
    sampling: Sampling,
    random_numbers: Sequence[np.random.Generator],
    advance: Callable[[int], None],
) -> tuple[Tokens, npt.NDArray[np.float64]]:
    rows = len(random_numbers)
    bases = np.empty((rows, length), dtype=np.uint8)
    log_likelihoods = np.zeros(rows)
    state: Any = None
    log_probabilities = np.full((rows, BASE_COUNT), -math.log(BASE_COUNT))
    uniform = np.empty((rows, 0))
    if prompt.shape[1]:
        found, state = language_model.next_base_log_probabilities(prompt)
        log_probabilities = to_numpy(found[:, -1], torch.float64)
    for position in range(length):
        column = position % _UNIFORM_NUMBERS_AT_ONCE
        if column == 0:
            uniform = np.stack([numbers.random(_UNIFORM_NUMBERS_AT_ONCE) for numbers in random_numbers])
        first = position == 0 and not prompt.shape[1]
        probabilities = np.exp(log_probabilities) if first else sampling.probabilities(log_probabilities)
        through = probabilities.cumsum(axis=1)
        # By rounding, a number may coincide with the last boundary.
        last = BASE_COUNT - 1 - (probabilities[:, ::-1] > 0).argmax(axis=1)
        chosen = np.minimum((uniform[:, column, None] * through[:, -1:] >= through).sum(axis=1), last)
        bases[:, position] = chosen
        log_likelihoods += log_probabilities[np.arange(rows), chosen]
        if column == _UNIFORM_NUMBERS_AT_ONCE - 1 or position == length - 1:
            advance(rows * (column + 1))
        if position < length - 1:
            tokens = from_numpy(chosen[:, None] + FIRST_BASE_TOKEN)
            found, state = language_model.next_base_log_probabilities(tokens, state)
            log_probabilities = to_numpy(found[:, -1], torch.float64)
    return bases + np.uint8(FIRST_BASE_TOKEN), log_likelihoods
