"""A small untrained species classifier and small FASTA files, for tests of the commands."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genomamba.baselines.interpolated_markov import StrandSymmetricCounts
from genomamba.classification.combination import Combination, CountedWeights
from genomamba.classification.evidence_gate import EvidenceGate
from genomamba.classification.parts import CountedParts, KmerWeights
from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig, save_classifier
from genomamba.tokenizer import ANY_BASE_TOKEN

CLASS_NAMES = ("alba", "nigra", "rubra")


def tiny_model(class_names: tuple[str, ...] = CLASS_NAMES) -> SpeciesClassifier:
    """A small model with random heads, whose probabilities are neither all alike nor all 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = SpeciesClassifier(
            SpeciesClassifierConfig(class_names=class_names, model_width=8, layers=2, state_size=2)
        )
        with torch.no_grad():
            for head in (model.class_next_base, model.deviation):
                head.weight.normal_(std=0.3)
            model.confidence_intercept.fill_(1.5)
            model.confidence_slope.fill_(0.1)
    return model.eval()


def write_tiny_model(folder: Path, details: dict[str, Any] | None = None) -> Path:
    """Save the small model; returns the folder."""
    save_classifier(folder, tiny_model(), details=details or {})
    return folder


def bases(length: int, seed: int = 0, gc: float = 0.5) -> bytes:
    """Random letters with the given share of G and C."""
    weak, strong = (1 - gc) / 2, gc / 2
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    return np.random.default_rng(seed).choice(letters, size=length, p=[weak, strong, strong, weak]).tobytes()


def fasta(records: Mapping[str, bytes]) -> bytes:
    """FASTA text with one line per sequence."""
    return b"".join(b">" + name.encode() + b"\n" + sequence + b"\n" for name, sequence in records.items())


def random_bases(length: int, seed: int = 0) -> np.ndarray:
    """Token ids of bases at random with three unknown ones among them."""
    tokens = (7 + np.random.default_rng(seed).integers(0, 4, length)).astype(np.uint8)
    tokens[length // 3 : length // 3 + 3] = ANY_BASE_TOKEN
    return tokens


def some_parts() -> CountedParts:
    """Markov models of the orders 1 to 3 and a regression on pairs."""
    random = np.random.default_rng(1)
    counts = [StrandSymmetricCounts(3).add([random_bases(3000, seed)]) for seed in range(len(CLASS_NAMES))]
    weights = random.normal(size=(16, len(CLASS_NAMES))).astype(np.float32)
    complements = np.array([15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0])
    return CountedParts(counts, (10.0, 5.0, 4.0, 2.0), (KmerWeights("kmer 2.x", weights + weights[complements]),))


def some_gate() -> EvidenceGate:
    """A small gate on the orders 1 and 3 whose weights vary along a sequence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        gate = EvidenceGate((1, 3), width=8)
        torch.nn.init.normal_(gate.gate.weight)
    return gate.eval().requires_grad_(False)


def combined_model(gated: bool = False) -> SpeciesClassifier:
    """The tiny model with counted parts beside it, and a gate on them."""
    model = tiny_model()
    model.parts = replace(some_parts(), gate=some_gate() if gated else None)
    count = len(model.parts.names)
    weights = CountedWeights(
        np.array([100.0, 1000.0]), np.full((2, count), 0.5), np.array([[0.1, 0.0, -0.1], [0.0, 0.2, 0.0]])
    )
    model.combination = Combination(
        model.parts.names, weights, {"markov": weights}, (0.1, 0.0), (0.3, 0.01), (64, 4096)
    )
    return model
