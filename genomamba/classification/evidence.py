"""Evidence for each class, averaged over both strands: for whole records, streamed records, and along a record.

Records of similar length are batched, padded on the right. The model is causal and unknown bases carry no evidence, so
padding does not affect the result. Batches depend only on the lengths and the order of the records, so results are the
same for any number of processes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from genomamba.classification.evidence_gate import GateState
from genomamba.classification.held_out import FloatArray, IntegerArray
from genomamba.models.species_classifier import BASES, FIRST_BASE_TOKEN, ClassifierState, SpeciesClassifier
from genomamba.tokenizer import ANY_BASE_TOKEN, COMPLEMENT_IDS, Tokens
from mambacore.devices import device_of, from_numpy, in_fitting_pieces, positions_at_once, to_numpy
from mambacore.layers import PoolingState

# Sizes of pieces and batches that fit in a CPU's cache; other devices take what fits their memory. The state carries
# over, so results do not depend on them.
PIECE_LENGTH_BP = 16_384
BASES_PER_FORWARD = 32_768


@dataclass(frozen=True)
class RecordEvidence:
    """Evidence for one record, before a class is called.

    Attributes:
        name: record name.
        length: record length, bp.
        known_bases: number of A, C, G and T.
        evidence: (classes,) per base, averaged over both strands, or (1 + parts, classes) if the model has counted
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
        """Return one line of JSON that preserves floating-point numbers exactly."""
        evidence = None if self.evidence is None else self.evidence.tolist()
        numbers = [self.source, self.own_likelihood, self.scored_words]
        return json.dumps([self.name, self.length, self.known_bases, evidence, *numbers]) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RecordEvidence:
        """Inverse of `to_line`."""
        name, length, known_bases, evidence, *numbers = json.loads(line)
        values = None if evidence is None else np.array(evidence, dtype=np.float64)
        return cls(name, length, known_bases, values, *numbers)


def count_known(tokens: Tokens) -> int:
    """Count the tokens that are A, C, G or T."""
    return int(np.count_nonzero((tokens >= FIRST_BASE_TOKEN) & (tokens < FIRST_BASE_TOKEN + BASES)))


