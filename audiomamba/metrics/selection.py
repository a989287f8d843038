"""Flags of defective generated clips, and likelihood thresholds for keeping clips."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from audiomamba.data.waveforms import condition_of
from mambacore.errors import InputError

CLIPPED_SHARE: Final = 0.01
LARGEST_MEAN: Final = 0.05
"""DC offset, as a share of full scale, that is audible as a click at both ends."""

RUNAWAY_LEVEL: Final = 0.3
"""Root mean square, as a share of full scale. Models that diverge produce white noise of this level."""

RUNAWAY_CROSSINGS: Final = 0.4
"""Changes of sign per sample: white noise has 0.5, fricatives at 16 kHz up to about 0.4 but far below that level."""

FEWEST_REAL_CLIPS: Final = 20

REAL_SHARE: Final = 0.9
"""Central share of real clips, whose range of likelihoods generated clips have to lie in."""


def flags_of(samples: Tensor) -> tuple[str, ...]:
    """Return the defects of (length,) samples, if any.

    `silent`, `clipped`, `shifted` (a DC offset) or `runaway` (loud noise).
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
    """Return the bounds for keeping generated clips: the central `REAL_SHARE` of real clips.

    Args:
        bits_per_sample: (clips,) bits per sample of real clips not trained on, under the generating model.

    Raises:
        InputError: if there are fewer than 20 clips, too few for their extremes to be meaningful.
    """
    if bits_per_sample.shape[0] < FEWEST_REAL_CLIPS:
        raise InputError(
            f"thresholds need {FEWEST_REAL_CLIPS} real clips but there are {bits_per_sample.shape[0]}; give more"
        )
    outside = (1 - REAL_SHARE) / 2
    low, high = torch.quantile(bits_per_sample.double(), torch.tensor([outside, 1 - outside], dtype=torch.float64))
    return float(low), float(high)
