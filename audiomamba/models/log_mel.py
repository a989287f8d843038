"""Log-mel spectrograms."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from audiomamba.data.extras import audio_package
from mambacore.errors import InputError


@dataclasses.dataclass(frozen=True)
class LogMelConfig:
    """Settings of a log-mel spectrogram. The defaults give 32 bands x 32 frames for a second at 16 kHz, as for SC09.

    Attributes:
        sample_rate_hz: rate of the samples.
        seconds: duration of a clip; see `clip_length`.
        bands: mel bands (height).
        frames: time frames (width).

    Raises:
        InputError: if a number is invalid, or a clip is too short for the frames.
    """

    sample_rate_hz: int = 16_000
    seconds: float = 1.0
    bands: int = 32
    frames: int = 32

    def __post_init__(self) -> None:
        if self.sample_rate_hz < 1 or not 0 < self.seconds < float("inf") or self.bands < 1 or self.frames < 2:
            raise InputError(f"a spectrogram cannot be computed with {self}; give positive numbers, 2 frames or more")
        if self.clip_length < 16 * self.frames:
            raise InputError(
                f"clips of {self.clip_length} samples are too short for {self.frames} frames; make them longer"
            )

    @property
    def clip_length(self) -> int:
        """Samples in a clip."""
        return round(self.sample_rate_hz * self.seconds)

    @property
    def hop_length(self) -> int:
        """Samples between two frames; 512 with the defaults."""
        # Frames are centred and reach beyond both ends, so there is one more than hops; 0.75 makes it 512 for SC09.
        return max(1, round(self.clip_length / (self.frames - 0.75)))

    @property
    def fft_size(self) -> int:
        """Samples in a frame, four hops; 2048 with the defaults."""
        return 4 * self.hop_length


class LogMel(nn.Module):
    """Maps (batch, samples) to (batch, bands, frames): log of the mel power, about 0 for speech and -1 for silence.

    The scale is fixed, not normalised per clip, so that quiet clips look quiet and silence looks silent. It has no
    parameters.
    """

    floor = 1e-5  # power below this is silence

    def __init__(self, config: LogMelConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = audio_package("torchaudio.transforms").MelSpectrogram(
            config.sample_rate_hz, n_fft=config.fft_size, hop_length=config.hop_length, n_mels=config.bands
        )

    def forward(self, samples: Tensor) -> Tensor:
        """Compute the spectrograms of clips of exactly `config.clip_length` samples."""
        power = self.mel(samples)[..., : self.config.frames]
        missing = self.config.frames - power.shape[-1]
        power = nn.functional.pad(power, (0, missing)) if missing > 0 else power
        return torch.log10(power + self.floor) / 5.0  # 1e-5 to -1, 1 to 0, a loud vowel to 0.4