def batches_by_length(
    lengths_bp: Sequence[int], may_pad: bool = True, bases_at_once: int = BASES_PER_FORWARD
) -> list[list[int]]:
    """Group records of similar length into batches.

    Args:
        lengths_bp: lengths of the records, bp.
        may_pad: whether records of different lengths may share a batch.
        bases_at_once: of a batch of several records, both strands and padding included.

    Returns:
        Batches of indices into `lengths_bp`.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths_bp)), key=lambda place: lengths_bp[place]):
        length = lengths_bp[place]
        fits = bool(batches) and 2 * length * (len(batches[-1]) + 1) <= bases_at_once
        if fits and (may_pad or lengths_bp[batches[-1][0]] == length):
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


class _Reached(NamedTuple):
    """What strands that are read in pieces have given so far."""

    pooled: Tensor | None = None  # (strands, classes), the stack's evidence
    state: ClassifierState | None = None
    gated: FloatArray | float = 0.0  # (strands, classes), the sum of the gate's evidence
    gate_state: GateState | None = None


def _advance(model: SpeciesClassifier, rows: Tokens, reached: _Reached) -> _Reached:
    """Read a piece (strands, length) with the stack, and with the gate if the model has one."""
    device = device_of(model)
    pooled, state = model(from_numpy(rows, device), reached.state)
    if model.parts is None or model.parts.gate is None:
        return _Reached(pooled, state)
    sums, gate_state = model.parts.gate_evidence(rows, reached.gate_state, device)
    return _Reached(pooled, state, reached.gated + sums[:, 0], gate_state)


def _with_gate(model: SpeciesClassifier, counted: FloatArray, gated: FloatArray | float) -> FloatArray:
    """Add the row of the gate (..., classes), if the model has one, to the evidence (..., rows, classes) of tables."""
    if model.parts is None or model.parts.gate is None:
        return counted
    return model.parts.with_gate(counted, np.asarray(gated))


def evidence_of_records(model: SpeciesClassifier, records: Sequence[Tokens] | Tokens) -> FloatArray:
    """Compute evidence per base for whole records, averaged over both strands.

    On a CPU each thread processes whole batches, so results do not depend on the number of threads.

    Args:
        model: the classifier, on any device.
        records: (length,) token ids of each record, at least one base; or one array (records, length).

    Returns:
        (records, classes) float64; (records, 1 + parts, classes), the stack first, if the model has counted parts.
    """
    # The last position of a padded row is beyond the end of its record.
    device, may_pad = device_of(model), model.config.pooling == "mean"
    at_once = positions_at_once(device, BASES_PER_FORWARD)
    batches = batches_by_length([len(tokens) for tokens in records], may_pad, at_once)
    evidence = np.empty((len(records), len(model.config.class_names)))
    gated = np.zeros_like(evidence)
    if model.parts is not None:
        _ = model.parts.gate_statistics  # before several threads need them
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    with _single_threads(threads) as run:
        parts = run(lambda places: _evidence_of_batch(model, [records[place] for place in places]), batches)
        for places, (stack, gate) in zip(batches, parts, strict=True):
            evidence[places], gated[places] = stack, gate
    if model.parts is None or not len(records):
        return evidence
    counted = np.stack([model.parts.evidence(tokens) / len(tokens) for tokens in records])
    return np.concatenate([evidence[:, None], _with_gate(model, counted, gated)], axis=1)


@torch.inference_mode()
def _evidence_of_batch(model: SpeciesClassifier, records: Sequence[Tokens]) -> tuple[FloatArray, FloatArray | float]:
    """Return evidence (records, classes) of the stack and of the gate, if any, for records padded to the longest."""
    rows = np.full((2 * len(records), max(len(tokens) for tokens in records)), ANY_BASE_TOKEN, dtype=np.uint8)
    for row, tokens in enumerate(records):
        rows[row, : len(tokens)] = tokens
        rows[len(records) + row, : len(tokens)] = COMPLEMENT_IDS[tokens[::-1]]
    reached = in_fitting_pieces(
        lambda piece, before: _advance(model, rows[:, piece], before),
        _Reached(),
        rows.shape[1],
        len(rows),
        device_of(model),
        PIECE_LENGTH_BP,
    )
    assert reached.state is not None  # every record has a base
    lengths = np.array([len(tokens) for tokens in records])[:, None]
    total = to_numpy(reached.state.evidence.total, torch.float64).reshape(2, len(records), -1).mean(axis=0)
    if model.config.pooling == "mean":
        total = total / lengths
    if reached.gate_state is None:
        return np.asarray(total), 0.0
    return np.asarray(total), np.reshape(reached.gated, (2, len(records), -1)).mean(axis=0) / lengths


def evidence_of_pieces(model: SpeciesClassifier, pieces: Iterable[tuple[Tokens, Tokens]]) -> FloatArray:
    """Compute evidence per base for a record given in pieces, averaged over both strands.

    With two threads each processes one strand; further threads are used within operators. On other devices than a CPU
    the strands go through the model together.

    Args:
        model: the classifier, on any device.
        pieces: pairs of the n-th piece of the forward strand and of the reverse complement, token ids of at least one
            base.

    Returns:
        (classes,) float64, or (1 + parts, classes) if the model has counted parts.
    """
    device = device_of(model)
    groups = ((0,), (1,)) if device.type == "cpu" else ((0, 1),)
    reached = [_Reached()] * len(groups)

    @torch.inference_mode()
    def read(number: int, piece: tuple[Tokens, Tokens]) -> None:
        rows = np.stack([piece[strand] for strand in groups[number]])
        length = rows.shape[1]
        reached[number] = in_fitting_pieces(
            lambda part, before: _advance(model, rows[:, part], before),
            reached[number],
            length,
            len(rows),
            device,
            length,
        )

    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if model.parts is not None:
        _ = model.parts.gate_statistics  # before several threads need them
    with _single_threads(threads, workers=2) as run:
        counted, length, before = np.zeros(()), 0, np.zeros(0, dtype=np.uint8)
        for piece in pieces:
            if model.parts is not None:
                # The tables hold the mean of both strands, so only the forward strand is needed.
                counted = counted + model.parts.evidence(piece[0], before)
                length += len(piece[0])
                before = np.concatenate([before, piece[0]])[-model.parts.history_bp :]
            list(run(lambda number, piece=piece: read(number, piece), range(len(groups))))  # type: ignore[misc]
    stack = to_numpy(torch.cat([of.pooled for of in reached if of.pooled is not None]), torch.float64).mean(axis=0)
    if model.parts is None:
        return stack
    gated = np.concatenate([np.atleast_2d(of.gated) for of in reached]).mean(axis=0)
    return np.concatenate([stack[None], _with_gate(model, counted, gated) / length])


@torch.inference_mode()
def evidence_along(model: SpeciesClassifier, tokens: Tokens, boundaries: IntegerArray) -> FloatArray:
    """Compute evidence per base for each window of a record given everything before it, averaged over both strands.

    Args:
        model: the classifier, on any device.
        tokens: (length,) token ids.
        boundaries: (windows + 1,) ascending positions, bp, from 0 to the length.

    Returns:
        (windows, classes) float64, or (windows, 1 + parts, classes) if the model has counted parts.
    """
    forward, gated = _strand_evidence_along(model, tokens, boundaries)
    reverse, gated_reverse = _strand_evidence_along(model, COMPLEMENT_IDS[tokens[::-1]], len(tokens) - boundaries[::-1])
    stack, gated = (forward + reverse[::-1]) / 2, (gated + gated_reverse[::-1]) / 2
    if model.parts is None:
        return stack
    history = model.parts.history_bp
    counted = [
        model.parts.evidence(tokens[start:end], tokens[max(0, start - history) : start]) / max(1, end - start)
        for start, end in itertools.pairwise(boundaries.tolist())
    ]
    return np.concatenate([stack[:, None], _with_gate(model, np.stack(counted), gated)], axis=1)


def split_evidence(model: SpeciesClassifier, evidence: FloatArray) -> tuple[FloatArray, FloatArray | None]:
    """Split evidence into that of the stack (..., classes) and of the counted parts (..., parts, classes), if any."""
    return (evidence, None) if model.parts is None else (evidence[..., 0, :], evidence[..., 1:, :])


def longest_markov_order(model: SpeciesClassifier) -> int:
    """Return the highest order of the Markov models among a classifier's parts; 0 without any."""
    return 0 if model.parts is None else max(model.parts.order, 0)


