"""The counted parts of a classifier: tables of words whose evidence adds up over a record.

A part assigns every word of w bases a value for each class, and the evidence of a record is the sum over its words, so
it can be streamed with the last w - 1 bases as state. There are three kinds of parts:

- `markov K`: log P(last base | the K before it) under the interpolated Markov model of each class
  (`genomamba.baselines.interpolated_markov`). Each order is a separate part, so that a combination can weight them by
  length; all follow from the counts of the longest words.
- `kmer K.R`: the weights of a regularised logistic regression on the spectrum of words of K bases.
- `words`: matches of long words (`genomamba.classification.long_words`), which have no coefficients.

Every table is averaged over a word and its reverse complement, so one pass over a record covers both strands. The
fourth kind, `gate`, weights the tables of the Markov models base by base (`genomamba.classification.evidence_gate`).
It has a state of its own, and reads both strands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from genomamba.baselines.interpolated_markov import (
    InterpolatedMarkovModel,
    StrandSymmetricCounts,
    log_probability_tables,
)
from genomamba.baselines.words import BASES, FIRST_BASE_TOKEN, reverse_complement_codes
from genomamba.classification.evidence_gate import GATE, EvidenceGate, GateState, statistics_table
from genomamba.classification.held_out import FloatArray
from genomamba.classification.long_words import LongWords
from genomamba.tokenizer import COMPLEMENT_IDS, Tokens
from mambacore.devices import from_numpy, to_numpy
from mambacore.errors import InputError

LONGEST_ORDER: Final = 10
WORDS_PER_BASE: Final = 16
"""Largest number of words per training base: longer tables would mostly hold smoothed values."""
MOST_TABLE_BYTES: Final = 2**30
"""With many classes the highest order is reduced: 4 bytes per word and class, plus a third for lower orders."""
SCORED_BASES_AT_A_TIME: Final = 2**16
GATED_BASES_AT_A_TIME: Final = 2**14
TENSOR_PREFIX: Final = "parts."
GATE_PREFIX: Final = "gate."
LARGE_COUNT: Final = 255
LARGE_COUNTS: Final = "counts.large"
"""Counts of a byte stand for themselves below `LARGE_COUNT`; the others are in the tensor of this name."""

Table = npt.NDArray[np.float32]


def longest_order(classes: int, bases_per_class: int, wanted: int = LONGEST_ORDER) -> int:
    """Return the highest order up to `wanted` supported by the bases, with tables that fit in `MOST_TABLE_BYTES`."""

    def is_too_long(order: int) -> bool:
        words = BASES ** (order + 1)
        return 4 * classes * words * 4 / 3 > MOST_TABLE_BYTES or words > WORDS_PER_BASE * bases_per_class

    return next((order for order in range(wanted, 1, -1) if not is_too_long(order)), 1)


@dataclass(frozen=True)
class KmerWeights:
    """A logistic regression on word frequencies, symmetric under the reverse complement.

    Attributes:
        name: `kmer K.R`, with R distinguishing regressions on the same words.
        weights: (4^K, classes) per word.
    """

    name: str
    weights: Table

    @property
    def word_length(self) -> int:
        """K, bases."""
        return (len(self.weights).bit_length() - 1) // 2


@dataclass(frozen=True)
class CountedParts:
    """Tables of all counted parts of a classifier.

    Attributes:
        counts: counts per class, of words of `order` + 1 bases and of all shorter words.
        strengths: strength of each order's prior, shared by the classes so that none is smoothed more than another.
        kmers: the regressions.
        words: the long words, if any; their matches are the last row of the evidence.
        gate: weights the Markov models base by base, if there is one; its evidence is the last row but that of words.
    """

    counts: Sequence[StrandSymmetricCounts]
    strengths: tuple[float, ...]
    kmers: tuple[KmerWeights, ...] = ()
    words: LongWords | None = None
    gate: EvidenceGate | None = None

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return len(self.counts) if self.counts else self.kmers[0].weights.shape[1]

    @property
    def order(self) -> int:
        """The highest order; -1 without Markov parts."""
        return len(self.strengths) - 1

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the parts with coefficients, in the order of their evidence."""
        markov = (f"markov {order}" for order in range(1, self.order + 1))
        return (*markov, *(part.name for part in self.kmers), *(() if self.gate is None else (GATE,)))

    @cached_property
    def word_lengths(self) -> tuple[int, ...]:
        """Word lengths of the tables."""
        return (*range(2, self.order + 2), *(part.word_length for part in self.kmers))

    @property
    def history_bp(self) -> int:
        """Bases before a piece that its evidence depends on."""
        own = max(self.word_lengths, default=1) - 1
        return own if self.words is None else max(own, self.words.history_bp)

    @property
    def row_count(self) -> int:
        """Rows of the evidence without the gate: one per table, and one of long words, if any."""
        return len(self.word_lengths) + (self.words is not None)

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """(words, classes) of each part, computed on first use: about a second per class for order 10."""
        by_order: list[list[Table]] = [[] for _ in range(self.order)]
        for counts in self.counts:
            model = InterpolatedMarkovModel(counts, self.strengths)
            for order, table in enumerate(log_probability_tables(model)):
                if order:
                    values = table.ravel()
                    by_order[order - 1].append((values + values[reverse_complement_codes(order + 1)]) / 2)
        return (*(np.stack(tables, axis=1) for tables in by_order), *(part.weights for part in self.kmers))

    @cached_property
    def gate_statistics(self) -> tuple[Table, ...]:
        """Inputs of the gate, (words, 2) for each order that it weights."""
        return (
            () if self.gate is None else tuple(statistics_table(self.tables[order - 1]) for order in self.gate.orders)
        )

    def block_evidence(self, tokens: Tokens, block_bp: int, before: Tokens | None = None) -> FloatArray:
        """Sum the evidence of whole blocks, (blocks, rows, classes) in nats; the row of long words counts matches.

        The gate's evidence depends on all bases before: it comes from `gate_evidence`, and `with_gate` adds its row.

        Args:
            tokens: (length,) token ids; an incomplete last block is ignored.
            block_bp: length of a block.
            before: preceding tokens, if any; `history_bp` of them suffice.
        """
        blocks = len(tokens) // block_bp
        evidence = np.zeros((blocks, self.row_count, self.class_count))
        if self.words is not None:
            evidence[:, -1] = self.words.block_matches(tokens, block_bp, before)
        per_piece = max(1, SCORED_BASES_AT_A_TIME // block_bp)
        history = self.history_bp
        joined = tokens[: blocks * block_bp] if before is None else np.concatenate([before[-history:], tokens])
        offset = 0 if before is None else min(history, len(before))
        for first in range(0, blocks, per_piece):
            last = min(blocks, first + per_piece)
            start, end = first * block_bp + offset, last * block_bp + offset
            own = min(start, history)
            codes, known = word_ends(joined[start - own : end], max(self.word_lengths))
            codes, known = codes[own:], known[own:]
            for number, (length, table) in enumerate(zip(self.word_lengths, self.tables, strict=True)):
                values = table.take(codes & np.int32(BASES**length - 1), axis=0)
                # Words with unknown bases count zero times, others once: a product is the fastest sum here.
                counts = (known >= length).astype(np.float64).reshape(last - first, 1, block_bp)
                shaped = values.reshape(last - first, block_bp, self.class_count)
                evidence[first:last, number] = np.matmul(counts, shaped)[:, 0]
        return evidence

    def evidence(self, tokens: Tokens, before: Tokens | None = None) -> FloatArray:
        """Sum the evidence of all words that end in a piece, (rows, classes); see `block_evidence`."""
        total = np.zeros((self.row_count, self.class_count))
        for start in range(0, len(tokens), SCORED_BASES_AT_A_TIME):
            piece = tokens[start : start + SCORED_BASES_AT_A_TIME]
            history = before if not start else tokens[max(0, start - self.history_bp) : start]
            if start and start < self.history_bp and before is not None:
                history = np.concatenate([before, tokens[:start]])
            total += self.block_evidence(piece, len(piece), history)[0]
        return total

    @torch.inference_mode()
    def gate_evidence(
        self,
        rows: Tokens,
        state: GateState | None = None,
        device: torch.device | None = None,
        block_bp: int | None = None,
    ) -> tuple[FloatArray, GateState]:
        """Sum the gate's evidence of a piece of several strands, each read forward.

        Args:
            rows: (batch, length) token ids; unknown bases, as of padding, carry no evidence.
            state: state after the previous piece; None at the start.
            device: where the gate's stack runs; the CPU by default.
            block_bp: length of the blocks to sum over, a divisor of the length; the whole piece by default.

        Returns:
            (batch, blocks, classes), nats minus their mean over the classes, and the state.
        """
        assert self.gate is not None
        gate = self.gate.on(device or torch.device("cpu"))
        batch, length = rows.shape
        history = rows[:, :0] if state is None else state.history
        joined = np.concatenate([history, rows], axis=1)
        codes, known = (of[:, history.shape[1] :] for of in word_ends(joined, self.gate.orders[-1] + 1))
        statistics = np.empty((batch, length, len(gate.orders), self.gate_statistics[0].shape[1]), dtype=np.float32)
        for place, (order, table) in enumerate(zip(gate.orders, self.gate_statistics, strict=True)):
            statistics[:, :, place] = table.take(codes & np.int32(BASES ** (order + 1) - 1), axis=0)
        statistics *= (known[..., None] > np.array(gate.orders))[..., None]
        of_stack = None if state is None else state.stack
        weights, stack_state = gate(from_numpy(statistics, device), from_numpy(rows, device), of_stack)
        # Bases without their context count zero times, and orders are summed up by products, as in `block_evidence`.
        counts = to_numpy(weights, torch.float64) * (known[..., None] > np.array(gate.orders))
        blocks = length // block_bp if block_bp else 1
        shape = (batch, blocks, length // blocks)
        evidence = np.zeros((batch, blocks, 1, self.class_count))
        for place, order in enumerate(gate.orders):
            values = self.tables[order - 1].take(codes & np.int32(BASES ** (order + 1) - 1), axis=0)
            evidence += np.matmul(
                counts[:, :, place].reshape(*shape[:2], 1, shape[2]), values.reshape(*shape, self.class_count)
            )
        sums = evidence[:, :, 0] - evidence[:, :, 0].mean(axis=-1, keepdims=True)
        return sums, GateState(joined[:, max(0, joined.shape[1] - gate.orders[-1]) :], stack_state)

    def gate_block_evidence(self, tokens: Tokens, block_bp: int) -> FloatArray:
        """Return the gate's evidence of whole blocks, both strands averaged, (blocks, classes) in nats."""
        blocks = len(tokens) // block_bp
        whole = tokens[: blocks * block_bp]
        strands = np.stack([whole, COMPLEMENT_IDS[whole[::-1]]])
        found = np.zeros((2, blocks, self.class_count))
        state: GateState | None = None
        per_piece = max(1, GATED_BASES_AT_A_TIME // block_bp)
        for first in range(0, blocks, per_piece):
            piece = slice(first, min(blocks, first + per_piece))
            rows = strands[:, piece.start * block_bp : piece.stop * block_bp]
            found[:, piece], state = self.gate_evidence(rows, state, block_bp=block_bp)
        return np.asarray((found[0] + found[1, ::-1]) / 2)

    def with_gate(self, evidence: FloatArray, gated: FloatArray) -> FloatArray:
        """Insert the gate's evidence (..., classes), both strands averaged, into that of the tables and words.

        Args:
            evidence: (..., rows, classes) as from `block_evidence`.
            gated: the gate's row.

        Returns:
            (..., rows + 1, classes).
        """
        return np.insert(evidence, len(self.word_lengths), gated, axis=-2)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return tensors for a model folder: counts of one of each word and its reverse complement, and the weights.

        A class has 2.1 million counts at order 10, of one byte each. Counts of 255 and more, of which there are few,
        are kept beside them as (class times number of words plus word, count).
        """
        tensors: dict[str, torch.Tensor] = {}
        if self.counts:
            canonical = _canonical_words(self.order + 1)
            small = np.empty((len(self.counts), len(canonical)), dtype=np.uint8)
            large = []
            for label, counts in enumerate(self.counts):
                kept = counts.of_order(self.order)[canonical]
                small[label] = np.minimum(kept, LARGE_COUNT)
                words = np.flatnonzero(kept >= LARGE_COUNT)
                large.append(np.stack([words + label * len(canonical), kept[words]], axis=1))
            tensors[TENSOR_PREFIX + "counts"] = torch.from_numpy(small)
            tensors[TENSOR_PREFIX + LARGE_COUNTS] = torch.from_numpy(np.concatenate(large).astype(np.int64))
            tensors[TENSOR_PREFIX + "strengths"] = torch.tensor(self.strengths, dtype=torch.float64)
        for part in self.kmers:
            tensors[f"{TENSOR_PREFIX}{part.name}"] = torch.from_numpy(part.weights.copy())
        if self.gate is not None:
            tensors |= {TENSOR_PREFIX + GATE_PREFIX + name: value for name, value in self.gate.to_tensors().items()}
        return tensors if self.words is None else tensors | self.words.to_tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> CountedParts:
        """Inverse of `to_tensors`.

        Args:
            tensors: tensors of a model folder; others are ignored.
            names: names of the parts, in order.

        Raises:
            InputError: if a part is missing, or the tensors are damaged.
        """
        own = {name.removeprefix(TENSOR_PREFIX): value for name, value in tensors.items() if is_part_tensor(name)}
        counts: list[StrandSymmetricCounts] = []
        strengths: tuple[float, ...] = ()
        if "counts" in own:
            strengths = tuple(own["strengths"].tolist()) if "strengths" in own else ()
            kept = _all_counts(own)
            length = len(strengths)
            canonical = _canonical_words(length) if 1 <= length <= LONGEST_ORDER + 3 else np.zeros(0, dtype=np.int64)
            if kept.ndim != 2 or kept.shape[1] != len(canonical):
                raise InputError("the counts in the model folder are damaged: train or copy it again.")
            complements = reverse_complement_codes(length)
            for row in kept:
                words = np.zeros(BASES**length, dtype=np.int32)
                words[canonical] = row
                words[complements[canonical]] = row
                counts.append(StrandSymmetricCounts.of_words(words))
        kmers = [
            KmerWeights(name, value.numpy().astype(np.float32))
            for name, value in ((name, own[name]) for name in names if name in own)
        ]
        of_gate = {name.removeprefix(GATE_PREFIX): own[name] for name in own if name.startswith(GATE_PREFIX)}
        gate = EvidenceGate.from_tensors(of_gate)
        if gate is not None and not all(1 <= order < max(2, len(strengths)) for order in gate.orders):
            raise InputError("the evidence gate in the model folder is damaged: train or copy it again.")
        parts = cls(tuple(counts), strengths, tuple(kmers), gate=gate)
        if parts.names != tuple(names):
            raise InputError("the counted parts in the model folder are damaged: train or copy it again.")
        return replace(parts, words=LongWords.from_tensors(tensors, parts.class_count) if names else None)


def is_part_tensor(name: str) -> bool:
    """Whether a tensor of a model folder belongs to the counted parts."""
    return name.startswith(TENSOR_PREFIX)


def _all_counts(tensors: Mapping[str, torch.Tensor]) -> npt.NDArray[np.integer]:
    """(classes, words) of a model folder; older folders hold them as int16 or int32, without large ones beside them.

    Raises:
        InputError: the large counts are damaged.
    """
    counts = tensors["counts"].numpy()
    if counts.dtype != np.uint8:
        return counts
    large = tensors[LARGE_COUNTS].numpy() if LARGE_COUNTS in tensors else np.zeros(0)
    fits = large.ndim == 2 and large.shape[1] == 2 and large.dtype == np.int64
    if not fits or not np.array_equal(large[:, 0], np.flatnonzero(counts == LARGE_COUNT)):
        raise InputError("the counts in the model folder are damaged: train or copy it again.")
    every = counts.astype(np.int32)
    every.ravel()[large[:, 0]] = large[:, 1]
    return every


def _canonical_words(length: int) -> npt.NDArray[np.int64]:
    """Return the words that are not greater than their reverse complement, ascending."""
    return np.flatnonzero(np.arange(BASES**length) <= reverse_complement_codes(length))


def word_ends(tokens: Tokens, length: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return for every position the word of `length` bases that ends there, and the run of known bases up to it.

    Tokens have the shape (length,) or (batch, length), as the results. Bases before the start and unknown bases are
    encoded as A.
    """
    bases = tokens - np.uint8(FIRST_BASE_TOKEN)  # wraps: everything that is not a base becomes 4 or more
    is_base = bases < BASES
    two_bits = np.where(is_base, bases, 0).astype(np.int32)
    codes = two_bits.copy()
    for back in range(1, min(length, tokens.shape[-1])):
        codes[..., back:] |= two_bits[..., :-back] << np.int32(2 * back)
    places = np.arange(tokens.shape[-1])
    last_unknown = np.maximum.accumulate(np.where(is_base, -1, places), axis=-1)
    return codes, places - last_unknown
