"""Choice of held-out stretches of the genomes, and of homologous stretches that are excluded from training.

A classifier is calibrated, and its parts are weighted, on sequence that none of them was trained on. If sequence names
(or groups) tell which sequences of the classes are homologous, whole sequences are held out together. Otherwise a share
of every class is held out in stretches, at the same relative position in every class, so that syntenic loci stay
together. In both cases bins of the training sequence that share rare words of 20 bases with held-out sequence are
identified: these homologues are held out as well while a class has few held-out bases, and excluded from training
otherwise. Without that, a held-out stretch of one class would resemble the class whose homologue was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from genomamba.baselines.words import BASES, FIRST_BASE_TOKEN
from genomamba.data.genomes import GenomeCollection, GenomeSequence, SequenceStore
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError

DEFAULT_FRACTION: Final = 0.1
LARGEST_FRACTION: Final = 0.5
LONGEST_BIN_BP: Final = 16_384
SHORTEST_BIN_BP: Final = 1024
BINS_PER_HOLDOUT: Final = 8
"""A class's share is held out in at least this many bins, as far as bins of `SHORTEST_BIN_BP` allow."""
GAP_BP: Final = 4096
"""Bases on either side of a held-out stretch that are not trained on."""
WORD_LENGTH: Final = 20
WORDS_SAMPLED: Final = 16
"""One word in so many is sampled, by its hash, so that the same words are sampled in homologues."""
FEWEST_SHARED_WORDS: Final = 3
SHARED_FRACTION: Final = 0.03
"""Bins that share more of their rare words than this are considered homologous. Repeats do not count: a word that
occurs twice in a class is not rare."""
FEWEST_SHARED_NAMES: Final = 4
SHARED_NAMES_FRACTION: Final = 0.8
FOLD_COVERAGE: Final = 0.75
MOST_HELD_OUT: Final = 1.5
"""Homologues of a held-out stretch are held out until a class reaches this multiple of its share."""

TRAINING, HELD_OUT, LEFT_OUT = 0, 1, 2
Status = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]
_HASH_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)


class Interval(NamedTuple):
    """Bases [start, end) of a sequence, given by its position in a collection."""

    sequence: int
    start: int
    end: int


@dataclass(frozen=True)
class OffsetStore:
    """Bases of a sequence from `offset` on."""

    store: SequenceStore
    name: str
    offset: int

    def fetch(self, name: str, start: int, end: int) -> Tokens:
        """Return the tokens of bases [start, end) from the offset on."""
        del name
        return self.store.fetch(self.name, self.offset + start, self.offset + end)


def cut(sequence: GenomeSequence, start: int, end: int) -> GenomeSequence:
    """Cut bases [start, end) out of a sequence, named NAME:START-END (1-based, as in samtools) unless it is whole."""
    if (start, end) == (0, sequence.length):
        return sequence
    name = f"{sequence.name}:{start + 1}-{end}"
    return GenomeSequence(
        sequence.class_name, sequence.path, name, end - start, OffsetStore(sequence.store, sequence.name, start)
    )


