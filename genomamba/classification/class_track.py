"""Class probabilities along a record: of each window, given everything before it on the same strand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import softmax

from genomamba.classification.evidence import class_logits, evidence_along
from genomamba.models.species_classifier import SpeciesClassifier
from genomamba.tokenizer import Tokens

SHORTEST_WINDOW_BP = 64
MOST_WINDOWS = 200


class ClassTrack(NamedTuple):
    """Class probabilities along a record.

    Attributes:
        borders: (windows + 1,) window boundaries, bp from the start.
        probabilities: (windows, classes) of each window by itself.
    """

    borders: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]


@torch.inference_mode()
def class_track(model: SpeciesClassifier, tokens: Tokens, most_windows: int = MOST_WINDOWS) -> ClassTrack:
    """Compute the track of one record, averaged over both strands.

    Args:
        model: a species classifier.
        tokens: (length,) uint8, at least one.
        most_windows: a long record gets this many windows of equal length, a short one windows of 64 bp.
    """
    length = len(tokens)
    windows = max(1, min(most_windows, length // SHORTEST_WINDOW_BP))
    borders = np.linspace(0, length, windows + 1).round().astype(np.int64)
    logits = class_logits(model, evidence_along(model, tokens, borders), np.diff(borders))
    return ClassTrack(borders, softmax(logits, axis=1))
