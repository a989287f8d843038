"""What is wrong with a generated clip, and how likely a clip must be to be kept."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from audiomamba.data.waveforms import condition_of
from mambacore.errors import InputError

CLIPPED_SHARE: Final = 0.01
LARGEST_MEAN: Final = 0.05
"""Of full scale: a constant part that is heard as a click at both ends."""

RUNAWAY_LEVEL: Final = 0.3
"""Root mean square of full scale. White noise of such strength is what a model that lost its way produces."""

RUNAWAY_CROSSINGS: Final = 0.4
"""Changes of sign per sample: white noise has 0.5, fricatives at 16 kHz up to about 0.4 but far below that level."""

FEWEST_REAL_CLIPS: Final = 20

REAL_SHARE: Final = 0.9
"""Of real clips, the middle ones, between whose likelihoods a searched rejection keeps generated ones."""


def flags_of(samples: Tensor) -> tuple[str, ...]:
    """What should keep (length,) samples from being passed off as a result; nothing for a sound clip.

    `silent`, `clipped`, `shifted` (a constant part) or `runaway` (loud noise).
    """
    condition = condition_of(samples)
    found = []
    if condition.is_silent or float(samples.std(correction=0)) < 1e-4:
        found.append("silent")
    if condition.clipped_fraction > CLIPPED_SHARE:
        found.append("clipped")
    if abs(condition.mean) > LARGEST_MEAN:
        found.append("shifted")
    level = math.sqrt(float(samples.double().square().mean()))
    crossings = float((samples[1:].sign() != samples[:-1].sign()).double().mean()) if samples.shape[0] > 1 else 0.0
    if level > RUNAWAY_LEVEL and crossings > RUNAWAY_CROSSINGS:
        found.append("runaway")
    return tuple(found)


def likelihoods_of_real_clips(bits_per_sample: Tensor) -> tuple[float, float]:
    """The bounds between which a generated clip is kept: those of the middle `REAL_SHARE` of real clips.

    Args:
        bits_per_sample: (clips,), of real clips that were not trained on, under the model that generates.

    Raises:
        InputError: fewer than 20 clips, whose extremes say nothing.
    """
    if bits_per_sample.shape[0] < FEWEST_REAL_CLIPS:
        raise InputError(
            f"thresholds need {FEWEST_REAL_CLIPS} real clips but there are {bits_per_sample.shape[0]}; give more"
        )
    outside = (1 - REAL_SHARE) / 2
    low, high = torch.quantile(bits_per_sample.double(), torch.tensor([outside, 1 - outside], dtype=torch.float64))
    return float(low), float(high)
