"""Reading of audio files: any format of libsndfile, any rate and number of channels, as mono samples from -1 to 1.

Every defect of a file is reported in one sentence with its name. Accepted are integers of any depth, floating-point
samples slightly beyond full scale (the quantiser clips them), silence and clipping; callers can check for the last two
with `condition_of`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiomamba.data.extras import audio_package
from audiomamba.data.sound_files import FASTEST_RATE_HZ, SLOWEST_RATE_HZ, Sound, opened_sound
from mambacore.errors import InputError

SUFFIXES: Final = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"
)  # fmt: skip
"""File name endings of the formats that libsndfile reads, in lower case."""

LARGEST_PEAK: Final = 8.0
"""Largest accepted amplitude: floating-point mixes slightly exceed 1, unscaled integers exceed it by far."""

CANCELLED_SHARE: Final = 1e-4
"""A mix with less than this share (-40 dB) of the loudest channel's power: the channels cancel out."""

SILENT_PEAK: Final = 1e-4
"""-80 dB of full scale: less than half a step of 12-bit samples."""

_BLOCK_VALUES: Final = 1 << 18
# Rates without a common divisor would need a filter per output sample. The nearest ratio with a denominator up to this
# is off by less than a thousandth (44,101 Hz to 16,000 Hz: 4 millionths), two cents in pitch; common rates are exact.
_LARGEST_DENOMINATOR: Final = 1_000


class Waveform(NamedTuple):
    """Mono samples and their rate."""

    samples: Tensor  # (length,), float32, finite
    sample_rate_hz: int

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.samples.shape[0] / self.sample_rate_hz


class WaveformHeader(NamedTuple):
    """The header of an audio file."""

    sample_rate_hz: int
    channels: int
    frames: int
    encoding: str

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.frames / self.sample_rate_hz


class Condition(NamedTuple):
    """Condition of a waveform, to check before training on it or showing it."""

    peak: float
    mean: float  # DC offset
    clipped_fraction: float  # share of samples in runs at the extremes

    @property
    def is_silent(self) -> bool:
        """Whether the waveform is inaudible."""
        return self.peak < SILENT_PEAK


def read_waveform(
    path: Path | str,
    sample_rate_hz: int | None = None,
    start_seconds: float = 0.0,
    seconds: float | None = None,
) -> Waveform:
    """Read a file, or a section of it, as mono samples.

    Args:
        path: the file.
        sample_rate_hz: rate to resample to; by default that of the file.
        start_seconds: start of the section.
        seconds: largest duration of the section; by default to the end of the file.

    Raises:
        InputError: if the file is missing, empty, not audio, damaged or shorter than stated, contains NaN, infinity or
            values far beyond full scale, or the section lies outside it.
    """
    pieces = list(waveform_pieces(path, sample_rate_hz, start_seconds, seconds))
    rate = sample_rate_hz or read_header(path).sample_rate_hz
    return Waveform(torch.cat(pieces), rate)


def read_header(path: Path | str) -> WaveformHeader:
    """Read the header of a file, checked as far as possible without decoding.

    Raises:
        InputError: as `read_waveform`, as far as this can be detected.
    """
    with opened_sound(Path(path)) as sound:
        return WaveformHeader(sound.samplerate, sound.channels, sound.frames, sound.encoding)


def waveform_pieces(
    path: Path | str,
    sample_rate_hz: int | None = None,
    start_seconds: float = 0.0,
    seconds: float | None = None,
) -> Iterator[Tensor]:
    """Yield the samples of `read_waveform` piece by piece, for recordings of hours.

    Raises:
        InputError: as `read_waveform`, when the first defect is reached.
    """
    path = Path(path)
    if not (math.isfinite(start_seconds) and start_seconds >= 0):
        raise InputError(f"{path} cannot be read from second {start_seconds}; give a non-negative number")
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"{path} cannot be read for {seconds} seconds; give a positive number")
    if sample_rate_hz is not None and not SLOWEST_RATE_HZ <= sample_rate_hz <= FASTEST_RATE_HZ:
        raise InputError(
            f"{path} cannot be resampled to {sample_rate_hz} Hz; choose a rate from {SLOWEST_RATE_HZ} to "
            f"{FASTEST_RATE_HZ} Hz"
        )
    with opened_sound(path) as sound:
        first = round(start_seconds * sound.samplerate)
        if first >= sound.frames:
            raise InputError(
                f"{path} lasts {sound.frames / sound.samplerate:.2f} seconds, so there is nothing after second "
                f"{start_seconds:g}; start earlier"
            )
        last = sound.frames if seconds is None else min(sound.frames, first + max(1, round(seconds * sound.samplerate)))
        blocks = _mono_blocks(path, sound, first, last)
        if sample_rate_hz is None or sample_rate_hz == sound.samplerate:
            yield from blocks
        else:
            yield from _resampled(blocks, Fraction(sample_rate_hz, sound.samplerate))


