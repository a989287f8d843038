"""Preparation of a clip before it is quantised: one gain per clip, and trimming of trailing silence.

Loudness dominates the bits per sample (quiet clips occupy few classes) and hides what a model has learned. So each clip
is multiplied by one factor towards a target level, which keeps its dynamics and its zero. Clips are never normalised to
their own minimum and maximum, which would turn silence into full-scale noise and shift zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from mambacore.errors import InputError

FRAME_SECONDS: Final = 0.01
"""Duration of the frames whose level separates sound from silence."""

KEPT_SECONDS: Final = 0.03
"""Silence kept after the last sound, so that fade-outs are not cut."""

LARGEST_PEAK: Final = 1.0
"""Largest amplitude after the gain: a gain that would clip is reduced."""


class ClipMeasure(NamedTuple):
    """Gain and length of a clip, determined in a first pass over it."""

    gain: float
    samples: int  # samples that are kept


@dataclasses.dataclass(frozen=True)
class ClipPreparation:
    """How clips are prepared; stored with a model, which expects clips prepared this way.

    Attributes:
        target_rms: root mean square (full scale is 1) that each clip is brought to; 0 leaves the loudness unchanged.
        largest_gain: upper limit of the gain factor, so that silence stays silent.
        trim_db: the end of a clip is cut off where all 10-ms frames are this many decibels below the loudest one, but
            for its first 30 ms; 0 disables trimming. For training only: a prompt keeps its end.
        typical_gain: median gain of the training clips; generated sound is louder than theirs by this factor.

    Raises:
        InputError: if a value is out of range.
    """

    target_rms: float = 0.0
    largest_gain: float = 20.0
    trim_db: float = 0.0
    typical_gain: float = 1.0

    def __post_init__(self) -> None:
        ranges = {"target_rms": (0, 0.5), "largest_gain": (1, 1e4), "trim_db": (0, 120), "typical_gain": (1e-6, 1e6)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise InputError(f"{name} of the preparation is {value!r}; give a number from {low:g} to {high:g}")

    @property
    def changes_loudness(self) -> bool:
        """Whether clips get a gain."""
        return self.target_rms > 0

    @property
    def changes_nothing(self) -> bool:
        """Whether clips are left unchanged, so that they need not be measured."""
        return not self.changes_loudness and self.trim_db == 0

    def without_trimming(self) -> ClipPreparation:
        """The same preparation without trimming, for scoring and for prompts."""
        return dataclasses.replace(self, trim_db=0.0)

    def measure(self, pieces: Iterable[Tensor], sample_rate_hz: int) -> ClipMeasure:
        """Measure the gain and the length of a clip.

        Args:
            pieces: its samples, in (length,) pieces.
            sample_rate_hz: rate of the samples.
        """
        frame = max(1, round(FRAME_SECONDS * sample_rate_hz))
        levels, peak, total, rest = [], 0.0, 0, torch.empty(0)
        for piece in pieces:
            peak = max(peak, float(piece.abs().max())) if piece.shape[0] else peak
            total += piece.shape[0]
            joined = torch.cat([rest, piece])
            whole = joined.shape[0] // frame * frame
            levels.append(joined[:whole].double().square().unflatten(0, (-1, frame)).mean(1) if whole else rest[:0])
            rest = joined[whole:]
        powers = torch.cat([level.double() for level in levels]) if levels else torch.empty(0, dtype=torch.float64)
        kept = self._kept(powers, frame, total, sample_rate_hz)
        energy = float(powers[: kept // frame].sum()) * frame
        if kept == total and rest.shape[0]:
            energy += float(rest.double().square().sum())
        return ClipMeasure(self._gain(math.sqrt(energy / max(1, kept)), peak), kept)

    def apply(self, pieces: Iterable[Tensor], measure: ClipMeasure) -> Iterator[Tensor]:
        """Yield the prepared samples of the measured clip, piece by piece."""
        left = measure.samples
        for piece in pieces:
            yield piece[:left] * measure.gain
            left -= min(left, piece.shape[0])

    def prepared(self, samples: Tensor, sample_rate_hz: int) -> tuple[Tensor, float]:
        """Return the prepared (length,) samples and their gain."""
        measure = self.measure([samples], sample_rate_hz)
        return samples[: measure.samples] * measure.gain, measure.gain

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_config` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, values: object) -> ClipPreparation:
        """Inverse of `to_config`.

        Raises:
            InputError: if `values` is not a mapping, or has an unknown key or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or any(name not in known for name in values):
            raise InputError(f"the preparation of clips is {values!r}; known keys are {', '.join(known)}")
        return cls(**values)

    def _gain(self, rms: float, peak: float) -> float:
        if not self.changes_loudness or rms == 0:
            return 1.0
        return min(self.target_rms / rms, self.largest_gain, LARGEST_PEAK / peak)

    def _kept(self, powers: Tensor, frame: int, total: int, sample_rate_hz: int) -> int:
        if self.trim_db == 0 or powers.shape[0] == 0:
            return total
        heard = (powers > powers.max() * 10 ** (-self.trim_db / 10)).nonzero()
        if not len(heard):  # all zeros
            return total
        return min(total, (int(heard[-1]) + 1) * frame + round(KEPT_SECONDS * sample_rate_hz))
