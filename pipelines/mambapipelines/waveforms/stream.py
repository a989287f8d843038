"""Generate clips as a stream: raw PCM or a loudspeaker gets the samples as they come."""

from __future__ import annotations

import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from audiomamba.data.labels import parse_labels
from audiomamba.data.writing import raw_pcm
from audiomamba.generation import Prompt, WaveformGenerator, load
from mambacore.errors import InputError
from mambapipelines.console import note
from mambapipelines.device import begin_computing
from mambapipelines.waveforms.generate import ClipRequest, precision_of_steps

Write = Callable[[bytes], object]


@dataclass(frozen=True, kw_only=True)
class WaveformStreamOptions(ClipRequest):
    """What `audiomamba generate --stream` is asked to do.

    Attributes:
        clips: one after the other.
        output: a new file, or a named pipe; `None` for standard output.
        play: the loudspeaker instead.
    """

    clips: int = 1
    output: Path | None = None
    play: bool = False


@dataclass
class StreamFigures:
    """What a stream took.

    Attributes:
        first_sample_seconds: from the request, the model in memory, to the first new sample being handed over: the
            prompt is read in this time.
        samples: generated ones.
        seconds: from the request to the end.
    """

    first_sample_seconds: float = 0.0
    samples: int = 0
    seconds: float = 0.0


def stream_clips(options: WaveformStreamOptions) -> StreamFigures:
    """Send clips to the loudspeaker, or as raw PCM to a file or standard output.

    PCM has 16 bits, signed, low byte first, one channel, at the rate of the model.

    Raises:
        InputError: a mistake in the options, a model or prompt that cannot be read, no loudspeaker, or a full disk.
    """
    _check(options)
    placement = begin_computing(options.device, options.precision, options.threads)
    generator = load(options.model, placement.device, options.weights)
    precision = precision_of_steps(placement, generator, options.precision)
    labels = parse_labels(options.labels, generator.label_sets)
    prompt = None if options.continued is None else generator.prompt(options.continued)
    rate = generator.quantiser.sample_rate_hz
    if not generator.is_native:
        note("layers of this model have no native steps: they run through PyTorch, many times slower")
    clips = [
        generator.stream(
            options.seconds, options.seed, options.temperature, options.top_p, labels=labels,
            guidance=options.guidance, clock=options.clock, prompt=prompt, number=number,
        )
        for number in range(options.clips)
    ]  # fmt: skip
    gain = generator.gain(prompt) if options.undo_gain else 1.0
    with precision, _loudspeaker(rate) if options.play else _pcm(options.output) as write:
        if not options.play:
            note(f"raw PCM: 16 bits, signed, little-endian, mono, {rate:,} Hz")
        figures = _send(clips, write, gain, prompt)
    _report(figures, generator, prompt)
    return figures


def _check(options: WaveformStreamOptions) -> None:
    """Refuse what cannot work before the model is read."""
    if options.clips < 1:
        raise InputError(f"--clips is {options.clips}: use a number of 1 or more")
    if options.play and options.output is not None:
        raise InputError("--play sends the sound to the loudspeaker: leave out --output, or write it with --stream")
    if not options.play and options.output is None and sys.stdout.isatty():
        raise InputError(
            "--stream would write raw sound to the terminal: send it to a player, as in | ffplay -f s16le -ar 8000 - "
            "with the model's rate, name an --output, or use --play"
        )


def _send(clips: list[Iterator[Tensor]], write: Write, gain: float, prompt: Prompt | None) -> StreamFigures:
    figures, begin = StreamFigures(), time.perf_counter()
    for clip in clips:
        known = 0 if prompt is None else len(prompt.classes)
        for piece in clip:
            write(raw_pcm(piece / gain))
            if known:  # the prompt comes first, as one piece
                known = 0
                continue
            if figures.samples == 0:
                figures.first_sample_seconds = time.perf_counter() - begin
            figures.samples += len(piece)
    figures.seconds = time.perf_counter() - begin
    return figures


def _report(figures: StreamFigures, generator: WaveformGenerator, prompt: Prompt | None) -> None:
    rate = generator.quantiser.sample_rate_hz
    after = "" if prompt is None else f", a prompt of {len(prompt.classes) / rate:.2f} s read before it"
    speed = figures.samples / max(figures.seconds, 1e-9)
    note(
        f"first sample after {1000 * figures.first_sample_seconds:.1f} ms{after}; {speed:,.0f} samples/s, real-time "
        f"factor {speed / rate:.2f}"
    )
    if speed < rate:
        note("slower than it is listened to: whoever plays this as it comes hears gaps")


@contextmanager
def _pcm(output: Path | None) -> Iterator[Write]:
    """Standard output, or a file or pipe that grows as samples come."""
    if output is None:
        stream = sys.stdout.buffer

        def write(content: bytes) -> None:
            stream.write(content)
            stream.flush()

        yield write
        return
    if output.exists() and not stat.S_ISFIFO(output.stat().st_mode):
        raise InputError(f"the output {output} already exists: choose a new file, or a named pipe")
    try:
        with output.open("wb", buffering=0) as file:
            yield file.write
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror or error}): make room or choose another place"
        ) from error


@contextmanager
def _loudspeaker(rate: int) -> Iterator[Write]:
    """The default output device."""
    sounddevice = _sounddevice()
    try:
        with sounddevice.RawOutputStream(samplerate=rate, channels=1, dtype="int16") as device:
            yield lambda content: device.write(_native_order(content))
    except sounddevice.PortAudioError as error:
        raise InputError(
            f"the sound cannot be played ({error}): connect a loudspeaker, or use --stream with a player"
        ) from error


def _sounddevice() -> Any:
    try:
        return import_module("sounddevice")
    except (ImportError, OSError) as error:  # OSError: without the library PortAudio
        raise InputError(
            f"playing needs the package sounddevice, which cannot be imported ({error}): pip install sounddevice, or "
            "use --stream with a player"
        ) from error


def _native_order(content: bytes) -> bytes:
    return np.frombuffer(content, "<i2").astype(np.int16).tobytes()
