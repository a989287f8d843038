"""Speech-like properties of clips: voiced frames, spectral flatness and fundamental frequency.

Frames of 40 ms, 10 ms apart, at most 35 dB below the loudest one of a clip are analysed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

FRAME_SECONDS: Final = 0.04
HOP_SECONDS: Final = 0.01
AUDIBLE_DB: Final = 35.0
LOWEST_PITCH_HZ: Final = 60.0
HIGHEST_PITCH_HZ: Final = 400.0

VOICED_PERIODICITY: Final = 0.5
"""Normalised autocorrelation above which a frame is voiced; white noise stays below about 0.3."""


class SpeechFigures(NamedTuple):
    """Speech statistics of a set of clips, over all audible frames."""

    voiced_share: float
    flatness: float  # median of the frames: geometric over arithmetic mean of the power spectrum, 1 for white noise
    pitch_hz: tuple[float, float, float]  # 10 %, median and 90 % of the voiced frames; NaN without any


def speech_figures(clips: Iterable[Tensor], sample_rate_hz: int) -> SpeechFigures:
    """Measure clips of (samples,) at the same rate; clips without audible frames are ignored.

    Args:
        clips: samples of the clips, from -1 to 1.
        sample_rate_hz: rate of all clips.
    """
    periodicity, pitch, flatness = [], [], []
    for clip in clips:
        frames = _audible_frames(clip.double().numpy(), sample_rate_hz)
        if len(frames):
            found = _periodicity(frames, sample_rate_hz)
            periodicity.append(found[0])
            pitch.append(found[1])
            flatness.append(_flatness(frames))
    if not periodicity:
        return SpeechFigures(0.0, float("nan"), (float("nan"),) * 3)
    voiced = np.concatenate(periodicity) >= VOICED_PERIODICITY
    pitches = np.concatenate(pitch)[voiced]
    shown = np.percentile(pitches, [10, 50, 90]) if len(pitches) else np.full(3, np.nan)
    low, middle, high = shown.tolist()
    return SpeechFigures(float(voiced.mean()), float(np.median(np.concatenate(flatness))), (low, middle, high))


def _audible_frames(samples: npt.NDArray[np.float64], rate: int) -> npt.NDArray[np.float64]:
    """Return the audible frames, (frames, samples), with their means subtracted."""
    length, hop = round(FRAME_SECONDS * rate), round(HOP_SECONDS * rate)
    if len(samples) < length:
        return np.empty((0, length))
    frames = np.lib.stride_tricks.sliding_window_view(samples, length)[::hop]
    frames = frames - frames.mean(axis=1, keepdims=True)
    power = np.square(frames).mean(axis=1)
    return frames[(power > power.max() * 10 ** (-AUDIBLE_DB / 10)) & (power > 1e-10)]


def _periodicity(frames: npt.NDArray[np.float64], rate: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return each frame's largest normalised autocorrelation in the pitch range, and the frequency of that period.

    The autocorrelation of a Hann-windowed frame is divided by that of the window (Boersma 1993, equation 9).
    """
    length = frames.shape[1]
    window = np.hanning(length)
    size = 2 * length
    shortest, longest = int(rate / HIGHEST_PITCH_HZ), min(int(rate / LOWEST_PITCH_HZ), length - 1)

    def autocorrelation(signals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        found = np.fft.irfft(np.abs(np.fft.rfft(signals, size)) ** 2, size)[..., : longest + 1]
        return found / np.maximum(found[..., :1], 1e-20)

    correlation = autocorrelation(frames * window) / np.maximum(autocorrelation(window), 1e-3)
    # The last lags of a short frame are averages over too few samples.
    longest = min(longest, round(0.6 * length))
    candidates = correlation[:, shortest : longest + 1]
    best = candidates.argmax(axis=1)
    return candidates.max(axis=1), rate / (shortest + best)


def _flatness(frames: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    power = np.abs(np.fft.rfft(frames * np.hanning(frames.shape[1]), axis=1)) ** 2 + 1e-12
    return np.exp(np.log(power).mean(axis=1)) / power.mean(axis=1)