def markov_evidence(model: SpeciesClassifier, evidence: FloatArray) -> FloatArray:
    """Return the total evidence (..., classes) of the Markov models of all orders, as used in `novelty`.

    Args:
        model: a classifier with Markov models.
        evidence: (..., 1 + parts, classes).
    """
    return np.asarray(evidence[..., 1 : 1 + longest_markov_order(model), :].sum(axis=-2))


@torch.inference_mode()
def class_logits(model: SpeciesClassifier, evidence: FloatArray, lengths_bp: IntegerArray | int) -> FloatArray:
    """Return logits (records, classes) for evidence as returned by `evidence_of_records`.

    Args:
        model: the classifier, on any device.
        evidence: (records, classes) or (records, 1 + parts, classes), per base.
        lengths_bp: (records,) lengths, or one length for all.
    """
    stack, counted = split_evidence(model, evidence)
    lengths = np.broadcast_to(np.asarray(lengths_bp), len(evidence))
    device = device_of(model)
    evidence_on_device = from_numpy(stack, device)
    logits = to_numpy(model.logits(evidence_on_device, from_numpy(lengths, device)), torch.float64)
    if counted is None or model.combination is None:
        return logits
    return model.combination.logits(logits, counted, lengths)


def _strand_evidence_along(
    model: SpeciesClassifier, tokens: Tokens, boundaries: IntegerArray
) -> tuple[FloatArray, FloatArray]:
    """Compute `evidence_along` on one strand, of the stack and of the gate (0 without one)."""
    reached = _Reached()
    evidence, gated = [], []
    for start, end in itertools.pairwise(boundaries.tolist()):
        state = reached.state
        if state is not None:
            # Pooling restarts in each window; the rest of the state carries over.
            state = state._replace(evidence=PoolingState(torch.zeros_like(state.evidence.total), 0))
        reached = _advance(model, tokens[None, start:end], _Reached(state=state, gate_state=reached.gate_state))
        assert reached.pooled is not None
        evidence.append(to_numpy(reached.pooled[0], torch.float64))
        gated.append(np.broadcast_to(reached.gated, (1, len(evidence[-1])))[0] / max(1, end - start))
    return np.stack(evidence), np.stack(gated)


Item = TypeVar("Item")
Result = TypeVar("Result")


class Runner(Protocol):
    """Calls a function on every item and yields the results in order."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterable[Result]:
        """Yield `function(item)` for every item, in order."""
        ...


def _cpu_autocast() -> tuple[bool, torch.dtype]:
    """Return whether CPU autocast is enabled in this thread, and its dtype."""
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def _begin_worker(threads: int, autocast: bool, dtype: torch.dtype) -> None:
    """Initialise the per-thread settings of a worker."""
    torch.set_num_threads(threads)
    torch.set_autocast_enabled("cpu", autocast)
    torch.set_autocast_dtype("cpu", dtype)


@contextmanager
def _single_threads(threads: int, workers: int | None = None) -> Iterator[Runner]:
    """Distribute items over single-threaded workers, `threads` of them; with fewer `workers` each has several threads.

    PyTorch's own threads split every operator and spin while waiting for each other. On cores shared with other
    programs this took more than three times the CPU time; workers that process whole batches hardly wait.
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
            # The number set in a worker applies to it and is also the default for threads started later.
            torch.set_num_threads(threads)
