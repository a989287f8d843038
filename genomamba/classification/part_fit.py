"""Fitting of the counted parts of a classifier, and of their weights by cross-validation over training sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor
from torch.nn import functional as F

from genomamba.baselines.interpolated_markov import StrandSymmetricCounts, fit_markov_models
from genomamba.baselines.words import BASES, reverse_complement_codes, word_counts
from genomamba.classification.combination import Combination, PartWindows, fit_combination
from genomamba.classification.evidence import count_known
from genomamba.classification.gate_fit import GatePieces, fit_gate
from genomamba.classification.held_out import FloatArray
from genomamba.classification.holdouts import fold_parts
from genomamba.classification.long_words import LongWords
from genomamba.classification.parts import CountedParts, KmerWeights, longest_order
from genomamba.data.genomes import GenomeCollection
from genomamba.data.windows import MAXIMUM_UNKNOWN_FRACTION
from genomamba.tokenizer import Tokens

FOLDS: Final = 5
KMERS: Final = (("kmer 4.weak", 4, 1e-4), ("kmer 6.weak", 6, 1e-3), ("kmer 6.strong", 6, 1e-1))
"""Name, word length and penalty of the squared weights, in units of each frequency's standard deviation."""
BLOCK_BP: Final = 256
LENGTHS_BP: Final = (256, 1024, 4096, 16_384, 65_536, 262_144)
FEWEST_WINDOWS: Final = 2
"""Smallest number of windows per class for a length to have its own coefficients."""
MOST_WINDOWS: Final = 600
MOST_WINDOW_VALUES: Final = 10_000_000
STRENGTH_BASES: Final = 400_000
"""Bases per class for choosing the strengths of the Markov models' priors."""
TESTED_CLASS_BASES: Final = 10**9
"""Limit of tested bases times classes: with many classes, part of each fold is enough."""
MANY_CLASSES: Final = 20
"""More classes than this are cross-validated in `FEW_FOLDS` of the folds, without regressions on 6-mers, which would
have more weights than windows and take hours."""
FEW_FOLDS: Final = 2
GATED_BASES: Final = 24_000_000
"""Limit of cross-validated bases, of all classes and folds, with a gate, which takes about 2 microseconds per base."""
KMER_BLOCK_BP: Final = 4096
KMER_WINDOW_BLOCKS: Final = (1, 4, 16)
KMER_BLOCKS: Final = 20_000
"""Total blocks of all classes; windows of regressions are runs of blocks."""
KMER_BLOCKS_PER_CLASS: Final = 1024
KMER_ITERATIONS: Final = 120


@dataclass(frozen=True)
class PartSettings:
    """The parts of a classifier.

    Attributes:
        markov, kmer, stack: whether to use interpolated Markov models, regressions on k-mers, and the selective stack.
        words: whether to use long words, beside Markov models or regressions.
        markov_order: the highest order; reduced if there are many classes (`parts.longest_order`).
        gate: whether to weight the Markov models base by base (`evidence_gate`), if there is sequence enough.
        gate_steps: most optimiser steps of the gate, 0.2 s of processor time each.
    """

    markov: bool = True
    kmer: bool = True
    stack: bool = True
    words: bool = True
    markov_order: int = 10
    gate: bool = True
    gate_steps: int = 300

    @property
    def counted(self) -> bool:
        """Whether there is any counted part."""
        return self.markov or self.kmer