@dataclass(frozen=True)
class HoldoutPlan:
    """Training and held-out sequences; both collections keep the class names.

    Attributes:
        training, held_out: the sequences, whole or cut.
        summary: summary in one line for the user.
        stretches: JSON-serialisable: for both parts the (class, path, name, length, start, end) of every stretch, with
            the name and length of the whole sequence.
    """

    training: GenomeCollection
    held_out: GenomeCollection
    summary: str
    stretches: dict[str, list[list[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class GenomeBins:
    """The sequences of a collection, cut into bins, and the rare words that bins share.

    Attributes:
        collection: the collection; its sequences are not copied.
        bin_bp: length of a bin; the last one of a sequence may be shorter.
    """

    collection: GenomeCollection
    bin_bp: int

    @classmethod
    def of(cls, collection: GenomeCollection, fraction: float) -> GenomeBins:
        """Create bins that are short enough to hold out `fraction` of the smallest class."""
        smallest = min(
            sum(sequence.length for sequence in collection.sequences_of(name)) for name in collection.class_names
        )
        wanted = int(smallest * fraction / BINS_PER_HOLDOUT)
        return cls(collection, int(np.clip(wanted, SHORTEST_BIN_BP, LONGEST_BIN_BP)))

    @cached_property
    def sequence_of(self) -> npt.NDArray[np.int64]:
        """(bins,) position of each bin's sequence in the collection; bins are in sequence order."""
        counts = [-(-sequence.length // self.bin_bp) for sequence in self.collection.sequences]
        return np.repeat(np.arange(len(counts)), counts)

    @cached_property
    def start_of(self) -> npt.NDArray[np.int64]:
        """(bins,) first base of each bin."""
        first = np.searchsorted(self.sequence_of, self.sequence_of, side="left")
        return (np.arange(len(self.sequence_of)) - first) * self.bin_bp

    @cached_property
    def bases_of(self) -> npt.NDArray[np.int64]:
        """(bins,) length of each bin."""
        lengths = np.array([sequence.length for sequence in self.collection.sequences], dtype=np.int64)
        return np.minimum(self.bin_bp, lengths[self.sequence_of] - self.start_of)

    @cached_property
    def label_of(self) -> npt.NDArray[np.int64]:
        """(bins,) class of each bin."""
        labels = {name: label for label, name in enumerate(self.collection.class_names)}
        of_sequence = np.array([labels[sequence.class_name] for sequence in self.collection.sequences], dtype=np.int64)
        return of_sequence[self.sequence_of]

    @cached_property
    def place_of(self) -> npt.NDArray[np.float64]:
        """(bins,) relative position (0 to 1) of each bin's middle in the concatenated sequences of its class."""
        places = np.zeros(len(self.sequence_of))
        for label in range(len(self.collection.class_names)):
            chosen = self.label_of == label
            bases = self.bases_of[chosen]
            if len(bases):
                places[chosen] = (np.cumsum(bases) - bases / 2) / bases.sum()
        return places

    @cached_property
    def _rare_words(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return sampled words that occur once in their class, as ascending numbers from 0, and their bins."""
        words, bins = [], []
        for number, sequence in enumerate(self.collection.sequences):
            first = int(np.searchsorted(self.sequence_of, number))
            # In pieces, to bound the memory; they overlap, so that no word is missed.
            piece_bp = 64 * self.bin_bp
            for start in range(0, sequence.length, piece_bp):
                tokens = sequence.tokens(start, min(sequence.length, start + piece_bp + WORD_LENGTH - 1))
                sampled, positions = _sampled_words(tokens)
                words.append(sampled)
                bins.append(first + (start + positions) // self.bin_bp)
        word, place = np.concatenate(words), np.concatenate(bins)
        label = self.label_of[place]
        order = np.lexsort((label, word))
        word, place, label = word[order], place[order], label[order]
        alike = (word[1:] == word[:-1]) & (label[1:] == label[:-1])
        rare = np.ones(len(word), dtype=bool)
        rare[1:] &= ~alike
        rare[:-1] &= ~alike
        word, place = word[rare], place[rare]
        numbers = np.cumsum(word[1:] != word[:-1], dtype=np.int32)
        return np.concatenate([np.zeros(min(1, len(word)), dtype=np.int32), numbers]), place.astype(np.int32)

    def homologues(self, chosen: Mask) -> Mask:
        """Return which of the other bins (bins,) share rare words with the chosen ones."""
        words, bins = self._rare_words
        inside = chosen[bins]
        # By number instead of by search: with a hundred genomes there are tens of millions.
        is_inside = np.zeros(int(words[-1]) + 1 if len(words) else 0, dtype=bool)
        is_inside[words[inside]] = True
        shared = is_inside[words] & ~inside
        hits = np.bincount(bins[shared], minlength=len(chosen))
        rare = np.bincount(bins, minlength=len(chosen))
        return (hits >= FEWEST_SHARED_WORDS) & (hits > SHARED_FRACTION * rare) & ~chosen

    def intervals(self, chosen: Mask, gap_beside: Mask | None = None) -> list[Interval]:
        """Merge adjacent chosen bins to intervals, shortened by `GAP_BP` where they touch a bin of `gap_beside`."""
        found: list[Interval] = []
        gap = min(GAP_BP, self.bin_bp // 4)
        places = np.flatnonzero(chosen)
        runs = np.split(places, np.flatnonzero((np.diff(places) > 1) | (np.diff(self.sequence_of[places]) > 0)) + 1)
        for run in runs:
            if not len(run):
                continue
            first, last = int(run[0]), int(run[-1])
            start, end = int(self.start_of[first]), int(self.start_of[last] + self.bases_of[last])
            if gap_beside is not None:
                start += gap * self._is_beside(gap_beside, first, first - 1)
                end -= gap * self._is_beside(gap_beside, last, last + 1)
            if end > start:
                found.append(Interval(int(self.sequence_of[first]), start, end))
        return found

    def _is_beside(self, chosen: Mask, bin_number: int, neighbour: int) -> bool:
        inside = 0 <= neighbour < len(chosen)
        return bool(inside and chosen[neighbour] and self.sequence_of[neighbour] == self.sequence_of[bin_number])

    def part(self, intervals: Sequence[Interval]) -> GenomeCollection:
        """Return the intervals as a collection of sequences."""
        sequences = [cut(self.collection.sequences[place], start, end) for place, start, end in intervals]
        return GenomeCollection(self.collection.class_names, tuple(sequences))

    def describe(self, intervals: Sequence[Interval]) -> list[list[Any]]:
        """Return a JSON-serialisable list of the intervals."""
        found = []
        for place, start, end in intervals:
            sequence = self.collection.sequences[place]
            found.append([sequence.class_name, sequence.path, sequence.name, sequence.length, start, end])
        return found


def homology_groups(collection: GenomeCollection, groups: Mapping[str, str] | None = None) -> list[str] | None:
    """Return the homology group of every sequence if names (or given groups) tell which are homologous, else None.

    Names do if at least `FEWEST_SHARED_NAMES` of them occur in all classes and cover 80 % of each class.
    """
    names = [(groups or {}).get(sequence.name, sequence.name) for sequence in collection.sequences]
    bases: dict[str, dict[str, int]] = {name: {} for name in collection.class_names}
    for sequence, name in zip(collection.sequences, names, strict=True):
        of_class = bases[sequence.class_name]
        of_class[name] = of_class.get(name, 0) + sequence.length
    shared = set.intersection(*(set(of_class) for of_class in bases.values()))
    covered = all(
        sum(count for name, count in of_class.items() if name in shared)
        >= SHARED_NAMES_FRACTION * sum(of_class.values())
        for of_class in bases.values()
    )
    return names if covered and len(shared) >= FEWEST_SHARED_NAMES else None


def plan_holdouts(
    collection: GenomeCollection, fraction: float, seed: int, groups: Mapping[str, str] | None = None
) -> HoldoutPlan:
    """Choose the sequence that is held out of training.

    Args:
        collection: all sequences.
        fraction: share of each class's bases to hold out, 0 to 0.5.
        seed: seed for choosing the position.
        groups: homology group by sequence name; by default the names themselves.

    Raises:
        InputError: if the fraction is out of range, or a class is too small to hold anything out.
    """
    if not 0 <= fraction <= LARGEST_FRACTION:
        raise InputError(f"--holdout-fraction is {fraction}: give a share from 0 to {LARGEST_FRACTION}.")
    if fraction == 0:
        nothing = GenomeCollection(collection.class_names, ())
        return HoldoutPlan(collection, nothing, "nothing is held out, so probabilities are not calibrated")
    bins = GenomeBins.of(collection, fraction)
    random = np.random.default_rng([seed, 20])
    names = homology_groups(collection, groups)
    status = np.zeros(len(bins.sequence_of), dtype=np.int8)
    if names is not None:
        chosen = _choose_names(bins, names, fraction, random)
        status[np.isin(np.array(names)[bins.sequence_of], list(chosen))] = HELD_OUT
        _leave_out_homologues(bins, status, fraction, may_hold_out=False)
        how = f"whole sequences of the same name ({', '.join(sorted(chosen))})"
    else:
        status = _choose_stretches(bins, fraction, float(random.random()))
        how = "stretches, with homologous ones of other classes"
    held = bins.intervals(status == HELD_OUT)
    training = bins.intervals(status == TRAINING, status == HELD_OUT)
    plan_training, plan_held = bins.part(training), bins.part(held)
    _require_every_class(plan_training, plan_held)
    return HoldoutPlan(
        plan_training,
        plan_held,
        _summary(collection, plan_training, plan_held, how),
        {"training": bins.describe(training), "held_out": bins.describe(held)},
    )


def is_large_enough(collection: GenomeCollection, fraction: float) -> bool:
    """Whether every class is large enough to hold out `fraction` in at least one bin and keep most for training."""
    return all(
        fraction * sum(sequence.length for sequence in collection.sequences_of(name)) >= SHORTEST_BIN_BP
        for name in collection.class_names
    )


def fold_parts(
    collection: GenomeCollection, folds: int, groups: Mapping[str, str] | None = None, first: int | None = None
) -> Iterator[tuple[GenomeCollection, GenomeCollection]]:
    """Return (training, test) for each fold, with homologues of the test sequence excluded from training.

    If names (or groups) identify homologues, each name is tested once. Otherwise each fold tests stretches at a
    different position, chosen as in `plan_holdouts`, three quarters of every class in total: with adjoining folds, most
    of a rearranged genome would be excluded from training.

    Args:
        collection: what is cut.
        folds: how many there are.
        groups: homology group by sequence name; None goes by the names themselves.
        first: only so many of them.
    """
    bins = GenomeBins.of(collection, FOLD_COVERAGE / folds)
    names = homology_groups(collection, groups)
    for fold in range(folds if first is None else min(first, folds)):
        if names is not None and len(set(names)) >= folds:
            tested = (_balanced_folds(bins, names, folds) == fold)[bins.sequence_of]
            status = np.where(tested, HELD_OUT, TRAINING).astype(np.int8)
            _leave_out_homologues(bins, status, 1 / folds, may_hold_out=False)
        else:
            status = _choose_stretches(bins, FOLD_COVERAGE / folds, fold / folds)
        held = status == HELD_OUT
        yield bins.part(bins.intervals(status == TRAINING, held)), bins.part(bins.intervals(held))


class _Words(NamedTuple):
    """The words of one length that begin at each position, and their reverse complements, encoded as numbers."""

    length: int
    forward: npt.NDArray[np.uint64]
    complement: npt.NDArray[np.uint64]

    def joined(self, following: _Words) -> _Words:
        """Concatenate words with those that follow them."""
        count = len(following.forward) - self.length
        own, other = np.uint64(2 * self.length), np.uint64(2 * following.length)
        return _Words(
            self.length + following.length,
            (self.forward[:count] << other) | following.forward[self.length :],
            (following.complement[self.length :] << own) | self.complement[:count],
        )


def _sampled_words(tokens: Tokens) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Return strand-neutral hashes of a sample of the words, and their positions."""
    count = len(tokens) - WORD_LENGTH + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    bases = tokens - np.uint8(FIRST_BASE_TOKEN)  # wraps around: anything but a base becomes 4 or more
    known = bases < BASES
    single = _Words(1, (bases & 3).astype(np.uint64), (3 - (bases & 3)).astype(np.uint64))
    four = single.joined(single).joined(single.joined(single))
    sixteen = four.joined(four).joined(four.joined(four))
    forward, complement = sixteen.joined(four)[1:]
    is_known = np.convolve(~known, np.ones(WORD_LENGTH, dtype=np.int64), mode="valid") == 0
    hashes = np.minimum(forward, complement) * _HASH_FACTOR
    hashes ^= hashes >> np.uint64(29)
    chosen = np.flatnonzero(is_known & (hashes % np.uint64(WORDS_SAMPLED) == 0))
    return hashes[chosen], chosen


def _choose_names(bins: GenomeBins, names: Sequence[str], fraction: float, random: np.random.Generator) -> set[str]:
    """Choose names with about `fraction` of the bases of the classes, in random order."""
    labels = {name: label for label, name in enumerate(bins.collection.class_names)}
    bases = np.zeros((len(labels), len(set(names))))
    ordered = sorted(set(names))
    for sequence, name in zip(bins.collection.sequences, names, strict=True):
        bases[labels[sequence.class_name], ordered.index(name)] += sequence.length
    shares = bases / bases.sum(axis=1, keepdims=True)
    everywhere = np.flatnonzero((shares > 0).all(axis=0))
    chosen: list[int] = []
    mean = 0.0
    for number in random.permutation(everywhere):
        share = float(shares[:, number].mean())
        if mean + share <= MOST_HELD_OUT * fraction:
            chosen.append(int(number))
            mean += share
        if mean >= 0.8 * fraction:
            break
    if not chosen:
        chosen = [int(everywhere[shares[:, everywhere].mean(axis=0).argmin()])]
    return {ordered[number] for number in chosen}


def _choose_stretches(bins: GenomeBins, fraction: float, place: float) -> Status:
    """Hold out `fraction` of every class from a relative position on, with the homologues in the other classes."""
    status = np.zeros(len(bins.sequence_of), dtype=np.int8)
    for label in range(len(bins.collection.class_names)):
        of_class = np.flatnonzero(bins.label_of == label)
        wanted = fraction * bins.bases_of[of_class].sum()
        # From that position on, wrapping around at the end of the class.
        order = of_class[np.argsort((bins.place_of[of_class] - place) % 1.0, kind="stable")]
        order = order[status[order] == TRAINING]
        left = wanted - bins.bases_of[of_class[status[of_class] == HELD_OUT]].sum()
        count = int(np.searchsorted(np.cumsum(bins.bases_of[order]), left))
        if left > 0:
            status[order[: max(1, count)]] = HELD_OUT
        _leave_out_homologues(bins, status, fraction, may_hold_out=True)
    return status


def _leave_out_homologues(bins: GenomeBins, status: Status, fraction: float, *, may_hold_out: bool) -> None:
    """Hold out, or exclude from training, the bins that resemble held-out ones; changes `status`."""
    homologous = bins.homologues(status == HELD_OUT) & (status == TRAINING)
    for label in range(len(bins.collection.class_names)):
        of_class = bins.label_of == label
        candidates = of_class & homologous
        most = MOST_HELD_OUT * fraction * bins.bases_of[of_class].sum()
        held = bins.bases_of[of_class & (status == HELD_OUT)].sum() + bins.bases_of[candidates].sum()
        status[candidates] = HELD_OUT if may_hold_out and held <= most else LEFT_OUT


def _balanced_folds(bins: GenomeBins, names: Sequence[str], folds: int) -> npt.NDArray[np.int64]:
    """Return the fold of each sequence (sequences,): largest group first, each into the smallest fold."""
    bases: dict[str, int] = {}
    for sequence, name in zip(bins.collection.sequences, names, strict=True):
        bases[name] = bases.get(name, 0) + sequence.length
    sizes, fold_of_name = [0] * folds, {}
    for name in sorted(bases, key=lambda name: (-bases[name], name)):
        fold_of_name[name] = sizes.index(min(sizes))
        sizes[fold_of_name[name]] += bases[name]
    return np.array([fold_of_name[name] for name in names], dtype=np.int64)


def _require_every_class(training: GenomeCollection, held_out: GenomeCollection) -> None:
    for name in training.class_names:
        if not training.sequences_of(name) or not held_out.sequences_of(name):
            raise InputError(
                f"class '{name}' is too small, or too similar to the others, to hold out a share of it: give it more "
                "sequence, name --holdout sequences, or use --holdout-fraction 0."
            )


def _summary(whole: GenomeCollection, training: GenomeCollection, held_out: GenomeCollection, how: str) -> str:
    bases, trained, held = (sum(sequence.length for sequence in part.sequences) for part in (whole, training, held_out))
    return (
        f"held out {held:,} bp ({held / bases:.1%}) as {how}; {bases - trained - held:,} bp beside them or "
        f"homologous to them are left out, {trained:,} bp are trained on"
    )
