"""Long words that a record shares with the training genomes: does a class hold this stretch of sequence already?

A strain of a known species shares most words of 21 bases with that species' training genome and few with its relatives.
Word counts of order 10 see little of that, and nothing that is cross-validated over loci can: a locus held out shares
hardly any long word with the rest of its genome. So long words have a rule of their own instead of fitted coefficients.

Of all words, the fraction whose hash is lowest is kept (FracMinHash: Irber et al. 2022, "Lightweight compositional
analysis of metagenomes with FracMinHash and minimum metagenome covers", bioRxiv 2022.01.11.475838), as in the sketches
of Mash (Ondov et al. 2016) and sourmash. A word with more copies in a class than the class has files is left out of all
classes: transposons, insertion sequences and ribosomal RNA say little about the species.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from genomamba.baselines.words import BASES, FIRST_BASE_TOKEN
from genomamba.classification.held_out import FloatArray, IntegerArray
from genomamba.data.genomes import GenomeCollection, GenomeSequence
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError

WORD_LENGTH: Final = 21
ONE_IN: Final = 64
"""Of so many words one is kept."""
MOST_WORDS: Final = 1 << 20
"""Of a class, about: with more bases, fewer words are kept."""
TENSOR_NAME: Final = "parts.words"
SIZES_NAME: Final = "parts.words.sizes"
SAMPLING_NAME: Final = "parts.words.sampling"
BASES_AT_A_TIME: Final = 1 << 20

CONFIDENCE: Final = 3.0
PSEUDOCOUNT: Final = 3.0
CHANCE_MATCHES: Final = 1.0
CHANCE_SHARE: Final = 0.05
"""One match, and this share of the words kept, say nothing about the class: old copies of a repeat share that many."""

Hashes = npt.NDArray[np.uint64]


def word_logits(matches: FloatArray, expected_words: FloatArray) -> FloatArray:
    """Return logits (windows, classes): 0 for the class with most matches, and less for every match that others lack.

    With n(c) the matches of class c and w the number of words kept from the window,

        logit(c) = -3 log(1 + max(0, max n - n(c) - 1 - 0.05 w) / 3)

    The logarithm keeps one stretch from another species (a phage, an island) from outvoting the rest of a record, and
    words that two classes share cancel.

    Args:
        matches: (windows, classes).
        expected_words: (windows,) words kept per window on average: its length over `LongWords.one_in`.
    """
    by_chance = CHANCE_MATCHES + CHANCE_SHARE * expected_words[:, None]
    lacking = matches.max(axis=1, keepdims=True) - matches - by_chance
    return -CONFIDENCE * np.log1p(np.maximum(lacking, 0.0) / PSEUDOCOUNT)


@dataclass(frozen=True)
class LongWords:
    """Fingerprints of the words kept from the training genomes.

    Attributes:
        fingerprints: (entries,) uint32, ascending; a word of several classes has an entry for each.
        owners: (entries,) class of each.
        class_count: number of classes.
        one_in: of so many words one is kept.
        word_length: bases.
    """

    fingerprints: npt.NDArray[np.uint32]
    owners: IntegerArray
    class_count: int
    one_in: int = ONE_IN
    word_length: int = WORD_LENGTH

    @classmethod
    def of_genomes(cls, training: GenomeCollection) -> LongWords:
        """Keep words of every class of the training sequences."""
        bases = [sum(s.length for s in training.sequences_of(name)) for name in training.class_names]
        one_in = max(ONE_IN, max(bases) // MOST_WORDS)
        single: list[Hashes] = []
        repeated: list[Hashes] = []
        for name in training.class_names:
            sequences = training.sequences_of(name)
            hashes, copies = np.unique(_hashes_of(sequences, one_in), return_counts=True)
            usual = copies <= len({sequence.path for sequence in sequences})
            single.append(hashes[usual])
            repeated.append(hashes[~usual])
        everywhere = np.concatenate(repeated)
        return cls.of_fingerprints([_fingerprints(np.setdiff1d(hashes, everywhere)) for hashes in single], one_in)

    @classmethod
    def of_fingerprints(
        cls, by_class: Iterable[npt.NDArray[np.uint32]], one_in: int, word_length: int = WORD_LENGTH
    ) -> LongWords:
        """Create from the fingerprints of each class."""
        each = [np.unique(fingerprints) for fingerprints in by_class]
        joined = np.concatenate(each)
        owners = np.repeat(np.arange(len(each)), [len(fingerprints) for fingerprints in each])
        order = np.argsort(joined, kind="stable")
        return cls(joined[order], owners[order], len(each), one_in, word_length)

    @property
    def history_bp(self) -> int:
        """Bases before a piece that its matches depend on."""
        return self.word_length - 1

    def block_matches(self, tokens: Tokens, block_bp: int, before: Tokens | None = None) -> FloatArray:
        """Count the words that end in whole blocks and are kept of each class, (blocks, classes).

        Args:
            tokens: (length,) token ids; an incomplete last block is ignored.
            block_bp: length of a block.
            before: preceding tokens, if any; `history_bp` of them suffice.
        """
        blocks = len(tokens) // block_bp
        counts = np.zeros((blocks, self.class_count))
        own = (
            np.zeros(0, dtype=np.uint8) if before is None else before[len(before) - min(len(before), self.history_bp) :]
        )
        joined = np.concatenate([own, tokens[: blocks * block_bp]])
        for start, hashes, places in _kept_words(joined, self.word_length, self.one_in):
            fingerprints = _fingerprints(hashes)
            first = np.searchsorted(self.fingerprints, fingerprints, side="left")
            entries = np.searchsorted(self.fingerprints, fingerprints, side="right") - first
            within = np.arange(entries.sum()) - np.repeat(np.cumsum(entries) - entries, entries)
            owners = self.owners[np.repeat(first, entries) + within]
            # A word belongs to the block in which it ends.
            ends = start + np.repeat(places, entries) + self.word_length - 1 - len(own)
            inside = ends >= 0
            np.add.at(counts, (ends[inside] // block_bp, owners[inside]), 1.0)
        return counts

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return tensors for a model folder: the fingerprints of one class after the other, and their numbers."""
        order = np.lexsort((self.fingerprints, self.owners))
        return {
            TENSOR_NAME: torch.from_numpy(self.fingerprints[order].view(np.int32).copy()),
            SIZES_NAME: torch.from_numpy(np.bincount(self.owners, minlength=self.class_count).astype(np.int64)),
            SAMPLING_NAME: torch.tensor([self.word_length, self.one_in]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], class_count: int) -> LongWords | None:
        """Inverse of `to_tensors`; None if the folder has no long words.

        Raises:
            InputError: if the tensors are damaged.
        """
        if TENSOR_NAME not in tensors:
            return None
        damaged = InputError("the long words in the model folder are damaged: train or copy it again.")
        if SIZES_NAME not in tensors or SAMPLING_NAME not in tensors:
            raise damaged
        kept, sizes, sampling = (tensors[name].numpy() for name in (TENSOR_NAME, SIZES_NAME, SAMPLING_NAME))
        whole = all(np.issubdtype(values.dtype, np.integer) and values.ndim == 1 for values in (kept, sizes, sampling))
        fits = whole and kept.dtype == np.int32 and len(sizes) == class_count and len(sampling) == 2
        if not fits or sizes.min() < 0 or sizes.sum() != len(kept):
            raise damaged
        word_length, one_in = sampling.tolist()
        if not 1 <= word_length <= 32 or one_in < 1:
            raise damaged
        parts = np.split(kept.view(np.uint32), np.cumsum(sizes)[:-1])
        return cls.of_fingerprints(parts, one_in, word_length)


