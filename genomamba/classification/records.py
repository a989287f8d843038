"""Classification of records of any length: short ones in batches, long ones as streams in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Final, cast

import numpy as np
from scipy.special import softmax

from genomamba.class_names import UNCLASSIFIED
from genomamba.classification.evidence import (
    PIECE_LENGTH_BP,
    RecordEvidence,
    class_logits,
    count_known,
    evidence_of_pieces,
    evidence_of_records,
    longest_markov_order,
    markov_evidence,
    split_evidence,
)
from genomamba.classification.held_out import FloatArray
from genomamba.classification.novelty import (
    MARKOV,
    LikelihoodQuantiles,
    best_likelihood,
    count_scored_words,
    own_likelihood,
    pair_counts,
)
from genomamba.io.fasta import SpooledRecord, spool_records
from genomamba.io.sources import SequenceSource, sequence_events
from genomamba.models.species_classifier import BASES, SpeciesClassifier
from genomamba.tokenizer import Tokens
from mambacore.devices import device_of, positions_at_once
from mambacore.errors import InputError

UNKNOWN: Final = "unknown"
"""The call for a record whose best class is too uncertain, or that is unlike every class."""

# Short records are queued to be batched with others of similar length; the queue is bounded.
MOST_WAITING_RECORDS: Final = 1024
MOST_WAITING_BASES: Final = 1 << 20


@dataclass(frozen=True)
class Classification:
    """Result for one record.

    Attributes:
        name: record name.
        length: record length, bp.
        call: a class name, `unknown` or `unclassified`.
        probabilities: (classes,); `None` when `unclassified`.
        p_value: p-value of the record under the classes (`novelty.LikelihoodQuantiles`), if requested.
        shared: share of the record's long words that the class with most of them has, if requested (0 to about 1).
    """

    name: str
    length: int
    call: str
    probabilities: FloatArray | None = field(compare=False)
    p_value: float | None = field(default=None, compare=False)
    shared: float | None = field(default=None, compare=False)

    @property
    def probability(self) -> float:
        """Probability of the best class; NaN when `unclassified`."""
        return math.nan if self.probabilities is None else float(self.probabilities.max())


@dataclass
class Group:
    """Summed evidence of a group of records.

    Attributes:
        total: (classes,) in nats.
        records: number of records.
        classified_records, bases: number and total length of the records with evidence.
        known_bases: number of A, C, G and T of those records.
        weighted_p_value: sum of p-value times bases, if p-values are requested.
    """

    total: FloatArray
    records: int = 0
    classified_records: int = 0
    bases: int = 0
    known_bases: int = 0
    weighted_p_value: float = 0.0

    def add(self, record: RecordEvidence, p_value: float | None) -> None:
        """Add a record; one without evidence counts as a record but adds no bases."""
        self.records += 1
        if record.evidence is not None:
            self.total = self.total + record.evidence * record.length
            self.classified_records += 1
            self.bases += record.length
            self.known_bases += record.known_bases
            self.weighted_p_value += record.length * (p_value or 0.0)


@dataclass
class Groups:
    """Groups of records, in order of first appearance."""

    rule: Callable[[str], str | None]
    by_name: dict[str, Group] = field(default_factory=dict)
    without: int = 0

    def add(self, record: RecordEvidence, p_value: float | None = None) -> None:
        """Add a record; one without evidence counts as a record of the group but adds no bases."""
        group_name = self.rule(record.name)
        if group_name is None:
            self.without += 1
            return
        self.by_name.setdefault(group_name, Group(np.zeros(()))).add(record, p_value)


@dataclass(frozen=True)
class Share:
    """The batches of one of several processes: number `rank` and every `count`-th after that."""

    rank: int = 0
    count: int = 1

    def has(self, batch: int) -> bool:
        """Whether the batch, numbered from 0, is in this share."""
        return batch % self.count == self.rank


def _ignore(bases: int) -> None:
    """Report no progress."""


class RecordClassifier:
    """Classifies records with a model, averaged over both strands."""

    def __init__(
        self,
        model: SpeciesClassifier,
        minimum_length: int = 1,
        unknown_below: float = 0.0,
        piece_length: int = PIECE_LENGTH_BP,
        unknown_rate: float = 0.0,
        quantiles: LikelihoodQuantiles | None = None,
        unknown_shared: float = 0.0,
    ) -> None:
        """Check the settings.

        Args:
            model: the classifier, on any device; it is put into evaluation mode.
            minimum_length: shorter records are `unclassified`, bp.
            unknown_below: records whose best class has a lower probability are `unknown`.
            piece_length: bases per forward pass, bp, and more on other devices than a CPU; results do not depend on it.
            unknown_rate: records with a p-value below this are `unknown`.
            quantiles: quantiles of held-out windows, for p-values; required for an `unknown_rate` above 0.
            unknown_shared: records of whose long words no class has this share are `unknown`.

        Raises:
            InputError: if an argument is out of range, or `unknown` would be ambiguous.
        """
        if minimum_length < 0:
            raise InputError(f"--min-length is {minimum_length}: give 0 or more bases.")
        if not 0 <= unknown_below <= 1:
            raise InputError(f"--unknown-below is {unknown_below}: give a probability from 0 to 1.")
        if piece_length < 1:
            raise InputError(f"--piece-length is {piece_length}: give 1 or more bases.")
        if not 0 <= unknown_rate < 1:
            raise InputError(f"--unknown-rate is {unknown_rate}: give a rate from 0 to below 1.")
        if not 0 <= unknown_shared <= 1:
            raise InputError(f"--unknown-shared is {unknown_shared}: give a share from 0 to 1.")
        if unknown_shared > 0 and (model.combination is None or model.combination.words_one_in is None):
            raise InputError(
                "the model has no long words to share (--unknown-shared): train it again with parts.words, or leave "
                "out the option."
            )
        self.class_names = tuple(model.config.class_names)
        if max(unknown_below, unknown_rate, unknown_shared) > 0 and UNKNOWN in self.class_names:
            raise InputError(
                f"the model has a class named '{UNKNOWN}', which is also the call that --unknown-below, "
                "--unknown-rate and --unknown-shared give: leave the options out and filter by the probability column."
            )
        self._model = model.eval()
        self._longest_order = longest_markov_order(model)
        self._minimum_length = max(1, minimum_length)
        self._unknown_below = unknown_below
        self._piece_length = piece_length
        self._unknown_rate = unknown_rate
        self._unknown_shared = unknown_shared
        self._quantiles = quantiles if unknown_rate > 0 else None

    @property
    def has_p_values(self) -> bool:
        """Whether classifications have a p-value."""
        return self._quantiles is not None

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Attributes of a `Classification` that were requested, in the order of the table."""
        return ("p_value",) * self.has_p_values + ("shared",) * (self._unknown_shared > 0)

    def classify(self, source: SequenceSource, advance: Callable[[int], object] = _ignore) -> Iterator[Classification]:
        """Classify the records of a FASTA or FASTQ source, in order.

        Nearby records of similar length share a batch; results depend neither on that nor on the length of the
        pieces that longer records are cut into.

        Args:
            source: a file, stream, mapping of names to letters, or letters (`genomamba.io.sources`).
            advance: called with the number of bases processed.

        Raises:
            InputError: if the source is neither FASTA nor FASTQ; earlier records may have been yielded by then.
        """
        for _, record in self.evidence([source], Share(), advance):
            yield self.answer(record)

    def evidence(
        self, sources: Sequence[SequenceSource], share: Share, advance: Callable[[int], object] = _ignore
    ) -> Iterator[tuple[int, RecordEvidence]]:
        """Yield (batch number, evidence) for the records of a share of the batches, in input order.

        Args:
            sources: as in `classify`.
            share: the batches of this process.
            advance: called with the number of bases processed.

        Raises:
            InputError: if a source is neither FASTA nor FASTQ of nucleotides.
        """
        batch = 0
        for place, source in enumerate(sources):
            waiting: list[_WaitingRecord] = []
            waiting_bases = 0
            with closing(spool_records(source, events_of=sequence_events)) as records:  # type: ignore[type-var]
                for record in records:
                    is_long = record.length > self._piece_length and record.length >= self._minimum_length
                    full = len(waiting) >= MOST_WAITING_RECORDS or waiting_bases >= MOST_WAITING_BASES
                    if waiting and (is_long or full):
                        yield from self._evidence_of_waiting(waiting, batch, share, place)
                        waiting, waiting_bases, batch = [], 0, batch + 1
                    if is_long:
                        if share.has(batch):
                            yield batch, replace(self._evidence_of_long(record, advance), source=place)
                        batch += 1
                        continue
                    waiting.append(self._take(record, share.has(batch)))
                    waiting_bases += record.length
                    advance(record.length)
            if waiting:
                yield from self._evidence_of_waiting(waiting, batch, share, place)
                batch += 1

    def _take(self, record: SpooledRecord, wanted: bool) -> _WaitingRecord:
        if not wanted or record.length < self._minimum_length:
            return _WaitingRecord(record.name, record.length, None)
        return _WaitingRecord(record.name, record.length, next(record.forward_pieces(record.length)))

    def _evidence_of_waiting(
        self, waiting: Sequence[_WaitingRecord], batch: int, share: Share, source: int
    ) -> Iterator[tuple[int, RecordEvidence]]:
        if not share.has(batch):
            return
        known = [0 if record.tokens is None else count_known(record.tokens) for record in waiting]
        tokens = [record.tokens for record, bases in zip(waiting, known, strict=True) if bases]
        rows = iter(evidence_of_records(self._model, cast(list[Tokens], tokens)))
        for record, bases in zip(waiting, known, strict=True):
            if bases and record.tokens is not None:
                own = own_likelihood(pair_counts(record.tokens))
                words = count_scored_words(record.tokens, self._longest_order)
                yield batch, RecordEvidence(record.name, record.length, bases, next(rows), source, own, words)
            else:
                # Too short, or without any known base: there is no evidence for any class.
                yield batch, RecordEvidence(record.name, record.length, 0, None, source)

    def _evidence_of_long(self, record: SpooledRecord, advance: Callable[[int], object]) -> RecordEvidence:
        """Compute the evidence of a record whose strands are streamed through the model in parallel."""
        both = positions_at_once(device_of(self._model), 2 * self._piece_length)
        length = max(self._piece_length, both // 2)
        strands = zip(record.forward_pieces(length), record.reverse_complement_pieces(length), strict=True)
        known_bases, words, pairs = 0, 0, np.zeros((BASES, BASES), dtype=np.int64)
        before = np.zeros(0, dtype=np.uint8)

        def counted() -> Iterator[tuple[Tokens, Tokens]]:
            nonlocal known_bases, words, pairs, before
            for forward, reverse in strands:
                known_bases += count_known(forward)
                pairs = pairs + pair_counts(forward, int(before[-1]) if len(before) else None)
                words += count_scored_words(forward, self._longest_order, before)
                before = np.concatenate([before, forward])[-max(1, self._longest_order) :]
                yield forward, reverse
                advance(len(forward))

        evidence = evidence_of_pieces(self._model, counted())
        if not known_bases:
            return RecordEvidence(record.name, record.length, 0, None)
        own = own_likelihood(pairs)
        return RecordEvidence(record.name, record.length, known_bases, evidence, own_likelihood=own, scored_words=words)

    def answer(self, record: RecordEvidence) -> Classification:
        """Call the class of a record from its evidence."""
        if record.evidence is None:
            return Classification(record.name, record.length, UNCLASSIFIED, None)
        p_value = None
        if self._quantiles is not None:
            if self._quantiles.basis == MARKOV:
                evidence, scored = markov_evidence(self._model, record.evidence), record.scored_words
            else:
                evidence, scored = split_evidence(self._model, record.evidence)[0], record.known_bases
            score = best_likelihood(evidence, scored / record.length) - record.own_likelihood
            p_value = self._quantiles.p_value(float(score), record.length)
        return self._answer(record.name, (record.length, record.known_bases), record.evidence, p_value)

    def answer_group(self, name: str, group: Group) -> Classification:
        """Call the class of a group from its summed evidence, with the confidence of one record of the total length.

        Evidence is a log-likelihood ratio, so it adds up over records from one class. Confidence was calibrated on
        contiguous windows of chromosomes: groups of redundant records are called with too much confidence.

        The p-value of a group is twice the mean of its records', weighted by their bases, which is valid however the
        records depend on each other (Vovk & Wang 2020, "Combining p-values via averaging", Biometrika 107:791,
        section 3); that of a single record is the record's own.
        """
        if not group.bases:
            return Classification(name, 0, UNCLASSIFIED, None)
        p_value = None
        if self._quantiles is not None:
            mean = group.weighted_p_value / group.bases
            p_value = mean if group.classified_records == 1 else min(1.0, 2 * mean)
        return self._answer(name, (group.bases, group.known_bases), group.total / group.bases, p_value)

    def _answer(self, name: str, bases: tuple[int, int], evidence: FloatArray, p_value: float | None) -> Classification:
        length, known_bases = bases
        probabilities = softmax(class_logits(self._model, evidence[None], length)[0])
        best = int(probabilities.argmax())
        unknown = probabilities[best] < self._unknown_below
        unknown |= p_value is not None and p_value < self._unknown_rate
        shared = self._shared(evidence, length, known_bases) if self._unknown_shared > 0 else None
        unknown |= shared is not None and shared < self._unknown_shared
        call = UNKNOWN if unknown else self.class_names[best]
        return Classification(name, length, call, probabilities, p_value, shared)

    def _shared(self, evidence: FloatArray, length: int, known_bases: int) -> float:
        """The share of long words that the class with most of them has."""
        words, combination = split_evidence(self._model, evidence)[1], self._model.combination
        assert words is not None and combination is not None and combination.words_one_in is not None
        matches = float(words[len(combination.part_names)].max()) * length
        return matches * combination.words_one_in / max(1, known_bases)


@dataclass(frozen=True)
class _WaitingRecord:
    """A queued record; without tokens it is too short to be classified, or belongs to another process."""

    name: str
    length: int
    tokens: Tokens | None