def resample(samples: Tensor, from_rate_hz: int, to_rate_hz: int) -> Tensor:
    """Resample (length,) to (ceil(length * to / from),) with a windowed sinc (torchaudio)."""
    if from_rate_hz == to_rate_hz or samples.shape[0] == 0:
        return samples
    return torch.cat(list(_resampled(iter([samples]), Fraction(to_rate_hz, from_rate_hz))))


def cut_or_pad(samples: Tensor, length: int, start: int = 0, fill: float = 0.0) -> Tensor:
    """Return `length` samples of (samples,) from `start` on, padded at the end if there are fewer."""
    cut = samples[start : start + length]
    missing = length - cut.shape[0]
    return torch.cat([cut, cut.new_full((missing,), fill)]) if missing else cut


def condition_of(samples: Tensor) -> Condition:
    """Measure peak, DC offset and clipping of (length,) samples.

    Samples count as clipped in runs of three or more at the waveform's largest or smallest value, if that is at least
    0.98 of full scale.
    """
    if samples.shape[0] == 0:
        return Condition(0.0, 0.0, 0.0)
    clipped = torch.zeros_like(samples, dtype=torch.bool)
    for extreme in (samples.max(), samples.min()):
        if extreme.abs() >= 0.98 and samples.shape[0] >= 3:
            at = samples == extreme
            inner = at[:-2] & at[1:-1] & at[2:]
            for shift in range(3):
                clipped[shift : shift + inner.shape[0]] |= inner
    peak, mean = samples.abs().max(), samples.double().mean()
    return Condition(float(peak), float(mean), float(clipped.float().mean()))


def find_audio_files(folder: Path | str) -> list[Path]:
    """List the audio files below a folder, recognised by their endings, sorted by name.

    Symbolic links to folders are followed, each folder once. Hidden files and folders are skipped. Links that lead
    nowhere and pipes are listed: whoever reads them says so, where leaving them out would lose clips without a word.

    Raises:
        InputError: if the folder does not exist or has no audio files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; check the path")
    found, entered = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        inside = [(name, os.path.realpath(os.path.join(place, name))) for name in sorted(folders)]
        folders[:] = [name for name, real in inside if not name.startswith(".") and real not in entered]
        entered.update(real for name, real in inside if name in folders)
        found += [Path(place, name) for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    if not found:
        raise InputError(f"the folder {folder} holds no audio file ({', '.join(SUFFIXES)}); check the path")
    return sorted(found)


def _mono_blocks(path: Path, sound: Sound, first: int, last: int) -> Iterator[Tensor]:
    """Yield frames `first` to `last` with the channels averaged, checking for invalid values."""
    block = max(1, _BLOCK_VALUES // sound.channels)
    loudest = mixed = 0.0
    position = sound.skip_to(first, block)
    while position < last:
        frames = sound.read(min(block, last - position))
        if frames.shape[0] == 0:
            raise InputError(
                f"{path} is cut off: it states {sound.frames} samples but contains {position}; copy it again"
            )
        if not np.isfinite(frames).all():
            bad = position + int(np.argmin(np.isfinite(frames).all(axis=1)))
            raise InputError(
                f"{path} holds NaN or infinity, first at second {bad / sound.samplerate:.3f}; export it again, or "
                "leave it out"
            )
        peak = float(np.abs(frames).max()) if frames.size else 0.0
        if peak > LARGEST_PEAK:
            raise InputError(
                f"{path} contains values up to {peak:.3g} where full scale is 1; divide them by its full scale"
            )
        position += frames.shape[0]
        mono = frames.mean(axis=1)
        loudest += np.square(frames, dtype=np.float64).sum(0).max()
        mixed += float(np.square(mono, dtype=np.float64).sum())
        yield torch.from_numpy(mono)
    if loudest > (position - first) * SILENT_PEAK**2 and mixed < CANCELLED_SHARE * loudest:
        raise InputError(f"the channels of {path} cancel out when mixed to mono (one is inverted); export one of them")


def _resampled(blocks: Iterator[Tensor], ratio: Fraction) -> Iterator[Tensor]:
    """Resample blocks as if at once, with as much context around each boundary as the filter sees."""
    ratio = ratio.limit_denominator(_LARGEST_DENOMINATOR)
    up, down = ratio.numerator, ratio.denominator
    resampler = audio_package("torchaudio.transforms").Resample(down, up)
    # Whole filter periods, so that each piece starts at the same phase.
    margin = -(-(int(resampler.width) + 1) // down) * down if up != down else 0
    held, left = torch.empty(0), 0
    for block in blocks:
        held = torch.cat([held, block])
        whole = held.shape[0] // down * down
        if whole < max(4 * margin, _BLOCK_VALUES):
            continue
        yield resampler(held[:whole])[left * up // down : (whole - margin) * up // down]
        held, left = held[whole - 2 * margin :], margin
    yield resampler(held)[left * up // down :]
