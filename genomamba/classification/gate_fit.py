"""Training of the evidence gate on pieces whose evidence comes from counts that were made without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genomamba.baselines.words import BASES
from genomamba.classification.evidence import count_known
from genomamba.classification.evidence_gate import GATED_ORDERS, STATISTICS, EvidenceGate, statistics_table
from genomamba.classification.parts import CountedParts, word_ends
from genomamba.data.genomes import GenomeCollection
from genomamba.data.windows import MAXIMUM_UNKNOWN_FRACTION
from genomamba.tokenizer import ANY_BASE_TOKEN, COMPLEMENT_IDS, Tokens

PIECE_BP: Final = 4096
TRAINED_LENGTHS_BP: Final = (256, 1024, 4096)
"""Lengths of the windows within a piece that are classified in training, each with the same weight."""
MOST_BYTES: Final = 2**30
"""Of the evidence of all pieces, whatever the number of classes."""
KEPT_CLASSES: Final = 8
"""With more classes, a piece is told from the classes only whose evidence is highest."""
FEWEST_PIECES: Final = 100
"""Of all classes together: with less sequence there is no gate."""
PIECES_PER_STEP: Final = 16
MOST_PASSES: Final = 1.5
"""Smaller genomes are trained on for fewer steps than the recipe's."""
LEARNING_RATE: Final = 3e-3
WEIGHT_DECAY: Final = 0.02
WARMUP_STEPS: Final = 20
GRADIENT_CLIP: Final = 1.0


