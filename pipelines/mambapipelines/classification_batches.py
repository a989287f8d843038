"""Evidence of many records of different lengths: similar ones go through the model together, padded on the right.

The model is causal and unknown bases are no evidence, so padding after a record changes nothing that was read before.
What goes together is a function of the records' lengths and order only, so the numbers are the same however many
processes share the work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from genomamba.models import BASES, FIRST_BASE_TOKEN, SpeciesClassifier
from genomamba.tokenizer import COMPLEMENT_IDS, TOKEN_OF_BYTE, Tokens
from mambapipelines.calibration import BASES_PER_FORWARD, PIECE_LENGTH_BP, FloatArray

PADDING_TOKEN = TOKEN_OF_BYTE[ord("N")]


@dataclass(frozen=True)
class RecordEvidence:
    """What the model says about a record, before it is called.

    Attributes:
        name: of the record.
        length: bp.
        known_bases: how many of them are A, C, G or T.
        evidence: (classes,) per base, both strands averaged; `None` for a record that is not classified.
        source: number of the file it is from.
    """

    name: str
    length: int
    known_bases: int
    evidence: FloatArray | None
    source: int = 0

    def to_line(self) -> str:
        """One line of JSON, from which the same floating-point numbers are read back."""
        evidence = None if self.evidence is None else self.evidence.tolist()
        return json.dumps([self.name, self.length, self.known_bases, evidence, self.source]) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RecordEvidence:
        """The opposite of `to_line`."""
        name, length, known_bases, evidence, source = json.loads(line)
        return cls(
            name, length, known_bases, None if evidence is None else np.array(evidence, dtype=np.float64), source
        )


def count_known(tokens: Tokens) -> int:
    """How many bases are A, C, G or T."""
    return int(np.count_nonzero((tokens >= FIRST_BASE_TOKEN) & (tokens < FIRST_BASE_TOKEN + BASES)))


def batches_by_length(lengths_bp: Sequence[int], may_pad: bool = True) -> list[list[int]]:
    """Which records go through the model together: positions in `lengths_bp`, of similar length.

    Args:
        lengths_bp: of the records.
        may_pad: without it only records of the same length go together.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths_bp)), key=lambda place: lengths_bp[place]):
        length = lengths_bp[place]
        fits = bool(batches) and 2 * length * (len(batches[-1]) + 1) <= BASES_PER_FORWARD
        if fits and (may_pad or lengths_bp[batches[-1][0]] == length):
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


@torch.inference_mode()
def evidence_of_records(model: SpeciesClassifier, records: Sequence[Tokens]) -> FloatArray:
    """Evidence per base of whole records, the mean of both strands.

    Args:
        model: the classifier.
        records: token ids, each of one base or more.

    Returns:
        (records, classes) float64.
    """
    lengths = [len(tokens) for tokens in records]
    evidence = np.empty((len(records), len(model.config.class_names)))
    # The last position of a padded row is no position of its record.
    for places in batches_by_length(lengths, may_pad=model.config.pooling == "mean"):
        rows = np.full((2 * len(places), max(lengths[place] for place in places)), PADDING_TOKEN, dtype=np.uint8)
        for row, place in enumerate(places):
            rows[row, : lengths[place]] = records[place]
            rows[len(places) + row, : lengths[place]] = COMPLEMENT_IDS[records[place][::-1]]
        state = None
        for start in range(0, rows.shape[1], PIECE_LENGTH_BP):
            _, state = model(torch.from_numpy(rows[:, start : start + PIECE_LENGTH_BP]), state)
        if state is None:
            continue
        total = state.evidence.total.double().reshape(2, len(places), -1).mean(dim=0).numpy()
        if model.config.pooling == "mean":
            total = total / np.array([lengths[place] for place in places])[:, None]
        evidence[places] = total
    return evidence
