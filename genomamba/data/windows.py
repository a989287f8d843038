"""Windows of genomes: endless random ones to train on, fixed ones to evaluate on.

A training window is a function of (seed, index), so there is no sampler state to save: resuming is starting at an
index, and workers and ranks take indices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from genomamba.data.genomes import GenomeCollection, GenomeSequence
from genomamba.tokenizer import ANY_BASE_TOKEN, COMPLEMENT_IDS, UNKNOWN_TOKEN, Tokens
from mambacore.errors import InputError

Strand = Literal["+", "-"]

MAXIMUM_UNKNOWN_FRACTION: Final = 0.01
"""Windows with a larger share of N and other ambiguity codes are not used: gaps give the assembly away."""

_MOST_TRIES: Final = 1000
_GAPLESS_TRIES: Final = 64
"""So many times a training window without any unknown base is sought before a few are put up with: when only one
class's assembly has gaps, even short ones would give it away."""

_STRANDS: Final[tuple[Strand, Strand]] = ("+", "-")


class WindowSampler:
    """Draws training windows: uniform class, uniform sequence, uniform start, random strand.

    Windows with unknown bases are sampled again within their class, so classes stay balanced. Only where gapless
    ones are hard to find is a share of `maximum_unknown_fraction` accepted.

    With `by_length` every base of a class is equally likely instead of every sequence, so that a plasmid weighs no more
    than its length; and sequences shorter than a window are joined to windows, in random order.
    """

    def __init__(
        self,
        collection: GenomeCollection,
        length: int,
        seed: int,
        maximum_unknown_fraction: float = MAXIMUM_UNKNOWN_FRACTION,
        by_length: bool = False,
    ) -> None:
        """Prepare to draw windows of `length` bp.

        Raises:
            InputError: when a class has no sequence of at least `length` bp, or with `by_length` no bases.
        """
        _require_positive(length)
        if not 0 <= seed < 2**64:
            raise InputError(f"the seed is {seed}: use an integer from 0 to 2^64 - 1.")
        self.class_names = collection.class_names
        self.length = length
        self.seed = seed
        self.maximum_unknown_fraction = maximum_unknown_fraction
        self.short_sequences = [sequence for sequence in collection.sequences if sequence.length < length]
        """Sequences that are shorter than a window and therefore never seen, or only joined to others."""
        self.by_length = by_length
        joinable = [sequence for sequence in self.short_sequences if sequence.length and by_length]
        self._short = [
            [sequence for sequence in joinable if sequence.class_name == name] for name in collection.class_names
        ]
        self._sequences = [_long_sequences(collection, class_name, length) for class_name in collection.class_names]
        for class_name, sequences in zip(collection.class_names, self._sequences, strict=True):
            if not sequences and not self._short[collection.class_names.index(class_name)]:
                longest = max((sequence.length for sequence in collection.sequences_of(class_name)), default=0)
                raise InputError(
                    f"class '{class_name}' has no training sequence of {length} bp, its longest has {longest}: "
                    f"use --length {longest} or less."
                    if longest
                    else f"class '{class_name}' has no bases to train on: give it sequences of {length} bp or more."
                )

    def sample(self, index: int) -> tuple[Tokens, int]:
        """Return window number `index`: tokens of shape (length,), and its label. Depends on (seed, index) only.

        Raises:
            InputError: when practically no window of the class has few enough unknown bases.
        """
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        label = int(random.integers(len(self._sequences)))
        for attempt in range(_MOST_TRIES):
            tokens = self._tokens_by_length(label, random) if self.by_length else self._tokens(label, random)
            strand = _STRANDS[random.integers(2)]
            if _is_known(tokens, 0.0 if attempt < _GAPLESS_TRIES else self.maximum_unknown_fraction):
                return _on_strand(tokens, strand), label
        raise InputError(
            f"class '{self.class_names[label]}' has practically no window of {self.length} bp with at most "
            f"{self.maximum_unknown_fraction:.0%} unknown bases ({_MOST_TRIES} were tried): use a shorter --length or "
            "an assembly with fewer gaps."
        )

    def _tokens(self, label: int, random: np.random.Generator) -> Tokens:
        """A window of a uniformly chosen sequence."""
        sequences = self._sequences[label]
        sequence = sequences[random.integers(len(sequences))]
        start = int(random.integers(sequence.length - self.length + 1))
        return sequence.tokens(start, start + self.length)

    def _tokens_by_length(self, label: int, random: np.random.Generator) -> Tokens:
        """A window at a uniformly chosen base, or short sequences joined as often as they have bases."""
        long, short = self._sequences[label], self._short[label]
        short_bases = sum(sequence.length for sequence in short)
        if short and random.random() * (short_bases + sum(sequence.length for sequence in long)) < short_bases:
            parts: list[Tokens] = []
            while sum(map(len, parts)) < self.length:
                sequence = short[random.integers(len(short))]
                tokens = sequence.tokens(0, sequence.length)
                parts.append(tokens if random.integers(2) else COMPLEMENT_IDS[tokens[::-1]])
            return np.concatenate(parts)[: self.length]
        starts = np.cumsum([sequence.length - self.length + 1 for sequence in long])
        place = int(random.integers(starts[-1]))
        which = int(np.searchsorted(starts, place, side="right"))
        start = place - (int(starts[which - 1]) if which else 0)
        return long[which].tokens(start, start + self.length)

    def sample_batch(self, index_start: int, count: int) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Return windows `index_start` to `index_start + count - 1`: tokens (count, length), labels (count,)."""
        tokens = np.empty((count, self.length), dtype=np.uint8)
        labels = np.empty(count, dtype=np.int64)
        for row in range(count):
            tokens[row], labels[row] = self.sample(index_start + row)
        return tokens, labels


@dataclass(frozen=True)
class EvaluationWindow:
    """A fixed window: bases [start, start + length) of `sequence`, read on `strand`; the label is its class."""

    label: int
    sequence: GenomeSequence
    start: int
    length: int
    strand: Strand

    def tokens(self) -> Tokens:
        """Fetch the window's tokens, uint8 of shape (length,)."""
        return _on_strand(self.sequence.tokens(self.start, self.start + self.length), self.strand)


