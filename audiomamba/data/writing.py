"""Atomic writing of audio files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

from torch import Tensor

from audiomamba.data.extras import audio_package
from mambacore.errors import InputError
from mambacore.files import replaced_when_whole

FORMATS: Final = ("wav", "flac", "ogg", "mp3")


def check_format(name: str) -> None:
    """Check that a format can be written.

    Raises:
        InputError: if it is unknown, or the installed libsndfile has no encoder for it.
    """
    if name not in FORMATS:
        raise InputError(f"the audio format {name!r} cannot be written; choose {', '.join(FORMATS)}")
    if name.upper() not in audio_package("soundfile").available_formats():
        raise InputError(f"the installed libsndfile has no encoder for {name}; choose wav")


def encoded(samples: Tensor, sample_rate_hz: int, audio_format: str = "wav") -> bytes:
    """Encode (length,) samples from -1 to 1 as the content of a file; WAV and FLAC with 16 bits.

    Raises:
        InputError: as `check_format`, or if the encoder does not support the rate.
    """
    check_format(audio_format)
    soundfile = audio_package("soundfile")
    content = io.BytesIO()
    subtype = "PCM_16" if audio_format in ("wav", "flac") else None
    try:
        soundfile.write(content, samples.clamp(-1, 1).numpy(), sample_rate_hz, format=audio_format, subtype=subtype)
    except (soundfile.SoundFileError, ValueError) as error:
        raise InputError(f"{audio_format} cannot hold {sample_rate_hz} Hz ({error}); choose wav") from error
    return content.getvalue()


def raw_pcm(samples: Tensor) -> bytes:
    """(length,) samples from -1 to 1 as signed 16-bit numbers, low byte first: those that a WAV file would have."""
    content = io.BytesIO()
    # The rate is written nowhere.
    audio_package("soundfile").write(
        content, samples.clamp(-1, 1).numpy(), 8000, format="RAW", subtype="PCM_16", endian="LITTLE"
    )
    return content.getvalue()


def write_waveform(path: Path | str, samples: Tensor, sample_rate_hz: int) -> None:
    """Write (length,) samples to a file, in the format given by its ending.

    Raises:
        InputError: as `encoded`, or if the file cannot be written or the disk is full.
    """
    path = Path(path)
    content = encoded(samples, sample_rate_hz, path.suffix.lstrip(".").lower())
    try:
        with replaced_when_whole(path) as stream:
            stream.write(content)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}); free some space or choose another location"
        ) from error