class GatePieces:
    """A sample of pieces of the training sequences, equally many of every class and fold as far as there are.

    Args:
        classes: number of classes.
        order: the highest order of the Markov models.
        folds: number of folds that pieces come from.
    """

    def __init__(self, classes: int, order: int, folds: int) -> None:
        self.orders = tuple(of_gate for of_gate in GATED_ORDERS if of_gate <= order)
        self.kept = min(classes, KEPT_CLASSES)
        bytes_per_base = 2 * len(self.orders) * (STATISTICS + self.kept) + 1
        self.per_class = max(1, MOST_BYTES // (bytes_per_base * PIECE_BP * classes * folds))
        shape = (PIECE_BP, len(self.orders))
        # Memory that is not written to is not taken.
        most = self.per_class * classes * folds
        self._statistics = np.empty((most, *shape, STATISTICS), dtype=np.float16)
        self._deviations = np.empty((most, *shape, self.kept), dtype=np.float16)
        self._tokens = np.empty((most, PIECE_BP), dtype=np.uint8)
        self._places: list[list[int]] = [[] for _ in range(classes)]

    @property
    def count(self) -> int:
        """Number of pieces."""
        return sum(map(len, self._places))

    @property
    def has_every_class(self) -> bool:
        """Whether there is a piece of every class."""
        return all(self._places)

    def add(self, parts: CountedParts, tested: GenomeCollection, fold: int, seed: int) -> None:
        """Add pieces of sequences that the parts were fitted without; each is read on a strand chosen at random."""
        tables = [parts.tables[order - 1] for order in self.orders]
        statistics = [statistics_table(table) for table in tables]
        for label, name in enumerate(tested.class_names):
            random = np.random.default_rng([seed, 23, fold, label])
            for tokens in _sampled_pieces(tested, name, self.per_class, random):
                piece = COMPLEMENT_IDS[tokens[::-1]] if random.random() < 0.5 else tokens
                place = self.count
                codes, known = word_ends(piece, self.orders[-1] + 1)
                values = np.zeros((PIECE_BP, len(self.orders), parts.class_count), dtype=np.float32)
                self._statistics[place] = 0
                for number, order in enumerate(self.orders):
                    words, complete = codes & np.int32(BASES ** (order + 1) - 1), known > order
                    values[complete, number] = tables[number].take(words[complete], axis=0)
                    self._statistics[place][complete, number] = statistics[number].take(words[complete], axis=0)
                values -= values.mean(axis=2, keepdims=True)
                # The true class comes first, then those that are hardest to tell from it.
                strongest = np.argsort(-values.sum(axis=(0, 1)), kind="stable")
                rivals = [rival for rival in strongest.tolist() if rival != label]
                self._deviations[place] = values[:, :, [label, *rivals[: self.kept - 1]]]
                self._tokens[place] = piece
                self._places[label].append(place)

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return statistics, deviations and tokens of the pieces of a step, of all classes in turn."""
        random = np.random.default_rng([seed, 24, step])
        labels = (np.arange(PIECES_PER_STEP) + step * PIECES_PER_STEP) % len(self._places)
        chosen = [self._places[label][random.integers(len(self._places[label]))] for label in labels]
        statistics, deviations = (torch.from_numpy(of[chosen]).float() for of in (self._statistics, self._deviations))
        return statistics, deviations, torch.from_numpy(self._tokens[chosen])


def fit_gate(
    pieces: GatePieces, steps: int, seed: int, progress: Callable[[str], None] = lambda _: None
) -> EvidenceGate | None:
    """Train a gate; None if there is too little sequence.

    The result depends on the pieces, the steps and the seed only. More passes over the pieces overfit them, although
    the gate does not know the classes (docs/experiments.md).

    Args:
        pieces: the training material.
        steps: optimiser steps, for which small genomes have fewer (`MOST_PASSES`).
        seed: of the first weights and of the choice of pieces.
        progress: called with a description of each step.
    """
    if pieces.count < FEWEST_PIECES or not pieces.has_every_class:
        return None
    steps = min(steps, max(1, int(MOST_PASSES * pieces.count / PIECES_PER_STEP)))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        gate = EvidenceGate(pieces.orders)
        # Evidence of windows grows more slowly than with their length; only ratios of the weights matter here.
        log_scales = torch.zeros(len(TRAINED_LENGTHS_BP), requires_grad=True)
        parameters = [*gate.parameters(), log_scales]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for step in range(steps):
            progress(f"evidence gate, step {step} of {steps}")
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
            optimizer.zero_grad()
            _loss(gate, log_scales, pieces.batch(seed, step)).backward()
            nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
            optimizer.step()
    return gate.eval().requires_grad_(False)


def _loss(gate: EvidenceGate, log_scales: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy over the windows of the trained lengths; the true class is the first."""
    statistics, deviations, tokens = batch
    weights, _ = gate(statistics, tokens)
    evidence = torch.einsum("blk,blkc->blc", weights, deviations)
    losses = []
    for length, log_scale in zip(TRAINED_LENGTHS_BP, log_scales, strict=True):
        logits = (evidence.unflatten(1, (-1, length)).sum(2) * log_scale.exp()).flatten(0, 1)
        losses.append(F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)))
    return torch.stack(losses).mean()


def _sampled_pieces(
    tested: GenomeCollection, class_name: str, wanted: int, random: np.random.Generator
) -> Iterator[Tokens]:
    """Yield pieces (length,) of a class chosen at random; shorter contigs are joined with an unknown base between."""
    sequences = tested.sequences_of(class_name)
    starts: list[tuple[int, int] | Tokens] = [
        (number, start)
        for number, sequence in enumerate(sequences)
        for start in range(0, sequence.length - PIECE_BP + 1, PIECE_BP)
    ]
    starts += _joined_contigs(
        [sequence.tokens(0, sequence.length) for sequence in sequences if sequence.length < PIECE_BP]
    )
    for place in random.permutation(len(starts)):
        if not wanted:
            return
        chosen = starts[place]
        if isinstance(chosen, tuple):
            number, start = chosen
            chosen = sequences[number].tokens(start, start + PIECE_BP)
        if count_known(chosen) >= (1 - MAXIMUM_UNKNOWN_FRACTION) * PIECE_BP:
            wanted -= 1
            yield chosen


def _joined_contigs(contigs: Sequence[Tokens]) -> list[Tokens]:
    gap = np.array([ANY_BASE_TOKEN], dtype=np.uint8)
    joined = np.concatenate([gap, *(part for contig in contigs for part in (contig, gap))])
    return [joined[start : start + PIECE_BP] for start in range(0, len(joined) - PIECE_BP + 1, PIECE_BP)]
