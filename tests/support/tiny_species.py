"""A small untrained species classifier and small FASTA files, for tests of the commands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig, save_classifier

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