def _hashes_of(sequences: Iterable[GenomeSequence], one_in: int) -> Hashes:
    found = [np.zeros(0, dtype=np.uint64)]
    for sequence in sequences:
        for start in range(0, sequence.length, BASES_AT_A_TIME):
            tokens = sequence.tokens(start, min(sequence.length, start + BASES_AT_A_TIME + WORD_LENGTH - 1))
            found += [hashes for _, hashes, _ in _kept_words(tokens, WORD_LENGTH, one_in)]
    return np.concatenate(found)


def _kept_words(tokens: Tokens, length: int, one_in: int) -> Iterable[tuple[int, Hashes, IntegerArray]]:
    """Yield start of a piece, hashes of its words that are kept, and where these begin, bases from the start."""
    highest = np.uint64((1 << 64) - 1) // np.uint64(one_in)
    for start in range(0, len(tokens) - length + 1, BASES_AT_A_TIME):
        piece = tokens[start : start + BASES_AT_A_TIME + length - 1] - np.uint8(FIRST_BASE_TOKEN)
        unknown = np.concatenate([[0], np.cumsum(piece >= BASES)])  # wraps: everything that is not a base is 4 or more
        hashes = _hash(_canonical_codes(np.where(piece < BASES, piece, 0).astype(np.uint64), length))
        places = np.flatnonzero((hashes <= highest) & (unknown[length:] == unknown[:-length]))
        yield start, hashes[places], places


def _canonical_codes(bases: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.uint64]:
    """Return two bits per base of each word or its reverse complement, whichever is smaller, (words,).

    Words are joined from words of 1, 2, 4, ... bases.
    """
    forward: npt.NDArray[np.uint64] | None = None
    reverse = forward
    done, part = 0, 1
    own, complement = bases, np.uint64(BASES - 1) - bases
    while part <= length:
        if length & part:
            if forward is None or reverse is None:
                forward, reverse = own, complement
            else:
                # The part comes after the `done` bases that are joined already.
                count = len(forward) - part
                forward = (forward[:count] << np.uint64(2 * part)) | own[done : done + count]
                reverse = (complement[done : done + count] << np.uint64(2 * done)) | reverse[:count]
            done += part
        count = len(own) - part
        if count <= 0:
            break
        own, complement = (
            (own[:count] << np.uint64(2 * part)) | own[part:],
            (complement[part:] << np.uint64(2 * part)) | complement[:count],
        )
        part *= 2
    assert forward is not None and reverse is not None
    words = len(bases) - length + 1
    return np.minimum(forward[:words], reverse[:words])


def _hash(codes: npt.NDArray[np.uint64]) -> Hashes:
    """Mix the bits of codes (the finalizer of MurmurHash3, which is a bijection of 64 bits)."""
    mixed = codes ^ (codes >> np.uint64(33))
    mixed = mixed * np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed = mixed * np.uint64(0xC4CEB9FE1A85EC53)
    return mixed ^ (mixed >> np.uint64(33))


def _fingerprints(hashes: Hashes) -> npt.NDArray[np.uint32]:
    """Return the lower half of the hashes; the upper half decides which words are kept."""
    return (hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32)