@dataclass(frozen=True)
class EvaluationWindows:
    """The windows of one length to evaluate on, class after class.

    - `independent_per_class`: how many windows that do not overlap the material of each class holds, which is what a
      confidence interval may count. Those that were found to have too many unknown bases are not counted; where more
      exist than were asked for, the rest is not looked at.
    - `missing_classes`: classes that have no windows here, for want of a long enough sequence of known bases.
    """

    length: int
    windows: tuple[EvaluationWindow, ...]
    independent_per_class: dict[str, int]
    missing_classes: tuple[str, ...]


def evaluation_windows(
    collection: GenomeCollection,
    length: int,
    per_class: int,
    seed: int,
    maximum_unknown_fraction: float = MAXIMUM_UNKNOWN_FRACTION,
) -> EvaluationWindows:
    """Choose up to `per_class` windows of `length` bp from every class, the same ones for the same seed.

    They are spread over the sequences in proportion to their lengths. They do not overlap while the material lasts;
    then come windows at random other starts; no two windows of a class are the same. Strands alternate. A class gets
    fewer than `per_class` only when (practically) it has no more.
    """
    _require_positive(length)
    windows: list[EvaluationWindow] = []
    independent: dict[str, int] = {}
    for label, class_name in enumerate(collection.class_names):
        sequences = _long_sequences(collection, class_name, length)
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, length, label])))
        places = _spread_tiles(sequences, length, random)
        chosen: dict[tuple[int, int], None] = {}
        unsuitable = 0
        for which, start in places:
            if len(chosen) == per_class:
                break
            if _is_known(sequences[which].tokens(start, start + length), maximum_unknown_fraction):
                chosen[which, start] = None
            else:
                unsuitable += 1
        if sequences:
            for which, start in _random_places(sequences, length, random, tries=_MOST_TRIES + 2 * per_class):
                if len(chosen) == per_class:
                    break
                is_new = (which, start) not in chosen
                if is_new and _is_known(sequences[which].tokens(start, start + length), maximum_unknown_fraction):
                    chosen[which, start] = None
        # Gaps may spoil every tile and still leave room for a window between the tiles' borders.
        independent[class_name] = max(len(places) - unsuitable, min(len(chosen), 1))
        windows += [
            EvaluationWindow(label, sequences[which], start, length, _STRANDS[number % 2])
            for number, (which, start) in enumerate(chosen)
        ]
    covered = {window.label for window in windows}
    missing = tuple(name for label, name in enumerate(collection.class_names) if label not in covered)
    return EvaluationWindows(length, tuple(windows), independent, missing)


def _spread_tiles(sequences: list[GenomeSequence], length: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Cut sequences into windows that do not overlap, as (position in `sequences`, start), in an order that spreads.

    Any first part of the list takes from each sequence in proportion to its number of windows, at random places of it.
    """
    ranked: list[tuple[float, int, int]] = []
    for which, sequence in enumerate(sequences):
        count = sequence.length // length
        offset = int(random.integers(sequence.length - count * length + 1))
        ranks = (random.permutation(count) + random.random()) / count
        ranked += [(float(rank), which, offset + tile * length) for tile, rank in enumerate(ranks)]
    return [(which, start) for _, which, start in sorted(ranked)]


def _random_places(
    sequences: list[GenomeSequence], length: int, random: np.random.Generator, tries: int
) -> Iterator[tuple[int, int]]:
    """Yield (position in `sequences`, start), every start of every sequence equally likely."""
    starts = np.cumsum([sequence.length - length + 1 for sequence in sequences])
    for _ in range(tries):
        place = int(random.integers(starts[-1]))
        which = int(np.searchsorted(starts, place, side="right"))
        yield which, int(starts[which]) - 1 - place


def _long_sequences(collection: GenomeCollection, class_name: str, length: int) -> list[GenomeSequence]:
    return [sequence for sequence in collection.sequences_of(class_name) if sequence.length >= length]


def _is_known(tokens: Tokens, maximum_unknown_fraction: float) -> bool:
    unknown = np.count_nonzero(tokens == ANY_BASE_TOKEN) + np.count_nonzero(tokens == UNKNOWN_TOKEN)
    return bool(unknown / len(tokens) <= maximum_unknown_fraction)


def _on_strand(tokens: Tokens, strand: Strand) -> Tokens:
    return tokens if strand == "+" else COMPLEMENT_IDS[tokens[::-1]]


def _require_positive(length: int) -> None:
    if length < 1:
        raise InputError(f"the window length is {length} bp: use 1 or more.")
