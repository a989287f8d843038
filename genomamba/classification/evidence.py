"""Evidence of many records of different lengths: similar ones go through the model together, padded on the right.

The model is causal and unknown bases are no evidence, so padding after a record changes nothing that was read before.
What goes together is a function of the records' lengths and order only, so the numbers are the same however many
processes share the work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from genomamba.classification.calibration import BASES_PER_FORWARD, PIECE_LENGTH_BP
from genomamba.classification.held_out import FloatArray
from genomamba.models.species_classifier import BASES, FIRST_BASE_TOKEN, ClassifierState, SpeciesClassifier
from genomamba.tokenizer import COMPLEMENT_IDS, TOKEN_OF_BYTE, Tokens

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
        own_likelihood: `classification_unknown.own_likelihood` of it.
    """

    name: str
    length: int
    known_bases: int
    evidence: FloatArray | None
    source: int = 0
    own_likelihood: float = 0.0

    def to_line(self) -> str:
        """One line of JSON, from which the same floating-point numbers are read back."""
        evidence = None if self.evidence is None else self.evidence.tolist()
        return json.dumps([self.name, self.length, self.known_bases, evidence, self.source, self.own_likelihood]) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RecordEvidence:
        """The opposite of `to_line`."""
        name, length, known_bases, evidence, source, own_likelihood = json.loads(line)
        values = None if evidence is None else np.array(evidence, dtype=np.float64)
        return cls(name, length, known_bases, values, source, own_likelihood)


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


def evidence_of_records(model: SpeciesClassifier, records: Sequence[Tokens]) -> FloatArray:
    """Evidence per base of whole records, the mean of both strands.

    Each of PyTorch's threads takes whole batches, so the numbers do not depend on how many there are.

    Args:
        model: the classifier.
        records: token ids, each of one base or more.

    Returns:
        (records, classes) float64.
    """
    # The last position of a padded row is no position of its record.
    batches = batches_by_length([len(tokens) for tokens in records], may_pad=model.config.pooling == "mean")
    evidence = np.empty((len(records), len(model.config.class_names)))
    with _single_threads(torch.get_num_threads()) as run:
        parts = run(lambda places: _evidence_of_batch(model, [records[place] for place in places]), batches)
        for places, part in zip(batches, parts, strict=True):
            evidence[places] = part
    return evidence


@torch.inference_mode()
def _evidence_of_batch(model: SpeciesClassifier, records: Sequence[Tokens]) -> FloatArray:
    """(records, classes) of records that are padded to the longest."""
    rows = np.full((2 * len(records), max(len(tokens) for tokens in records)), PADDING_TOKEN, dtype=np.uint8)
    for row, tokens in enumerate(records):
        rows[row, : len(tokens)] = tokens
        rows[len(records) + row, : len(tokens)] = COMPLEMENT_IDS[tokens[::-1]]
    state = None
    for start in range(0, rows.shape[1], PIECE_LENGTH_BP):
        _, state = model(torch.from_numpy(rows[:, start : start + PIECE_LENGTH_BP]), state)
    assert state is not None  # every record has a base
    total = state.evidence.total.double().reshape(2, len(records), -1).mean(dim=0).numpy()
    if model.config.pooling == "mean":
        total = total / np.array([len(tokens) for tokens in records])[:, None]
    return np.asarray(total)


def evidence_of_pieces(model: SpeciesClassifier, pieces: Iterable[tuple[Tokens, Tokens]]) -> FloatArray:
    """Evidence per base of a record that comes in pieces, the mean of both strands, (classes,) float64.

    With two threads each takes a strand; more of them share the operators of a strand.

    Args:
        model: the classifier.
        pieces: the same piece number of either strand, token ids of one base or more.
    """
    states: list[ClassifierState | None] = [None, None]
    means: list[Tensor] = []

    @torch.inference_mode()
    def read(strand: int, tokens: Tokens) -> Tensor:
        mean, states[strand] = model(torch.from_numpy(tokens)[None], states[strand])
        return mean[0]

    with _single_threads(torch.get_num_threads(), workers=2) as run:
        for piece in pieces:
            means = list(run(lambda strand, piece=piece: read(strand, piece[strand]), (0, 1)))  # type: ignore[misc]
    return np.asarray(torch.stack(means).double().mean(dim=0).numpy())


Item = TypeVar("Item")
Result = TypeVar("Result")


class Runner(Protocol):
    """Calls a function on every item and yields the results in order."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterable[Result]: ...


@contextmanager
def _single_threads(threads: int, workers: int | None = None) -> Iterator[Runner]:
    """Share items among workers of one thread each, `threads` of them; with fewer `workers` each has several threads.

    PyTorch's own threads share each operator, and wait for each other by spinning after every one. On cores that other
    programs use as well that took over three times the processor time; workers that take whole batches hardly wait.
    """
    count = threads if workers is None else min(workers, threads)
    if count == 1:
        yield map
        return
    with ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, threads // count)) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown()
            # The number that a worker sets is its own, and also what threads that are started later begin with.
            torch.set_num_threads(threads)
