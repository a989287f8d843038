"""Evidence for each class, averaged over both strands: of whole records, of a streamed record, and along a record.

Records of similar length go through the model together, padded on the right. The model is causal and unknown bases
carry no evidence, so padding changes nothing that was read before it. Batches depend only on the lengths and the order
of the records, so the numbers are the same however many processes share the work.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from genomamba.classification.held_out import FloatArray, IntegerArray
from genomamba.models.species_classifier import BASES, FIRST_BASE_TOKEN, ClassifierState, SpeciesClassifier
from genomamba.tokenizer import ANY_BASE_TOKEN, COMPLEMENT_IDS, Tokens
from mambacore.devices import device_of, from_numpy, to_numpy
from mambacore.layers import PoolingState

# Pieces and batches that stay in the cache; the state carries over, so the result does not depend on them.
PIECE_LENGTH_BP = 16_384
BASES_PER_FORWARD = 32_768


@dataclass(frozen=True)
class RecordEvidence:
    """Evidence of one record, before a class is called.

    Attributes:
        name: record name.
        length: record length, bp.
        known_bases: number of A, C, G and T.
        evidence: (classes,) per base, averaged over both strands, or (1 + parts, classes) of a model with counted
            parts (see `evidence_of_records`); `None` for a record that is not classified.
        source: index of the input file.
        own_likelihood: `novelty.own_likelihood` of the record, nats per base.
        scored_words: `novelty.count_scored_words` of the record.
    """

    name: str
    length: int
    known_bases: int
    evidence: FloatArray | None
    source: int = 0
    own_likelihood: float = 0.0
    scored_words: int = 0

    def to_line(self) -> str:
        """One line of JSON, from which the same floating-point numbers are read back."""
        evidence = None if self.evidence is None else self.evidence.tolist()
        numbers = [self.source, self.own_likelihood, self.scored_words]
        return json.dumps([self.name, self.length, self.known_bases, evidence, *numbers]) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RecordEvidence:
        """The opposite of `to_line`."""
        name, length, known_bases, evidence, *numbers = json.loads(line)
        values = None if evidence is None else np.array(evidence, dtype=np.float64)
        return cls(name, length, known_bases, values, *numbers)


def count_known(tokens: Tokens) -> int:
    """Count the tokens that are A, C, G or T."""
    return int(np.count_nonzero((tokens >= FIRST_BASE_TOKEN) & (tokens < FIRST_BASE_TOKEN + BASES)))


def batches_by_length(lengths_bp: Sequence[int], may_pad: bool = True) -> list[list[int]]:
    """Group records of similar length into batches.

    Args:
        lengths_bp: of the records, bp.
        may_pad: whether records of different lengths may share a batch.

    Returns:
        Batches of positions in `lengths_bp`.
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


def evidence_of_records(model: SpeciesClassifier, records: Sequence[Tokens] | Tokens) -> FloatArray:
    """Evidence per base of whole records, averaged over both strands.

    On a CPU each thread takes whole batches, so the numbers do not depend on the number of threads.

    Args:
        model: the classifier, on any device.
        records: (length,) token ids of each record, one base or more; or one array (records, length).

    Returns:
        (records, classes) float64; of a model with counted parts (records, 1 + parts, classes), the stack first.
    """
    # The last position of a padded row is no position of its record.
    batches = batches_by_length([len(tokens) for tokens in records], may_pad=model.config.pooling == "mean")
    evidence = np.empty((len(records), len(model.config.class_names)))
    threads = torch.get_num_threads() if device_of(model).type == "cpu" else 1
    with _single_threads(threads) as run:
        parts = run(lambda places: _evidence_of_batch(model, [records[place] for place in places]), batches)
        for places, part in zip(batches, parts, strict=True):
            evidence[places] = part
    if model.parts is None or not len(records):
        return evidence
    counted = [model.parts.evidence(tokens) / len(tokens) for tokens in records]
    return np.concatenate([evidence[:, None], np.reshape(counted, (len(records), -1, evidence.shape[1]))], axis=1)


@torch.inference_mode()
def _evidence_of_batch(model: SpeciesClassifier, records: Sequence[Tokens]) -> FloatArray:
    """(records, classes) of records that are padded to the longest."""
    rows = np.full((2 * len(records), max(len(tokens) for tokens in records)), ANY_BASE_TOKEN, dtype=np.uint8)
    for row, tokens in enumerate(records):
        rows[row, : len(tokens)] = tokens
        rows[len(records) + row, : len(tokens)] = COMPLEMENT_IDS[tokens[::-1]]
    state, device = None, device_of(model)
    for start in range(0, rows.shape[1], PIECE_LENGTH_BP):
        _, state = model(from_numpy(rows[:, start : start + PIECE_LENGTH_BP], device), state)
    assert state is not None  # every record has a base
    total = to_numpy(state.evidence.total, torch.float64).reshape(2, len(records), -1).mean(axis=0)
    if model.config.pooling == "mean":
        total = total / np.array([len(tokens) for tokens in records])[:, None]
    return np.asarray(total)


