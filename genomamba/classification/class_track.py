"""Class probabilities along a record, for each window given everything before it on the same strand."""

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
        boundaries: (windows + 1,) window boundaries, bp from the start.
        probabilities: (windows, classes), each from the window alone.
    """

    boundaries: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]


@torch.inference_mode()
def class_track(model: SpeciesClassifier, tokens: Tokens, most_windows: int = MOST_WINDOWS) -> ClassTrack:
    """Compute the class track of one record, averaged over both strands.

    Args:
        model: a species classifier.
        tokens: (length,) uint8, at least one.
        most_windows: long records are cut into this many windows of equal length, short ones into windows of 64 bp.
    """
    length = len(tokens)
    windows = max(1, min(most_windows, length // SHORTEST_WINDOW_BP))
    boundaries = np.linspace(0, length, windows + 1).round().astype(np.int64)
    logits = class_logits(model, evidence_along(model, tokens, boundaries), np.diff(boundaries))
    return ClassTrack(boundaries, softmax(logits, axis=1))
