"""Log-likelihoods of bases under a language model, and perplexity with its confidence interval.

The only module that gathers log-probabilities of the observed bases from those of A, C, G and T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

from genomamba.models.language_model import BASE_COUNT, FIRST_BASE_TOKEN, LanguageModel
from genomamba.tokenizer import COMPLEMENT_IDS, Tokens
from mambacore.devices import device_of, from_numpy, positions_at_once

PIECE_LENGTH_BP: Final = 16_384
"""Piece length for causal models; results do not depend on it."""
MASKING_PASSES: Final = 7
"""Each base is hidden once from a masked model, in this many passes: close to the 15 % hidden in training."""
CONFIDENCE: Final = 0.95
BLOCK_BP: Final = 65_536
"""Bases closer than this, and homologous ones of other assemblies, are not treated as independent."""
FEWEST_BLOCKS: Final = 16
"""With fewer blocks, their length is halved, down to that of a window."""


def is_base(tokens: Tensor) -> Tensor:
    """Return where a token is A, C, G or T."""
    return (tokens >= FIRST_BASE_TOKEN) & (tokens < FIRST_BASE_TOKEN + BASE_COUNT)


def base_log_likelihoods(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Gather the log-probability of each observed base.

    Args:
        log_probabilities: (..., 4) for A, C, G and T.
        tokens: (...), any integer dtype.

    Returns:
        (...) in the dtype of the log-probabilities; 0 where a token is not a base.
    """
    known = is_base(tokens)
    bases = torch.where(known, tokens.long() - FIRST_BASE_TOKEN, 0)
    return torch.where(known, log_probabilities.gather(-1, bases.unsqueeze(-1)).squeeze(-1), 0.0)


def causal_losses(language_model: LanguageModel, tokens: Tensor, piece_length: int = PIECE_LENGTH_BP) -> Tensor:
    """Compute -log P (nats) of each base given those before it in its row.

    The first position is not scored. Memory is that of a piece, whatever the length.

    Args:
        language_model: a causal model.
        tokens: (rows, length).
        piece_length: bases per forward pass, and more on a GPU; the result does not depend on it.

    Returns:
        (rows, length - 1) float64, 0 where a token is not a base.
    """
    losses = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.float64)
    state: Any = None
    at_once = positions_at_once(device_of(language_model.model), piece_length * max(1, tokens.shape[0]))
    piece_length = max(piece_length, at_once // max(1, tokens.shape[0]))
    for begin in range(0, tokens.shape[1] - 1, piece_length):
        end = min(begin + piece_length, tokens.shape[1] - 1)
        log_probabilities, state = language_model.next_base_log_probabilities(tokens[:, begin:end], state)
        losses[:, begin:end] = -base_log_likelihoods(log_probabilities, tokens[:, begin + 1 : end + 1]).double()
    return losses


def masked_losses(language_model: LanguageModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Compute -log P (nats) of each hidden base given the rest of its row, (rows, length) float64; 0 elsewhere."""
    log_probabilities = language_model.masked_base_log_probabilities(tokens, hidden)
    return -base_log_likelihoods(log_probabilities, tokens).double() * hidden


def base_losses(language_model: LanguageModel, tokens: Tensor) -> Tensor:
    """Compute -log P (nats) of each base after the first of its row.

    With a masked model each base is hidden once, a seventh of them at a time (pseudo-log-likelihood, Salazar et al.,
    arXiv 1910.14659, equation 1, with several bases hidden at once).

    Args:
        language_model: a causal or masked model.
        tokens: (rows, length).

    Returns:
        (rows, length - 1) float64, 0 where a token is not a base.
    """
    if language_model.objective == "causal":
        return causal_losses(language_model, tokens)
    # Adjacent bases are in different passes, whatever their position in the genome.
    passes = torch.from_numpy(np.random.default_rng(0).permuted(np.arange(tokens.shape[1]) % MASKING_PASSES))
    losses = torch.zeros(tokens.shape, dtype=torch.float64)
    for number in range(MASKING_PASSES):
        losses += masked_losses(language_model, tokens, is_base(tokens) & (passes == number))
    return losses[:, 1:]


@dataclass(frozen=True)
class SequenceLikelihood:
    """Log-likelihood of a sequence (nats), summed over `bases` scored bases of one strand."""

    log_likelihood: float
    bases: int

    @property
    def per_base(self) -> float:
        """Mean log-likelihood, nats per base; NaN without scored bases."""
        return self.log_likelihood / self.bases if self.bases else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the negative mean log-likelihood; NaN without scored bases."""
        return math.exp(-self.per_base)


def sequence_log_likelihood(
    language_model: LanguageModel, tokens: Tokens, both_strands: bool = False
) -> SequenceLikelihood:
    """Sum the log-likelihoods of the bases of a sequence after its first.

    Args:
        language_model: a causal or masked model.
        tokens: (length,).
        both_strands: average the given strand and its reverse complement.
    """
    strands = [tokens, COMPLEMENT_IDS[tokens[::-1]]] if both_strands else [tokens]
    sums, counts = [], []
    for strand in strands if len(tokens) > 1 else ():
        row = from_numpy(strand)[None]
        sums.append(-float(base_losses(language_model, row).sum()))
        counts.append(int(is_base(row)[:, 1:].sum()))
    # The strands skip different first bases: the count is that of the given strand.
    return SequenceLikelihood(float(np.mean(sums)), counts[0]) if sums else SequenceLikelihood(0.0, 0)


@dataclass(frozen=True)
class WindowScores:
    """Cross-entropy of windows of one length under one scorer.

    Attributes:
        nats: (windows,) summed over each window.
        bases: (windows,) number of scored bases.
        blocks: genome block of each window (`blocks_of`).
    """

    nats: npt.NDArray[np.float64]
    bases: npt.NDArray[np.int64]
    blocks: Sequence[tuple[str, int]]

    @property
    def nats_per_base(self) -> float:
        """Cross-entropy in nats per base."""
        return float(self.nats.sum() / self.bases.sum())

    def interval(self, other: WindowScores | None = None) -> tuple[float, float]:
        """Return the 95 % confidence interval of the nats per base, or of their difference to another scorer's.

        Blocks of the genome are the independent observations: the ratio of their sums, its linearised variance (Cochran
        1977, "Sampling techniques", equation 6.13, without finite population correction) and Student's t.

        Returns:
            Lower and upper bound; NaN with a single block.
        """
        nats = self.nats if other is None else self.nats - other.nats
        names, numbers = np.unique([f"{name} {number}" for name, number in self.blocks], return_inverse=True)
        count = len(names)
        if count < 2:
            return math.nan, math.nan
        mean = float(nats.sum() / self.bases.sum())
        residuals = np.bincount(numbers, nats - mean * self.bases, count)
        deviation = math.sqrt(float((residuals**2).sum()) * count / (count - 1)) / float(self.bases.sum())
        reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * deviation
        return mean - reach, mean + reach


def blocks_of(places: Sequence[tuple[str, int]], length: int) -> list[tuple[str, int]]:
    """Assign windows (chromosome, start) of `length` bp to genome blocks, the units of independent observations."""
    size = BLOCK_BP
    while size // 2 >= length and len({(name, start // size) for name, start in places}) < FEWEST_BLOCKS:
        size //= 2
    return [(name, start // size) for name, start in places]