def evidence_of_pieces(model: SpeciesClassifier, pieces: Iterable[tuple[Tokens, Tokens]]) -> FloatArray:
    """Evidence per base of a record that comes in pieces, averaged over both strands.

    With two threads each takes a strand; further threads share the operators of a strand.

    Args:
        model: the classifier, on any device.
        pieces: pairs of the n-th piece of the forward strand and the n-th of the reverse complement, token ids of one
            base or more.

    Returns:
        (classes,) float64, or (1 + parts, classes) of a model with counted parts.
    """
    device = device_of(model)
    states: list[ClassifierState | None] = [None, None]
    means: list[Tensor] = []

    @torch.inference_mode()
    def read(strand: int, tokens: Tokens) -> Tensor:
        mean, states[strand] = model(from_numpy(tokens, device)[None], states[strand])
        return mean[0]

    threads = torch.get_num_threads() if device.type == "cpu" else 1
    with _single_threads(threads, workers=2) as run:
        counted, length, before = np.zeros(()), 0, np.zeros(0, dtype=np.uint8)
        for piece in pieces:
            if model.parts is not None:
                # The tables hold the mean of both strands, so that one of them is read.
                counted = counted + model.parts.evidence(piece[0], before)
                length += len(piece[0])
                before = np.concatenate([before, piece[0]])[-model.parts.history_bp :]
            means = list(run(lambda strand, piece=piece: read(strand, piece[strand]), (0, 1)))  # type: ignore[misc]
    stack = to_numpy(torch.stack(means), torch.float64).mean(axis=0)
    return stack if model.parts is None else np.concatenate([stack[None], counted / length])


@torch.inference_mode()
def evidence_along(model: SpeciesClassifier, tokens: Tokens, boundaries: IntegerArray) -> FloatArray:
    """Evidence per base of each window of a record, given everything before it, averaged over both strands.

    Args:
        model: the classifier, on any device.
        tokens: (length,) token ids.
        boundaries: (windows + 1,) ascending positions, bp, from 0 to the length.

    Returns:
        (windows, classes) float64, or (windows, 1 + parts, classes) of a model with counted parts.
    """
    forward = _strand_evidence_along(model, tokens, boundaries)
    reverse = _strand_evidence_along(model, COMPLEMENT_IDS[tokens[::-1]], len(tokens) - boundaries[::-1])
    stack = (forward + reverse[::-1]) / 2
    if model.parts is None:
        return stack
    history = model.parts.history_bp
    counted = [
        model.parts.evidence(tokens[start:end], tokens[max(0, start - history) : start]) / max(1, end - start)
        for start, end in itertools.pairwise(boundaries.tolist())
    ]
    return np.concatenate([stack[:, None], np.stack(counted)], axis=1)


def split_evidence(model: SpeciesClassifier, evidence: FloatArray) -> tuple[FloatArray, FloatArray | None]:
    """Evidence of the stack (..., classes), and of the counted parts (..., parts, classes) if there are any."""
    return (evidence, None) if model.parts is None else (evidence[..., 0, :], evidence[..., 1:, :])


def longest_markov_order(model: SpeciesClassifier) -> int:
    """Of the Markov models among its parts; 0 without any."""
    return 0 if model.parts is None else max(model.parts.order, 0)


def markov_evidence(model: SpeciesClassifier, evidence: FloatArray) -> FloatArray:
    """Evidence (..., classes) of the Markov models of all orders together, as `novelty` wants it.

    Args:
        model: has Markov models.
        evidence: (..., 1 + parts, classes).
    """
    return np.asarray(evidence[..., 1 : 1 + longest_markov_order(model), :].sum(axis=-2))


@torch.inference_mode()
def class_logits(model: SpeciesClassifier, evidence: FloatArray, lengths_bp: IntegerArray | int) -> FloatArray:
    """Logits (records, classes) of evidence as `evidence_of_records` gives it.

    Args:
        model: the classifier, on any device.
        evidence: (records, classes) or (records, 1 + parts, classes), per base.
        lengths_bp: (records,) length of each, or one length for all.
    """
    stack, counted = split_evidence(model, evidence)
    lengths = np.broadcast_to(np.asarray(lengths_bp), len(evidence))
    device = device_of(model)
    evidence_on_device = from_numpy(stack, device)
    logits = to_numpy(model.logits(evidence_on_device, from_numpy(lengths, device)), torch.float64)
    if counted is None or model.combination is None:
        return logits
    return model.combination.logits(logits, counted, lengths)


def _strand_evidence_along(model: SpeciesClassifier, tokens: Tokens, boundaries: IntegerArray) -> FloatArray:
    """`evidence_along` on one strand."""
    device = device_of(model)
    state: ClassifierState | None = None
    evidence = []
    for start, end in itertools.pairwise(boundaries.tolist()):
        if state is not None:
            # Each window is pooled by itself; the rest of the state still carries what came before.
            state = state._replace(evidence=PoolingState(torch.zeros_like(state.evidence.total), 0))
        pooled, state = model(from_numpy(tokens[start:end], device)[None], state)
        evidence.append(to_numpy(pooled[0], torch.float64))
    return np.stack(evidence)


Item = TypeVar("Item")
Result = TypeVar("Result")


class Runner(Protocol):
    """Calls a function on every item and yields the results in order."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterable[Result]:
        """Yield `function(item)` for every item, in order."""
        ...


def _cpu_autocast() -> tuple[bool, torch.dtype]:
    """Whether the CPU computes in low precision in this thread, and in which."""
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def _begin_worker(threads: int, autocast: bool, dtype: torch.dtype) -> None:
    """Settings that each thread has for itself."""
    torch.set_num_threads(threads)
    torch.set_autocast_enabled("cpu", autocast)
    torch.set_autocast_dtype("cpu", dtype)


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
    with ThreadPoolExecutor(count, initializer=_begin_worker, initargs=(threads // count, *_cpu_autocast())) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown()
            # The number that a worker sets is its own, and also what threads that are started later begin with.
            torch.set_num_threads(threads)
