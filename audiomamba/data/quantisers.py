"""Conversion between samples and classes, on a scale that is fixed per model.

A quantiser belongs to a model like a tokenizer: it is stored with it, with the sampling rate and a version. The scale
never depends on the clip: with per-clip normalisation, silence would decode to a full-scale tone or a constant, and
zero would be a different class in every clip.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from audiomamba.data.sound_files import FASTEST_RATE_HZ
from mambacore.errors import InputError

SCHEMES: Final = ("mu-law", "linear")
FEWEST_BITS: Final = 8
MOST_BITS: Final = 16
QUANTISER_VERSION: Final = 1
"""Version of the formulas below; a model is only ever used with the version it was trained with."""


@dataclasses.dataclass(frozen=True)
class Quantiser:
    """Converts samples to classes and classes to samples.

    With Q = 2^bits classes and a sample x, divided by `full_scale` and clamped to [-1, 1]:

    - `mu-law` (ITU-T G.711's continuous curve with mu = Q - 1, as in WaveNet, arXiv 1609.03499, section 2.2):
      y = sign(x) log(1 + mu |x|) / log(1 + mu), class = floor((y + 1) / 2 * mu + 1/2). Zero lies between two classes
      and maps to the upper one, Q / 2, which decodes to -81 dB of full scale with 8 bits.
    - `linear` (unsigned PCM): class = floor(x * Q / 2 + Q / 2 + 1/2), at most Q - 1. Zero is class Q / 2 exactly.

    Attributes:
        scheme: one of `SCHEMES`.
        bits: 8 to 16.
        sample_rate_hz: rate of the waveforms that the model was trained on.
        full_scale: the largest amplitude; louder samples are clipped.

    Raises:
        InputError: if a value is invalid.
    """

    scheme: str = "mu-law"
    bits: int = 8
    sample_rate_hz: int = 16_000
    full_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise InputError(f"there is no quantiser {self.scheme!r}; choose {' or '.join(SCHEMES)}")
        if not _is_whole(self.bits) or not FEWEST_BITS <= self.bits <= MOST_BITS:
            raise InputError(f"a quantiser has {FEWEST_BITS} to {MOST_BITS} bits but {self.bits!r} were requested")
        if not _is_whole(self.sample_rate_hz) or self.sample_rate_hz < 1:
            raise InputError(f"sample_rate_hz is {self.sample_rate_hz!r}; give an integer number of samples per second")
        if self.sample_rate_hz > FASTEST_RATE_HZ:
            raise InputError(f"sample_rate_hz is {self.sample_rate_hz}; give at most {FASTEST_RATE_HZ}")
        if isinstance(self.full_scale, bool) or not isinstance(self.full_scale, int | float):
            raise InputError(f"full_scale is {self.full_scale!r}; give the largest amplitude as a number")
        if not math.isfinite(self.full_scale) or self.full_scale <= 0:
            raise InputError(f"full_scale is {self.full_scale!r}; give a positive amplitude, such as 1.0")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 1 << self.bits

    @property
    def middle_class(self) -> int:
        """The class of silence, which precedes the first sample."""
        return self.classes // 2

    @property
    def class_dtype(self) -> torch.dtype:
        """The narrowest integer type that holds the classes: for storage, not for indexing."""
        return torch.uint8 if self.bits == 8 else torch.int32

    def encode(self, samples: Tensor) -> Tensor:
        """Convert samples of any shape and floating dtype to classes of the same shape, `class_dtype`.

        Raises:
            InputError: if a sample is not finite, or the samples are not floating-point.
        """
        if not samples.is_floating_point():
            raise InputError(
                f"samples must be floating-point numbers from -1 to 1 but are {samples.dtype}; rescale them first"
            )
        # In float64, so that rounding never moves a decoded sample to a neighbouring class, whatever the bit depth.
        wide = samples.double() / self.full_scale
        if not torch.isfinite(wide).all():
            raise InputError("the waveform contains non-finite samples (NaN or infinity); repair it first")
        wide = wide.clamp(-1.0, 1.0)
        if self.scheme == "linear":
            half = self.classes / 2
            numbers = torch.floor(wide * half + half + 0.5).clamp(max=self.classes - 1)
        else:
            mu = self.classes - 1
            compressed = torch.sign(wide) * torch.log1p(mu * wide.abs()) / math.log1p(mu)
            numbers = torch.floor((compressed + 1) / 2 * mu + 0.5)
        return numbers.to(self.class_dtype)

    def decode(self, classes: Tensor) -> Tensor:
        """Convert classes of any shape and integer dtype to float32 samples of the same shape.

        Raises:
            InputError: if a class is out of range.
        """
        if classes.is_floating_point() or classes.is_complex():
            raise InputError(f"classes must be integers but are {classes.dtype}; encode the waveform first")
        numbers = classes.long()
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.classes:
            raise InputError(
                f"classes must lie between 0 and {self.classes - 1} but range from {int(numbers.min())} to "
                f"{int(numbers.max())}; they belong to another quantiser"
            )
        wide = numbers.double()
        if self.scheme == "linear":
            samples = wide / (self.classes / 2) - 1
        else:
            mu = self.classes - 1
            compressed = 2 * wide / mu - 1
            samples = torch.sign(compressed) * torch.expm1(compressed.abs() * math.log1p(mu)) / mu
        return (samples * self.full_scale).float()

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_config` is the inverse."""
        return {**dataclasses.asdict(self), "version": QUANTISER_VERSION}

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Quantiser:
        """Inverse of `to_config`.

        Raises:
            InputError: if a key is unknown or missing, a value is invalid, or the version differs.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"the quantiser is {values!r}, not a table of settings; the model folder is damaged")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in (*known, "version"):
            if name not in values:
                raise InputError(f"the quantiser lacks {name}; the model folder is damaged")
        for name in values:
            if name not in (*known, "version"):
                raise InputError(
                    f"the quantiser has the unknown key {name!r}; known keys are {', '.join(known)}, version"
                )
        if values["version"] != QUANTISER_VERSION:
            raise InputError(
                f"the quantiser has version {values['version']!r}, this program {QUANTISER_VERSION}; use the "
                "program that trained the model"
            )
        return cls(**{name: values[name] for name in known})


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
