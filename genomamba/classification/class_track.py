"""Which class speaks along a record: the evidence of each window, given everything before it on the same strand."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genomamba.models.species_classifier import ClassifierState, SpeciesClassifier
from genomamba.tokenizer import COMPLEMENT_IDS, Tokens
from mambacore.layers import PoolingState

SHORTEST_WINDOW_BP = 64
MOST_WINDOWS = 200


class ClassTrack(NamedTuple):
    """Probabilities of the classes along a record.

    Attributes:
        borders: (windows + 1,) of the windows, in bp from the start.
        probabilities: (windows, classes) of each window by itself.
    """

    borders: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]


@torch.inference_mode()
def class_track(model: SpeciesClassifier, tokens: Tokens, most_windows: int = MOST_WINDOWS) -> ClassTrack:
    """The track of one record, both strands averaged.

    Args:
        model: a species classifier.
        tokens: (length,) uint8, at least one.
        most_windows: a long record gets this many windows of equal length, a short one windows of 64 bp.
    """
    length = len(tokens)
    windows = max(1, min(most_windows, length // SHORTEST_WINDOW_BP))
    borders = np.linspace(0, length, windows + 1).round().astype(np.int64)
    forward = _window_evidence(model, tokens, borders)
    other_strand = COMPLEMENT_IDS[tokens[::-1]]
    reverse = _window_evidence(model, other_strand, length - borders[::-1])[::-1]
    evidence = torch.from_numpy((forward + reverse) / 2)
    logits = model.logits(evidence, torch.from_numpy(np.diff(borders)))
    return ClassTrack(borders, torch.softmax(logits.double(), dim=-1).numpy())


def _window_evidence(
    model: SpeciesClassifier, tokens: Tokens, borders: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Evidence per base of each window, (windows, classes), on one strand."""
    state: ClassifierState | None = None
    evidence = []
    for start, end in itertools.pairwise(borders.tolist()):
        if state is not None:
            # Each window is pooled by itself; all else that came before is still known.
            state = state._replace(evidence=PoolingState(torch.zeros_like(state.evidence.total), 0))
        pooled, state = model(torch.from_numpy(tokens[start:end][None].copy()), state)
        evidence.append(pooled[0].double().numpy())
    return np.stack(evidence)
