"""Pretraining windows for DNA language models: a function of (seed, index), from intervals and a reference.

There is no sampler state to save: resuming is starting at an index, and workers and ranks take indices. An epoch covers
all windows of a split once, in an order that is computed, not stored, since a genome at 1,024 bp has tens of millions
of windows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from genomamba.alphabet import reverse_complement
from genomamba.data.intervals import Interval, PlacedWindow, RuleWindows, Split, WindowRule
from genomamba.letter_policy import LetterPolicy
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError

_MOST_TRIES: Final = 1000
_MIXING_ROUNDS: Final = 6
_WORD: Final = 2**64


class Letters(Protocol):
    """Source of the letters: a `Reference` or a `ReferenceSet`."""

    @property
    def path(self) -> str:
        """What messages call the source."""
        ...

    @property
    def lengths(self) -> Mapping[str, int]:
        """Length of each contig in bp."""
        ...

    def letters(self, contig: str, start: int, end: int, pad: bool = False) -> bytes:
        """The letters of `contig` in [start, end); with `pad`, N beyond its ends."""
        ...


class PretrainingWindow(NamedTuple):
    """One window: `tokens`, uint8, whether each is `scored`, bool, both of shape (length,), and its position.

    With `is_reverse_complement` the tokens are the reverse complement of [start, end).
    """

    tokens: Tokens
    scored: npt.NDArray[np.bool_]
    place: PlacedWindow
    is_reverse_complement: bool


class PretrainingWindows:
    """The windows of one split.

    Positions beyond the ends of a contig are N. Windows with fewer scored bases than `minimum_scored_fraction` of their
    length are not used: training samples another instead, evaluation skips them. Every window has at least one, so a
    mean over scored bases is never 0/0.
    """

    def __init__(
        self,
        reference: Letters,
        intervals: Sequence[Interval],
        split: Split,
        rule: WindowRule,
        length: int,
        seed: int = 0,
        policy: LetterPolicy | None = None,
        reverse_complement_probability: float = 0.5,
        minimum_scored_fraction: float = 0.0,
    ) -> None:
        """Prepare windows of `length` bp.

        Raises:
            InputError: if the split has no rows, a row is outside the reference, the rule does not support the length,
                the seed is not a 64-bit number, or a probability or fraction is outside [0, 1].
        """
        rows = [row for row in intervals if row.split == split]
        if not rows:
            raise InputError(f"the intervals have no rows for {split}: give it some.")
        if not 0 <= seed < _WORD:
            raise InputError(f"the seed is {seed}: use an integer from 0 to 2^64 - 1.")
        for what, share in (
            ("probability of the reverse strand", reverse_complement_probability),
            ("minimum fraction of scored bases", minimum_scored_fraction),
        ):
            if not 0 <= share <= 1:
                raise InputError(f"the {what} is {share}: use a number from 0 to 1.")
        self.reference = reference
        self.windows = RuleWindows(rows, rule, length, reference.lengths)
        self.split: Split = split
        self.length = length
        self.seed = seed
        self.policy = policy or LetterPolicy()
        self.reverse_complement_probability = reverse_complement_probability
        self.minimum_scored_fraction = minimum_scored_fraction

    def __len__(self) -> int:
        """Return the number of windows in an epoch."""
        return len(self.windows)

    def at_length(self, length: int) -> "PretrainingWindows":
        """Return the same windows at another length, as required by a length warm-up.

        Raises:
            InputError: if the rule does not support the length.
        """
        return PretrainingWindows(
            self.reference,
            self.windows.rows,
            self.split,
            self.windows.rule,
            length,
            self.seed,
            self.policy,
            self.reverse_complement_probability,
            self.minimum_scored_fraction,
        )

    def sample(self, index: int) -> PretrainingWindow:
        """Return training window `index`, from 0 without limit, a function of (seed, index) only.

        Indices from e * len(self) to (e + 1) * len(self) - 1 are epoch e: all windows in a different order. A window
        without enough scored bases is replaced by a random one.

        Raises:
            InputError: if hardly any window has enough scored bases.
        """
        if index < 0:
            raise ValueError(f"the index of a sample is {index}, it must be 0 or more")
        count = len(self.windows)
        epoch, position = divmod(index, count)
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        number = shuffled_position(position, count, self.seed, epoch)
        for _ in range(_MOST_TRIES):
            on_other_strand = bool(random.random() < self.reverse_complement_probability)
            window = self._read(self.windows[number], on_other_strand)
            if self._is_usable(window):
                return window
            number = int(random.integers(count))
        raise InputError(
            f"hardly any {self.split} window of {self.length} bp in {self.reference.path} has enough scored bases "
            f"({_MOST_TRIES} were tried): the intervals are in gaps, or --length or the letter policy is unsuitable."
        )

    def sample_batch(self, index_start: int, count: int) -> tuple[Tokens, npt.NDArray[np.bool_]]:
        """Return windows `index_start` to `index_start + count - 1`: tokens and scored, both (count, length)."""
        tokens = np.empty((count, self.length), dtype=np.uint8)
        scored = np.empty((count, self.length), dtype=np.bool_)
        for row in range(count):
            tokens[row], scored[row], _, _ = self.sample(index_start + row)
        return tokens, scored

    def evaluation(self, at_most: int | None = None) -> Iterator[PretrainingWindow]:
        """Yield windows for evaluation on the forward strand, skipping those without enough scored bases.

        They are in the order of the intervals; with `at_most`, that many windows spread over all, independent of the
        seed.
        """
        count = len(self.windows)
        wanted = count if at_most is None else min(at_most, count)
        used = 0
        for number in range(count) if wanted == count else _spread(count):
            if used == wanted:
                return
            window = self._read(self.windows[number], on_other_strand=False)
            if self._is_usable(window):
                used += 1
                yield window

    def _read(self, place: PlacedWindow, on_other_strand: bool) -> PretrainingWindow:
        letters = self.reference.letters(place.chromosome, place.start, place.end, pad=True)
        # Letters are complemented, not tokens, which no longer distinguish the ambiguity codes.
        tokens = self.policy.tokens(reverse_complement(letters) if on_other_strand else letters)
        return PretrainingWindow(tokens, self.policy.is_scored(tokens), place, on_other_strand)

    def _is_usable(self, window: PretrainingWindow) -> bool:
        scored = int(np.count_nonzero(window.scored))
        return scored > 0 and scored >= self.minimum_scored_fraction * self.length


def shuffled_position(position: int, count: int, seed: int, epoch: int) -> int:
    """Return the item at `position` in an epoch's order of `count` items: a permutation that needs no memory.

    A Feistel network permutes the numbers of the next even power of two, and is walked until it lands below `count`
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: cycle walking).
    """
    if not 0 <= position < count:
        raise ValueError(f"position {position} is not among {count}")
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    keys = [_mix(_mix(seed) ^ _mix((epoch << 8) + number + 1)) for number in range(_MIXING_ROUNDS)]
    while True:
        left, right = position >> half_bits, position & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        position = left << half_bits | right
        if position < count:
            return position


def _mix(word: int) -> int:
    """Mix 64 bits with the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    word = (word + 0x9E3779B97F4A7C15) % _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % _WORD
    return word ^ word >> 31


def _spread(count: int) -> Iterator[int]:
    """Yield all numbers below `count` in an order of which any prefix is spread over the range."""
    for number in range(count):
        yield shuffled_position(number, count, seed=0, epoch=0)
