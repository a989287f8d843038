"""Interpolated Markov models of DNA up to order 12, the baseline for a language model's perplexity.

A model of order k interpolates the counts of all orders up to k. How strongly the estimate for a context is shrunk
towards that for the context without its oldest base is fitted for each order on validation sequences: DNA is so close
to uniform that smoothing rules made for text, such as Witten-Bell, shrink long contexts far too little.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from genomamba.baselines.words import FIRST_BASE_TOKEN, word_codes
from genomamba.tokenizer import COMPLEMENT_IDS, Tokens
from mambacore.errors import InputError

MAXIMUM_ORDER: Final = 12
"""4^13 counts of 4 bytes are 268 MB, and those of the lower orders 89 MB more."""
STRENGTHS: Final = tuple(2.0**power for power in range(-1, 16))
"""Candidates for the strength of the prior, in pseudocounts per context: 1/2 to 32,768."""
_CODES_AT_A_TIME: Final = 1 << 24
_BASES: Final = 4

Counts = npt.NDArray[np.int32]


class StrandSymmetricCounts:
    """Counts of each base after each context of 0 to `order` bases, on both strands."""

    def __init__(self, order: int) -> None:
        """Start with zero counts.

        Raises:
            InputError: if the order is not in 0 to 12.
        """
        if not 0 <= order <= MAXIMUM_ORDER:
            raise InputError(
                f"a Markov model of order {order} is not supported: use an order from 0 to {MAXIMUM_ORDER}."
            )
        self.order = order
        self._longest = np.zeros(_BASES ** (order + 1), dtype=np.int32)
        self._by_order: list[Counts] | None = None

    @classmethod
    def of_words(cls, counts: Counts) -> "StrandSymmetricCounts":
        """Create from counts of words, int32 (4^(order + 1),), that are already strand-symmetric."""
        made = cls((len(counts).bit_length() - 1) // 2 - 1)
        made._longest = counts
        return made

    def add(self, sequences: Iterable[Tokens]) -> "StrandSymmetricCounts":
        """Count sequences, tokens uint8 (length,) each; words with anything but A, C, G, T are skipped."""
        self._by_order = None
        waiting: list[npt.NDArray[np.int32]] = []
        for tokens in sequences:
            for strand in (tokens, COMPLEMENT_IDS[tokens[::-1]]):
                waiting.append(word_codes(strand, self.order + 1))
            if sum(map(len, waiting)) >= _CODES_AT_A_TIME:
                self._count(waiting)
                waiting = []
        self._count(waiting)
        return self

    def of_order(self, order: int) -> Counts:
        """Return counts of words of `order` + 1 bases, int32 (4^(order + 1),), first base most significant."""
        if self._by_order is None:
            by_order = [self._longest]
            while len(by_order[-1]) > _BASES:
                by_order.append(by_order[-1].reshape(_BASES, -1).sum(axis=0, dtype=np.int32))
            self._by_order = by_order[::-1]
        return self._by_order[order]

    def _count(self, codes: Sequence[npt.NDArray[np.int32]]) -> None:
        if codes:
            self._longest += np.bincount(np.concatenate(codes), minlength=len(self._longest)).astype(np.int32)


@dataclass(frozen=True)
class InterpolatedMarkovModel:
    """A Markov model of order k = `len(strengths) - 1`.

    With n the counts, c' the context c without its oldest base, and below order 0 the uniform distribution (MacKay and
    Peto 1995, "A hierarchical Dirichlet language model", Natural Language Engineering 1:289, equation 13, with the
    strength alpha_j of each order chosen on validation data instead of by the evidence):

        P_j(b | c) = (n(c b) + alpha_j P_{j-1}(b | c')) / (n(c) + alpha_j)

    A context truncated by the start of a window or a letter that is not a base is used as far as it goes.
    """

    counts: StrandSymmetricCounts
    strengths: tuple[float, ...]

    @property
    def order(self) -> int:
        """Bases of context."""
        return len(self.strengths) - 1

    def log_probabilities(self, tokens: Tokens) -> npt.NDArray[np.float64]:
        """Return the log-probability (nats) of each base given those before it, (length,); 0 for other letters."""
        probability = np.full(len(tokens), 1 / _BASES)
        for looked_up, strength in zip(_look_up(self.counts, tokens, self.order), self.strengths, strict=True):
            probability = looked_up.interpolated(probability, strength)
        return np.where(_is_base(tokens), np.log(probability), 0.0)


@dataclass(frozen=True)
class FittedMarkovModels:
    """Models of the orders 0 to `len(models) - 1`, and their entropies on the sequences used to choose the strengths.

    `validation_entropies` are in nats per base.
    """

    models: tuple[InterpolatedMarkovModel, ...]
    validation_entropies: tuple[float, ...]

    @property
    def best(self) -> InterpolatedMarkovModel:
        """The model of the order that is best on the validation sequences."""
        return self.models[int(np.argmin(self.validation_entropies))]

    def log_probabilities_by_order(self, tokens: Tokens) -> Iterator[npt.NDArray[np.float64]]:
        """Yield `InterpolatedMarkovModel.log_probabilities` of each model, in one pass over the orders."""
        longest = self.models[-1]
        is_base = _is_base(tokens)
        probability = np.full(len(tokens), 1 / _BASES)
        for looked_up, strength in zip(_look_up(longest.counts, tokens, longest.order), longest.strengths, strict=True):
            probability = looked_up.interpolated(probability, strength)
            yield np.where(is_base, np.log(probability), 0.0)


def log_probability_table(model: InterpolatedMarkovModel) -> npt.NDArray[np.float32]:
    """Return log P(b | c) for every context, (4^order, 4); the oldest base of a context is most significant."""
    *_, longest = log_probability_tables(model)
    return longest


def log_probability_tables(model: InterpolatedMarkovModel) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the tables for the orders from 0 to the model's, (4^order, 4) each; see `log_probability_table`."""
    probability = np.full((1, _BASES), 1 / _BASES, dtype=np.float32)
    for order, strength in enumerate(np.array(model.strengths, dtype=np.float32)):
        of_word = model.counts.of_order(order).reshape(-1, _BASES)
        # A context without its oldest base is the context's number modulo 4^(order - 1).
        lower = np.tile(probability, (_BASES, 1)) if order else probability
        probability = (of_word + strength * lower) / (of_word.sum(axis=1, keepdims=True, dtype=np.float32) + strength)
        yield np.log(probability)


def fit_markov_models(
    training: Iterable[Tokens], validation: Sequence[Tokens], maximum_order: int = MAXIMUM_ORDER
) -> FittedMarkovModels:
    """Count the training sequences on both strands, then choose the strengths, from order 0 upwards, by validation.

    Args:
        training: tokens, uint8 (length,) each.
        validation: windows that are not in the training sequences.
        maximum_order: 0 to 12.

    Raises:
        InputError: if the order is out of range, or the validation sequences have no bases.
    """
    counts = StrandSymmetricCounts(maximum_order).add(training)
    scored = np.concatenate([_is_base(tokens) for tokens in validation]) if validation else np.zeros(0, dtype=bool)
    if not scored.any():
        raise InputError("the validation sequences have no bases to select a Markov model on: give longer ones.")
    # The windows are concatenated with gaps, so that no context reaches from one into the next.
    joined = np.concatenate([part for tokens in validation for part in (tokens, _GAP)])
    is_base = _is_base(joined)
    probability = np.full(len(joined), 1 / _BASES)
    strengths: list[float] = []
    entropies: list[float] = []
    for looked_up in _look_up(counts, joined, maximum_order):
        candidates = ((strength, looked_up.interpolated(probability, strength)) for strength in STRENGTHS)
        entropy, strength, probability = min(
            ((_entropy(candidate, is_base), strength, candidate) for strength, candidate in candidates),
            key=lambda choice: choice[:2],
        )
        strengths.append(strength)
        entropies.append(entropy)
    models = tuple(InterpolatedMarkovModel(counts, tuple(strengths[: order + 1])) for order in range(maximum_order + 1))
    return FittedMarkovModels(models, tuple(entropies))


@dataclass(frozen=True)
class _LookedUp:
    """Counts of one order at the positions where its whole context is known."""

    positions: npt.NDArray[np.intp]
    of_word: npt.NDArray[np.float64]
    of_context: npt.NDArray[np.float64]

    def interpolated(self, lower: npt.NDArray[np.float64], strength: float) -> npt.NDArray[np.float64]:
        probability = lower.copy()
        probability[self.positions] = (self.of_word + strength * lower[self.positions]) / (self.of_context + strength)
        return probability


_GAP: Final = np.zeros(1, dtype=np.uint8)
"""A token that is not a base."""


def _look_up(counts: StrandSymmetricCounts, tokens: Tokens, order: int) -> Iterator[_LookedUp]:
    """Yield for the orders 0 to `order` the counts of the word that ends at each position, and of its context."""
    is_base = _is_base(tokens)
    bases = np.where(is_base, tokens - np.uint8(FIRST_BASE_TOKEN), 0).astype(np.int32)
    code = np.zeros(len(tokens), dtype=np.int32)
    complete = np.ones(len(tokens), dtype=bool)
    for context_length in range(order + 1):
        # The base `context_length` positions back becomes the most significant one.
        code[context_length:] += bases[: len(tokens) - context_length] << (2 * context_length)
        complete[:context_length] = False
        complete[context_length:] &= is_base[: len(tokens) - context_length]
        positions = np.flatnonzero(complete)
        words = code[positions]
        table = counts.of_order(context_length)
        of_word = table[words].astype(np.float64)
        siblings = words & ~np.int32(_BASES - 1)
        of_context = sum((table[siblings + base].astype(np.float64) for base in range(_BASES)), np.zeros(len(words)))
        yield _LookedUp(positions, of_word, of_context)


def _is_base(tokens: Tokens) -> npt.NDArray[np.bool_]:
    return (tokens >= FIRST_BASE_TOKEN) & (tokens < FIRST_BASE_TOKEN + _BASES)


def _entropy(probability: npt.NDArray[np.float64], is_base: npt.NDArray[np.bool_]) -> float:
    return float(-np.log(probability[is_base]).mean())