@dataclass(frozen=True)
class PartFit:
    """Fitted parts, their weights, and their accuracy in cross-validation.

    Attributes:
        parts, combination: for the model.
        accuracy: kind of parts (`markov`, `kmer`, or `combined`) -> length, bp -> accuracy (0 to 1).
        windows: length, bp -> number of cross-validated windows.
    """

    parts: CountedParts
    combination: Combination
    accuracy: dict[str, dict[int, float]]
    windows: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in a JSON-serialisable form."""
        return {
            "cross_validated_accuracy": {
                kind: {str(length): value for length, value in of.items()} for kind, of in self.accuracy.items()
            },
            "cross_validated_windows": {str(length): count for length, count in self.windows.items()},
        }

    def summary(self) -> str:
        """Summarise in one line for the user."""
        figures = ", ".join(f"{value:.1%} at {length:,} bp" for length, value in self.accuracy["combined"].items())
        return f"counted parts ({', '.join(self.combination.alone)}) in cross-validation: {figures}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: small products do not gain from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def fit_parts(
    training: GenomeCollection,
    settings: PartSettings,
    seed: int,
    groups: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> PartFit | None:
    """Fit counts, regressions and weights; None if the sequences are too short to cross-validate or no part is used.

    Args:
        training: the training sequences.
        settings: the parts to fit.
        seed: seed for choosing windows.
        groups: homology groups, as in `holdouts.plan_holdouts`.
        progress: called with a description of each step.
    """
    classes = len(training.class_names)
    bases_per_class = min(sum(s.length for s in training.sequences_of(name)) for name in training.class_names)
    if not settings.counted or bases_per_class < FOLDS * FEWEST_WINDOWS * LENGTHS_BP[1]:
        return None
    order = longest_order(classes, bases_per_class, settings.markov_order) if settings.markov else -1
    strengths: tuple[float, ...] = ()
    found: dict[int, list[PartWindows]] = {}
    names: tuple[str, ...] = ()
    tested_folds = FOLDS if classes <= MANY_CLASSES else FEW_FOLDS
    pieces = GatePieces(classes, order, tested_folds) if settings.gate and settings.markov else None
    kept: list[tuple[int, GenomeCollection, dict[str, Tensor]]] = []
    for number, (fitting, tested) in enumerate(fold_parts(training, FOLDS, groups, first=tested_folds)):
        if _lacks_a_class(fitting) or _lacks_a_class(tested):
            continue
        progress(f"counted parts, fold {number + 1} of {tested_folds}")
        if settings.markov and not strengths:
            strengths = shared_strengths(fitting, tested, order)
        parts = fit_counts(fitting, settings, strengths, seed)
        names = parts.names
        if pieces is None:
            _add_windows(found, parts, tested, number, seed)
        else:
            pieces.add(parts, tested, number, seed)
            # As small as in a model folder: tables of all folds together may not fit in memory.
            kept.append((number, tested, parts.to_tensors()))
    gate = None if pieces is None else fit_gate(pieces, settings.gate_steps, seed, progress)
    del pieces
    for number, tested, tensors in kept:
        if gate is not None:
            progress(f"evidence of the gate, fold {number + 1} of {tested_folds}")
        parts = replace(CountedParts.from_tensors(tensors, names), gate=gate)
        _add_windows(found, parts, tested, number, seed)
    joined = {length: _joined(windows) for length, windows in sorted(found.items())}
    usable = {
        length: windows
        for length, windows in joined.items()
        if np.bincount(windows.labels, minlength=classes).min() >= FEWEST_WINDOWS
    }
    if not usable:
        return None
    progress("counted parts, whole training sequence")
    parts = replace(fit_counts(training, settings, strengths, seed), gate=gate)
    combination = fit_combination(usable, parts.names)
    if settings.words:
        words = LongWords.of_genomes(training)
        parts, combination = replace(parts, words=words), replace(combination, words_one_in=words.one_in)
    return PartFit(
        parts,
        combination,
        _cross_validated_accuracy(usable, combination, parts.names),
        {length: len(windows.labels) for length, windows in usable.items()},
    )


def _lacks_a_class(collection: GenomeCollection) -> bool:
    return any(not collection.sequences_of(name) for name in collection.class_names)


def _tokens_of(collection: GenomeCollection, class_name: str) -> Iterator[Tokens]:
    for sequence in collection.sequences_of(class_name):
        yield sequence.tokens(0, sequence.length)


def shared_strengths(fitting: GenomeCollection, tested: GenomeCollection, order: int) -> tuple[float, ...]:
    """Return geometric means over the classes of the best strengths of each on the tested sequences."""
    logarithms = []
    for name in fitting.class_names:
        validation, left = [], STRENGTH_BASES
        for sequence in sorted(tested.sequences_of(name), key=lambda sequence: -sequence.length):
            taken = min(left, sequence.length)
            validation.append(sequence.tokens(0, taken))
            left -= taken
            if not left:
                break
        if not any(count_known(tokens) for tokens in validation):
            continue
        model = fit_markov_models(_tokens_of(fitting, name), validation, order).models[-1]
        logarithms.append(np.log(model.strengths))
    return tuple(np.exp(np.mean(logarithms, axis=0)).tolist())


def fit_counts(
    fitting: GenomeCollection, settings: PartSettings, strengths: tuple[float, ...], seed: int
) -> CountedParts:
    """Count words and fit regressions on the sequences, with prior strengths from `shared_strengths`."""
    counts = []
    if settings.markov:
        counts = [
            StrandSymmetricCounts(len(strengths) - 1).add(_tokens_of(fitting, name)) for name in fitting.class_names
        ]
    kmers = _fit_kmers(fitting, seed) if settings.kmer else ()
    return CountedParts(tuple(counts), strengths, kmers)


def _fit_kmers(fitting: GenomeCollection, seed: int) -> tuple[KmerWeights, ...]:
    """Fit the regressions of `KMERS`, each on windows of a few lengths."""
    kmers = KMERS if len(fitting.class_names) <= MANY_CLASSES else KMERS[:1]
    longest = max(length for _, length, _ in kmers)
    spectra, labels, runs = _kmer_blocks(fitting, longest, seed)
    weights = []
    for name, length, penalty in kmers:
        numbers = _spectrum_numbers(length)
        # The spectrum of shorter words follows from that of longer ones, except for the last bases.
        shorter = spectra.reshape(len(spectra), BASES**length, -1).sum(axis=2)
        canonical = np.unique(numbers, return_index=True)[1]
        complements = reverse_complement_codes(length)[canonical]
        symmetric = shorter[:, canonical] + np.where(complements == canonical, 0, shorter[:, complements])
        weights.append(KmerWeights(name, _regression(symmetric, labels, runs, penalty)[numbers]))
    return tuple(weights)


def _spectrum_numbers(length: int) -> np.ndarray:
    """Return an index (4^length,) shared by each word and its reverse complement."""
    canonical = np.minimum(np.arange(BASES**length), reverse_complement_codes(length))
    return np.unique(canonical, return_inverse=True)[1]


def _kmer_blocks(fitting: GenomeCollection, word_length: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return word frequencies (blocks, 4^word_length), labels (blocks,), and runs (blocks,) of adjacent blocks."""
    per_class = min(KMER_BLOCKS_PER_CLASS, KMER_BLOCKS // len(fitting.class_names))
    smallest = min(sum(s.length for s in fitting.sequences_of(name)) for name in fitting.class_names)
    block_bp = int(np.clip(smallest // 64, BLOCK_BP, KMER_BLOCK_BP))
    rows, labels, runs = [], [], []
    per_run = max(KMER_WINDOW_BLOCKS)
    for label, name in enumerate(fitting.class_names):
        places = [
            (sequence, start)
            for sequence in fitting.sequences_of(name)
            for start in range(0, sequence.length, per_run * block_bp)
        ]
        left = per_class
        for number in np.random.default_rng([seed, 21, label]).permutation(len(places)):
            if left <= 0:
                break
            sequence, start = places[number]
            tokens = sequence.tokens(start, min(sequence.length, start + per_run * block_bp))
            # A contig shorter than a block counts as one.
            for first in range(0, max(1, len(tokens) - block_bp // 2), block_bp):
                block = tokens[first : first + block_bp]
                counts = word_counts(block, word_length)
                if counts.sum() < len(block) / 2:
                    continue
                rows.append((counts / counts.sum()).astype(np.float32))
                labels.append(label)
                runs.append(number + (label << 32))
                left -= 1
    return np.stack(rows), np.array(labels), np.array(runs)


def _regression(spectra: np.ndarray, labels: np.ndarray, runs: np.ndarray, penalty: float) -> np.ndarray:
    """Fit weights per word (words, classes) by multinomial logistic regression on windows of several lengths.

    Logits grow with the square root of the window's length, so that one set of weights serves all lengths; the
    combination corrects the rest.
    """
    windows, of_window, factors, importance = [], [], [], []
    starts = np.flatnonzero(np.diff(runs, prepend=runs[0] - 1))
    for blocks in KMER_WINDOW_BLOCKS:
        means, own = [], []
        for start, end in zip(starts, [*starts[1:], len(runs)], strict=True):
            whole = (end - start) // blocks
            if whole:
                run = spectra[start : start + whole * blocks]
                means.append(run.reshape(whole, blocks, -1).mean(axis=1))
                own += [labels[start]] * whole
        counts = np.bincount(own, minlength=labels.max() + 1) if own else np.zeros(1)
        if not counts.min():
            continue
        windows.append(np.concatenate(means))
        of_window.append(np.array(own))
        factors.append(np.full(len(own), np.sqrt(blocks)))
        importance.append(1 / counts[own])
    mean = windows[0].mean(axis=0)
    spread = windows[0].std(axis=0) + 1e-8
    inputs = torch.from_numpy((np.concatenate(windows) - mean) / spread)
    targets = torch.from_numpy(np.concatenate(of_window))
    factor = torch.from_numpy(np.concatenate(factors)).float().unsqueeze(1)
    weight = torch.from_numpy(np.concatenate(importance)).float()
    weight = weight / weight.sum()
    matrix = torch.zeros(inputs.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(matrix.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([matrix, bias], max_iter=KMER_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        entropy = F.cross_entropy((inputs @ matrix + bias) * factor, targets, reduction="none") @ weight
        loss = entropy + penalty * matrix.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    per_word = matrix.detach().numpy() / spread[:, None]
    # Frequencies sum to one, so a constant added to every word is a constant of the window.
    return (per_word + (bias.detach().numpy() - mean @ per_word)).astype(np.float32)


def _add_windows(
    found: dict[int, list[PartWindows]], parts: CountedParts, tested: GenomeCollection, fold: int, seed: int
) -> None:
    for length, windows in _windows(parts, tested, fold, seed).items():
        found.setdefault(length, []).append(windows)


def _windows(parts: CountedParts, tested: GenomeCollection, fold: int, seed: int) -> dict[int, PartWindows]:
    """Compute the evidence of windows of every length: all of the tested sequences, or a random sample."""
    classes = len(tested.class_names)
    per_class = int(min(MOST_WINDOWS, MOST_WINDOW_VALUES / (classes**2 * len(parts.names))) / FOLDS) + 1
    most_bases = TESTED_CLASS_BASES // classes**2
    if parts.gate is not None:
        most_bases = min(most_bases, GATED_BASES // (classes * FOLDS))
    collected: dict[int, list[tuple[FloatArray, int]]] = {}
    for label, name in enumerate(tested.class_names):
        of_length: dict[int, list[FloatArray]] = {}
        left = most_bases
        for sequence in sorted(tested.sequences_of(name), key=lambda sequence: -sequence.length):
            if left < BLOCK_BP or sequence.length < BLOCK_BP:
                break
            tokens = sequence.tokens(0, min(sequence.length, left))
            left -= len(tokens)
            evidence = parts.block_evidence(tokens, BLOCK_BP)
            if parts.gate is not None:
                evidence = parts.with_gate(evidence, parts.gate_block_evidence(tokens, BLOCK_BP))
            whole = tokens[: len(evidence) * BLOCK_BP].reshape(len(evidence), BLOCK_BP)
            known = np.array([count_known(block) for block in whole])
            for length in LENGTHS_BP:
                windows = _runs(evidence, known, length // BLOCK_BP)
                if len(windows):
                    of_length.setdefault(length, []).append(windows)
        for length, found in of_length.items():
            windows = np.concatenate(found)
            random = np.random.default_rng([seed, 22, label, length])
            chosen = np.sort(random.permutation(len(windows))[:per_class])
            collected.setdefault(length, []).append((windows[chosen], label))
    return {
        length: PartWindows(
            np.concatenate([windows for windows, _ in found]),
            np.concatenate([np.full(len(windows), label) for windows, label in found]),
            np.full(sum(len(windows) for windows, _ in found), fold),
        )
        for length, found in collected.items()
    }


def _runs(evidence: FloatArray, known: np.ndarray, blocks: int) -> FloatArray:
    """Return mean evidence per base of runs of adjacent blocks with few unknown bases; long runs overlap by 3/4."""
    if len(evidence) < blocks:
        return np.zeros((0, *evidence.shape[1:]))
    starts = np.arange(0, len(evidence) - blocks + 1, max(1, blocks // 4) if blocks > 4 else blocks)
    sums = np.concatenate([np.zeros((1, *evidence.shape[1:])), np.cumsum(evidence, axis=0)])
    bases = np.concatenate([[0], np.cumsum(known)])
    length = blocks * BLOCK_BP
    starts = starts[bases[starts + blocks] - bases[starts] >= (1 - MAXIMUM_UNKNOWN_FRACTION) * length]
    return (sums[starts + blocks] - sums[starts]) / length


def _joined(windows: Sequence[PartWindows]) -> PartWindows:
    return PartWindows(
        np.concatenate([part.evidence for part in windows]),
        np.concatenate([part.labels for part in windows]),
        np.concatenate([part.folds for part in windows]),
    )


def _cross_validated_accuracy(
    windows: Mapping[int, PartWindows], combination: Combination, names: tuple[str, ...]
) -> dict[str, dict[int, float]]:
    """Return the accuracy of each kind of part and of the combination, with coefficients from the other folds."""
    found: dict[str, dict[int, float]] = {kind: {} for kind in (*combination.alone, "combined")}
    folds = np.unique(np.concatenate([part.folds for part in windows.values()]))
    correct: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in found}
    for fold in folds:
        rest = {
            length: PartWindows(*(values[part.folds != fold] for values in (part.evidence, part.labels, part.folds)))
            for length, part in windows.items()
        }
        rest = {length: part for length, part in rest.items() if len(np.unique(part.labels)) == part.evidence.shape[2]}
        if not rest:
            continue
        fitted = fit_combination(rest, names)
        for kind, weights in {**fitted.alone, "combined": fitted.counted}.items():
            for length, part in windows.items():
                inside = part.folds == fold
                logits = weights.logits(part.evidence[inside], np.full(int(inside.sum()), length))
                right = correct[kind].setdefault(length, np.zeros(len(part.labels)))
                right[inside] = log_softmax(logits, axis=1).argmax(axis=1) == part.labels[inside]
    for kind, by_length in correct.items():
        for length, right in by_length.items():
            labels = windows[length].labels
            found[kind][length] = float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
    return found
