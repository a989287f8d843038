"""Windows of genomes: an endless random stream for training, fixed ones for evaluation.

A training window is a function of (seed, index), so there is no sampler state to save: resuming is starting at an
index, and workers and ranks take indices.
"""

from collections import Counter
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
"""Windows with a larger share of N and other ambiguity codes are not used: gaps reveal the assembly."""

_MOST_TRIES: Final = 1000
_GAPLESS_TRIES: Final = 64
"""Attempts to find a training window without unknown bases before a few are accepted: if only one class's assembly has
gaps, even short ones would reveal it."""

_STRANDS: Final[tuple[Strand, Strand]] = ("+", "-")


class WindowSampler:
    """Samples training windows: class, sequence, start and strand are each uniform.

    Windows with unknown bases are resampled within their class, so classes stay balanced. Only if gapless windows are
    hard to find is a share of unknown bases up to `maximum_unknown_fraction` accepted.

    With `by_length` sequences are sampled in proportion to their length, so that a plasmid is not over-represented, and
    sequences shorter than a window are concatenated to windows, in random order.
    """

    def __init__(
        self,
        collection: GenomeCollection,
        length: int,
        seed: int,
        maximum_unknown_fraction: float = MAXIMUM_UNKNOWN_FRACTION,
        by_length: bool = False,
    ) -> None:
        """Prepare sampling of windows of `length` bp.

        Raises:
            InputError: if a class has no sequence of at least `length` bp, or with `by_length` no bases.
        """
        _require_positive(length)
        if not 0 <= seed < 2**64:
            raise InputError(f"the seed is {seed}: use an integer from 0 to 2^64 - 1.")
        self.class_names = collection.class_names
        self.length = length
        self.seed = seed
        self.maximum_unknown_fraction = maximum_unknown_fraction
        self.short_sequences = [sequence for sequence in collection.sequences if sequence.length < length]
        """Sequences shorter than a window, which are never sampled, or only concatenated with others."""
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
                    else f"class '{class_name}' has no training bases: give it sequences of {length} bp or more."
                )

    def sample(self, index: int) -> tuple[Tokens, int]:
        """Return window `index`, a function of (seed, index) only: tokens of shape (length,), and its label.

        Raises:
            InputError: if hardly any window of the class has few enough unknown bases.
        """
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        label = int(random.integers(len(self._sequences)))
        for attempt in range(_MOST_TRIES):
            tokens = self._tokens_by_length(label, random) if self.by_length else self._tokens(label, random)
            strand = _STRANDS[random.integers(2)]
            if _is_known(tokens, 0.0 if attempt < _GAPLESS_TRIES else self.maximum_unknown_fraction):
                return _on_strand(tokens, strand), label
        raise InputError(
            f"class '{self.class_names[label]}' has hardly any window of {self.length} bp with at most "
            f"{self.maximum_unknown_fraction:.0%} unknown bases ({_MOST_TRIES} were tried): use a shorter --length or "
            "an assembly with fewer gaps."
        )

    def _tokens(self, label: int, random: np.random.Generator) -> Tokens:
        """Sample a window of a uniformly chosen sequence."""
        sequences = self._sequences[label]
        sequence = sequences[random.integers(len(sequences))]
        start = int(random.integers(sequence.length - self.length + 1))
        return sequence.tokens(start, start + self.length)

    def _tokens_by_length(self, label: int, random: np.random.Generator) -> Tokens:
        """Sample a window at a uniformly chosen base, or short sequences concatenated."""
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
    """The evaluation windows of one length, class by class.

    - `independent_per_class`: number of non-overlapping windows of each class, the sample size for confidence
      intervals. Windows found to have too many unknown bases are not counted; windows beyond the requested number are
      not examined.
    - `missing_classes`: classes without windows, for lack of a long enough sequence of known bases.
    """

    length: int
    windows: tuple[EvaluationWindow, ...]
    independent_per_class: dict[str, int]
    missing_classes: tuple[str, ...]

    @property
    def independent(self) -> int:
        """How many of the windows do not overlap: what an accuracy rests on."""
        chosen = Counter(window.sequence.class_name for window in self.windows)
        return sum(min(chosen[name], count) for name, count in self.independent_per_class.items())


def evaluation_windows(
    collection: GenomeCollection,
    length: int,
    per_class: int,
    seed: int,
    maximum_unknown_fraction: float = MAXIMUM_UNKNOWN_FRACTION,
) -> EvaluationWindows:
    """Choose up to `per_class` windows of `length` bp from every class, the same ones for the same seed.

    They are spread over the sequences in proportion to their lengths. Non-overlapping windows are used first, then
    windows at other random starts; no two windows of a class are identical. Strands alternate. A class has fewer than
    `per_class` windows only if (practically) no more exist.
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
        # Gaps may affect every tile and still leave space for a window that straddles tiles.
        independent[class_name] = max(len(places) - unsuitable, min(len(chosen), 1))
        windows += [
            EvaluationWindow(label, sequences[which], start, length, _STRANDS[number % 2])
            for number, (which, start) in enumerate(chosen)
        ]
    covered = {window.label for window in windows}
    missing = tuple(name for label, name in enumerate(collection.class_names) if label not in covered)
    return EvaluationWindows(length, tuple(windows), independent, missing)


def _spread_tiles(sequences: list[GenomeSequence], length: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Cut sequences into non-overlapping windows, as (position in `sequences`, start), in an order that spreads them.

    Any prefix of the list has windows of each sequence in proportion to its number, at random positions.
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
    """Yield (position in `sequences`, start) without end, every start of every sequence equally likely."""
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
