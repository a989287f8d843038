"""Classifies records of any length with a model: short ones together, long ones streamed in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import BinaryIO, Final

import numpy as np
import torch

from genomamba.class_names import UNCLASSIFIED
from genomamba.classification.evidence import (
    PIECE_LENGTH_BP,
    RecordEvidence,
    count_known,
    evidence_of_pieces,
    evidence_of_records,
)
from genomamba.classification.held_out import FloatArray
from genomamba.classification.novelty import LikelihoodQuantiles, best_likelihood, own_likelihood, pair_counts
from genomamba.io.fasta import SpooledRecord, spool_records
from genomamba.io.fastq import read_sequence_events
from genomamba.models.species_classifier import BASES, SpeciesClassifier
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambapipelines.console import BaseProgress
from mambapipelines.species.outputs import UNKNOWN, Group
from mambapipelines.species.processes import Share
from mambapipelines.species.rows import Classification

# Short records wait for others of similar length, which go through the model together; the waiting is bounded.
MOST_WAITING_RECORDS: Final = 1024
MOST_WAITING_BASES: Final = 1 << 20


class RecordClassifier:
    """Classifies records one after the other with a model, both strands averaged."""

    def __init__(
        self,
        model: SpeciesClassifier,
        minimum_length: int = 1,
        unknown_below: float = 0.0,
        piece_length: int = PIECE_LENGTH_BP,
        unknown_rate: float = 0.0,
        quantiles: LikelihoodQuantiles | None = None,
    ) -> None:
        """Get ready; the arguments are as in `ClassificationOptions`, and `unknown_rate` needs `quantiles`.

        Raises:
            InputError: an argument is out of its range, or `unknown` would be ambiguous.
        """
        if minimum_length < 0:
            raise InputError(f"--min-length is {minimum_length}: give 0 or more bases.")
        if not 0 <= unknown_below <= 1:
            raise InputError(f"--unknown-below is {unknown_below}: give a probability from 0 to 1.")
        if piece_length < 1:
            raise InputError(f"--piece-length is {piece_length}: give 1 or more bases.")
        if not 0 <= unknown_rate < 1:
            raise InputError(f"--unknown-rate is {unknown_rate}: give a share from 0 to below 1.")
        self.class_names = tuple(model.config.class_names)
        if (unknown_below > 0 or unknown_rate > 0) and UNKNOWN in self.class_names:
            raise InputError(
                f"the model has a class named '{UNKNOWN}', which is what --unknown-below and --unknown-rate call "
                "records: leave the options out and filter by the column of probabilities."
            )
        self._model = model.eval()
        self._minimum_length = max(1, minimum_length)
        self._unknown_below = unknown_below
        self._piece_length = piece_length
        self._unknown_rate = unknown_rate
        self._quantiles = quantiles if unknown_rate > 0 else None

    @property
    def rates_typicality(self) -> bool:
        """Whether answers say how typical a record is."""
        return self._quantiles is not None

    def classify(self, source: str | BinaryIO, progress: BaseProgress | None = None) -> Iterator[Classification]:
        """Yield the answer for every record of a FASTA or FASTQ source, in its order.

        Records that follow each other closely go through the model together when they are of similar length; the
        answers do not depend on that, nor on the length of the pieces that longer records are cut into.

        Raises:
            InputError: the source is neither; earlier records may have been answered by then.
        """
        for _, record in self.evidence([source], Share(), progress):
            yield self.answer(record)

    def evidence(
        self, sources: Sequence[str | BinaryIO], share: Share, progress: BaseProgress | None = None
    ) -> Iterator[tuple[int, RecordEvidence]]:
        """Yield (number of the batch, evidence) for the records of a share of the batches, in the order of the input.

        Raises:
            InputError: a source is neither FASTA nor FASTQ of nucleotides.
        """
        batch = 0
        for place, source in enumerate(sources):
            waiting: list[_WaitingRecord] = []
            waiting_bases = 0
            with closing(spool_records(source, events_of=read_sequence_events)) as records:  # type: ignore[type-var]
                for record in records:
                    is_long = record.length > self._piece_length and record.length >= self._minimum_length
                    full = len(waiting) >= MOST_WAITING_RECORDS or waiting_bases >= MOST_WAITING_BASES
                    if waiting and (is_long or full):
                        yield from self._evidence_of_waiting(waiting, batch, share, place)
                        waiting, waiting_bases, batch = [], 0, batch + 1
                    if is_long:
                        if share.has(batch):
                            yield batch, replace(self._evidence_of_long(record, progress), source=place)
                        batch += 1
                        continue
                    waiting.append(self._take(record, share.has(batch)))
                    waiting_bases += record.length
                    if progress is not None:
                        progress.advance(record.length)
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
        tokens = [record.tokens for record in waiting if record.tokens is not None]
        rows = iter(evidence_of_records(self._model, tokens))
        for record in waiting:
            if record.tokens is None:
                yield batch, RecordEvidence(record.name, record.length, 0, None, source)
            else:
                own = own_likelihood(pair_counts(record.tokens))
                known_bases = count_known(record.tokens)
                yield batch, RecordEvidence(record.name, record.length, known_bases, next(rows), source, own)

    def _evidence_of_long(self, record: SpooledRecord, progress: BaseProgress | None) -> RecordEvidence:
        """Evidence of a record that is streamed through the state, both strands side by side."""
        strands = zip(
            record.forward_pieces(self._piece_length), record.reverse_complement_pieces(self._piece_length), strict=True
        )
        known_bases, pairs, base_before = 0, np.zeros((BASES, BASES), dtype=np.int64), None

        def counted() -> Iterator[tuple[Tokens, Tokens]]:
            nonlocal known_bases, pairs, base_before
            for forward, reverse in strands:
                known_bases += count_known(forward)
                pairs = pairs + pair_counts(forward, base_before)
                base_before = int(forward[-1])
                yield forward, reverse
                if progress is not None:
                    progress.advance(len(forward))

        evidence = evidence_of_pieces(self._model, counted())
        own = own_likelihood(pairs)
        return RecordEvidence(record.name, record.length, known_bases, evidence, own_likelihood=own)

    def answer(self, record: RecordEvidence) -> Classification:
        """The call of a record from its evidence."""
        if record.evidence is None:
            return Classification(record.name, record.length, UNCLASSIFIED, None)
        typicality = None
        if self._quantiles is not None:
            score = best_likelihood(record.evidence, record.known_bases / record.length) - record.own_likelihood
            # A record of unknown bases only is like nothing.
            typicality = self._quantiles.typicality(float(score), record.length) if record.known_bases else 0.0
        return self._answer(record.name, record.length, record.evidence, typicality)

    def answer_group(self, name: str, group: Group) -> Classification:
        """The call of records whose evidence is added up, with the confidence of one record of their joint length.

        Evidence is a log-likelihood ratio, so that of records that are all from one class adds up. The confidence was
        calibrated on stretches of one chromosome: groups of records that repeat each other are called too surely.

        The typicality of a group is twice the mean of its records', weighted by their bases, which is a p-value however
        much the records depend on each other (Vovk & Wang 2020, "Combining p-values via averaging", Biometrika
        107:791, section 3); that of a single record is the record's.
        """
        if not group.bases:
            return Classification(name, 0, UNCLASSIFIED, None)
        typicality = None
        if self._quantiles is not None:
            mean = group.weighted_typicality / group.bases
            typicality = mean if group.classified_records == 1 else min(1.0, 2 * mean)
        return self._answer(name, group.bases, group.total / group.bases, typicality)

    @torch.inference_mode()
    def _answer(self, name: str, length: int, evidence: FloatArray, typicality: float | None) -> Classification:
        logits = self._model.logits(torch.from_numpy(evidence)[None], length)
        probabilities = torch.softmax(logits, dim=-1)[0].numpy()
        best = int(probabilities.argmax())
        unknown = probabilities[best] < self._unknown_below
        unknown |= typicality is not None and typicality < self._unknown_rate
        return Classification(name, length, UNKNOWN if unknown else self.class_names[best], probabilities, typicality)


@dataclass(frozen=True)
class _WaitingRecord:
    """A short record; without tokens it is too short to be classified, or another process's."""

    name: str
    length: int
    tokens: Tokens | None
