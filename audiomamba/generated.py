"""What generation begins with, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from audiomamba.data.quantisers import Quantiser


class Prompt(NamedTuple):
    """The prepared beginning of a clip."""

    classes: Tensor  # (samples,)
    gain: float = 1.0  # factor that the recording was multiplied by


class GeneratedClips(NamedTuple):
    """Generated clips, each beginning with its prompt, if any."""

    classes: Tensor  # (clips, samples), int64
    log_likelihoods: Tensor  # (clips, generated samples), float64: nats, under the model with the labels as they are
    quantiser: Quantiser
    numbers: tuple[int, ...]  # numbers of the clips, which with the seed determine them
    seconds_taken: float  # duration of the steps, without the prompt
    labels: tuple[dict[str, str], ...] = ()  # labels of each clip; empty for a model without labels
    gain: float = 1.0  # of the prompt, or the typical one of the clips trained on: by which `samples` are louder

    @property
    def samples(self) -> Tensor:
        """(clips, samples), float32, from -full_scale to full_scale, at the level that the model was trained on."""
        return self.quantiser.decode(self.classes)

    @property
    def samples_as_recorded(self) -> Tensor:
        """(clips, samples), float32, as loud as the prompt, or as the recordings that the model was trained on."""
        return self.samples / self.gain

    @property
    def bits_per_sample(self) -> Tensor:
        """(clips,), float64: negative log-likelihood of each clip under the model, in bits per sample."""
        return -self.log_likelihoods.mean(1) / np.log(2)

    @property
    def samples_per_second(self) -> float:
        """Speed of generation, over all clips."""
        return self.log_likelihoods.numel() / max(self.seconds_taken, 1e-9)

    @property
    def real_time_factor(self) -> float:
        """Seconds of audio generated per second, over all clips; at least 1 is real time."""
        return self.samples_per_second / self.quantiser.sample_rate_hz
