"""Generation of clips: sound files, a table of likelihoods and defects, and a page of players."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from audiomamba.data.clips import read_clips
from audiomamba.data.labels import parse_labels
from audiomamba.data.sampling_settings import SamplingSettings
from audiomamba.data.waveforms import find_audio_files
from audiomamba.data.writing import check_format, write_waveform
from audiomamba.generation import LONGEST_SECONDS, GeneratedClips, Prompt, WaveformGenerator, load
from audiomamba.metrics.likelihood import bits_per_sample, clip_likelihoods
from audiomamba.metrics.scores import likelihood_rejection
from audiomamba.metrics.selection import flags_of, likelihoods_of_real_clips
from audiomamba.models import WaveformModel
from mambacore.errors import InputError
from mambacore.safe_text import table_line
from mambapipelines.console import WorkProgress, note
from mambapipelines.device import Placement, begin_computing
from mambapipelines.files import write_whole
from mambapipelines.pages.clips import clip_page
from mambapipelines.pages.html import Table

TABLE_NAME: Final = "clips.tsv"
PAGE_NAME: Final = "clips.html"
COLUMNS: Final = ("clip", "seed", "number", "seconds", "bits_per_sample", "flags", "kept", "labels")
# More players make a page slow to open.
MOST_PLAYERS: Final = 48
REJECTIONS: Final = ("paper", "search")
# Limit of sound embedded in the page as text; longer clips are separate files.
MOST_PLAYED_SECONDS: Final = 600.0
# Limit of samples in memory for clips generated at once; each takes 16 bytes until its file is written.
MOST_SAMPLES_AT_ONCE: Final = 1 << 26


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """Which clips are asked for.

    Attributes:
        model: the model folder.
        clips, seconds, seed, temperature, top_p: see `audiomamba.generation.WaveformGenerator.generate`.
        labels: labels to condition on, each `NAME=VALUE`.
        guidance, clock: see `audiomamba.generation.WaveformGenerator.generate`.
        continued: a clip to continue.
        undo_gain: clips as loud as recordings were before training, or as the clip that is continued.
        weights: see `audiomamba.generation.WaveformGenerator`.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        device, precision: see `mambapipelines.device.choose`.
    """

    model: Path
    clips: int = 16
    seconds: float = 1.0
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    labels: Sequence[str] = ()
    guidance: float | None = None
    clock: float | None = None
    continued: Path | None = None
    undo_gain: bool = False
    weights: str | None = None
    threads: int | None = None
    device: str = "auto"
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True)
class WaveformGenerationOptions(ClipRequest):
    """Options of `audiomamba generate`.

    Attributes:
        output: the folder for everything; it must be new or empty.
        candidates, judge: see `audiomamba.generation.WaveformGenerator.generate`.
        batch: number of clips generated at once, each with its candidates; clips do not depend on it.
        audio_format: format of the sound files.
        reject: `paper` leaves out the least likely 40 % and the most likely 5 %, `search` what is less or more likely
            than the middle 90 % of the clips in `real`; `None` keeps all.
        real: a folder of real clips that the model was not trained on.
    """

    output: Path
    candidates: int | None = None
    judge: str | None = None
    batch: int = 16
    audio_format: str = "wav"
    reject: str | None = None
    real: Path | None = None


@dataclass(frozen=True)
class ClipRow:
    """A row of the table."""

    clip: str
    number: int
    seconds: float
    bits_per_sample: float
    flags: tuple[str, ...]
    labels: str = ""
    kept: bool = True


def precision_of_steps(
    placement: Placement, generator: WaveformGenerator, asked: str
) -> AbstractContextManager[object]:
    """Return the context in which clips are generated; native steps have a precision of their own (`--weights`).

    Args:
        placement: with the precision resolved.
        generator: on its device.
        asked: `--precision`; `auto` leaves native steps as they are.

    Raises:
        InputError: if bfloat16 was asked for native steps.
    """
    if not generator.is_native:
        return placement.autocast()
    if asked == "bfloat16":
        raise InputError(
            "--precision bfloat16 is for models and devices without native steps: use --weights bfloat16 here."
        )
    return nullcontext()


def generate_clips(options: WaveformGenerationOptions) -> list[ClipRow]:
    """Write the clips, `clips.tsv` and `clips.html`; report speed and defects on standard error.

    Raises:
        InputError: if an option is invalid, a model or prompt cannot be read, or the disk is full.
    """
    _check(options)
    placement = begin_computing(options.device, options.precision, options.threads)
    generator = load(options.model, placement.device, options.weights)
    precision = precision_of_steps(placement, generator, options.precision)
    labels = parse_labels(options.labels, generator.label_sets)
    settings = generator.settings(
        options.temperature, options.top_p, options.guidance, options.candidates, options.judge, labels=labels
    )
    if settings != SamplingSettings():
        note(f"sampling with {settings}")
    real = None if options.real is None else real_bits_per_sample(generator.model, options.real)
    prompt = None if options.continued is None else generator.prompt(options.continued)
    for flag in () if prompt is None else flags_of(generator.quantiser.decode(prompt.classes)):
        note(f"{options.continued} is {flag}: its continuation may be too")
    if not generator.is_native:
        note("layers of this model have no native steps: they run in PyTorch, many times slower")
    rows: list[ClipRow] = []
    generated, seconds_taken = 0, 0.0
    shown: list[Tensor] = []
    batch = _clips_at_once(options, settings.candidates, generator.quantiser.sample_rate_hz, prompt)
    total = options.clips * settings.candidates * max(1, round(options.seconds * generator.quantiser.sample_rate_hz))
    with WorkProgress("generating", total, lines_elsewhere=True, unit="samples") as progress, precision:
        for found in _batches(generator, options, settings, labels, batch, prompt, progress):
            generated += found.log_likelihoods.numel()
            seconds_taken += found.seconds_taken
            rows += _write(found, options, prompt)
            room = min(MOST_PLAYERS, int(MOST_PLAYED_SECONDS // rows[0].seconds)) - len(shown)
            shown += list(_sounds(found, options)[: max(0, room)])
    speed = generated / max(seconds_taken, 1e-9)
    note(
        f"{speed:,.0f} samples/s, real-time factor {speed / generator.quantiser.sample_rate_hz:.2f} "
        f"({min(batch, options.clips)} clips at once"
        + (f", the best of {settings.candidates} candidates each)" if settings.candidates > 1 else ")")
    )
    rows = _rejected(rows, options, real)
    for row in rows:
        if row.flags:
            note(f"{row.clip} is {' and '.join(row.flags)}")
        if not row.kept:
            (options.output / row.clip).unlink(missing_ok=True)
    if options.reject is not None:
        note(f"{sum(row.kept for row in rows)} of {len(rows)} clips kept by their likelihood")
    write_whole(options.output / TABLE_NAME, _table_text(rows, options.seed))
    pairs = [(clip, row) for clip, row in zip(shown, rows, strict=False) if row.kept]
    write_whole(options.output / PAGE_NAME, _page(options, settings, pairs, rows, generator.quantiser.sample_rate_hz))
    return rows


@torch.inference_mode()
def real_bits_per_sample(model: WaveformModel, folder: Path) -> Tensor:
    """Return bits per sample (clips,) of every real clip of a folder under the model."""
    config = model.config
    clips = read_clips(
        find_audio_files(folder), config.quantiser, folder=folder, preparation=config.preparation.without_trimming()
    ).clips
    found = [clip_likelihoods(model, [clip.classes], config.quantiser)[0] for clip in clips]
    return torch.tensor([bits_per_sample([one]) for one in found], dtype=torch.float64)


def _check(options: WaveformGenerationOptions) -> None:
    """Check the options before the model is read."""
    check_format(options.audio_format)
    if options.batch < 1:
        raise InputError(f"--batch is {options.batch}: use a number of 1 or more")
    if options.clips < 1:
        raise InputError(f"--clips is {options.clips}: use a number of 1 or more")
    if not 0 < options.seconds <= LONGEST_SECONDS:
        raise InputError(f"--seconds is {options.seconds:g}: use more than 0 and at most an hour ({LONGEST_SECONDS})")
    if options.reject is not None and options.reject not in REJECTIONS:
        raise InputError(f"--reject is {options.reject!r}: use {' or '.join(REJECTIONS)}")
    if (options.reject == "search") != (options.real is not None):
        raise InputError("--reject search and --real DIR belong together: give both or neither")
    if options.output.is_file() or (options.output.is_dir() and any(options.output.iterdir())):
        raise InputError(f"the output {options.output} already exists: choose a new or empty folder")
    parent = options.output.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{parent} cannot be made ({error.strerror}): choose another --output") from error


def _clips_at_once(options: WaveformGenerationOptions, candidates: int, rate: int, prompt: Prompt | None) -> int:
    """Return the number of clips to generate at once, limited by `MOST_SAMPLES_AT_ONCE`."""
    samples = max(1, round(options.seconds * rate)) + (0 if prompt is None else prompt.classes.shape[0])
    fitting = max(1, MOST_SAMPLES_AT_ONCE // (samples * candidates))
    if fitting < min(options.batch, options.clips):
        note(f"to save memory, {fitting} clips of this length are generated at once, not {options.batch}")
    return min(options.batch, fitting)


def _batches(
    generator: WaveformGenerator,
    options: WaveformGenerationOptions,
    settings: SamplingSettings,
    labels: Mapping[str, str],
    batch: int,
    prompt: Prompt | None,
    progress: WorkProgress,
) -> Iterator[GeneratedClips]:
    for first in range(0, options.clips, batch):
        yield generator.generate(
            min(batch, options.clips - first),
            options.seconds,
            options.seed,
            settings.temperature,
            settings.top_p,
            labels=labels,
            guidance=settings.guidance,
            clock=options.clock,
            candidates=settings.candidates,
            judge=options.judge,
            prompt=prompt,
            first_clip=first,
            progress=progress.advance,
        )


def _write(found: GeneratedClips, options: WaveformGenerationOptions, prompt: Prompt | None) -> list[ClipRow]:
    rate, rows = found.quantiser.sample_rate_hz, []
    options.output.mkdir(exist_ok=True)  # only now, when there is something to put into it
    before = 0 if prompt is None else prompt.classes.shape[0]
    sounds = zip(found.numbers, _sounds(found, options), found.bits_per_sample, found.labels, strict=True)
    for number, samples, bits, asked in sounds:
        name = f"clip-{number:05d}.{options.audio_format}"
        write_waveform(options.output / name, samples, rate)
        labels = ",".join(f"{name}={value}" for name, value in asked.items())
        rows.append(ClipRow(name, number, samples.shape[0] / rate, float(bits), flags_of(samples[before:]), labels))
    return rows


def _sounds(found: GeneratedClips, options: WaveformGenerationOptions) -> Tensor:
    """Return (clips, samples) at the requested loudness."""
    return found.samples_as_recorded if options.undo_gain else found.samples


def _rejected(rows: Sequence[ClipRow], options: WaveformGenerationOptions, real: Tensor | None) -> list[ClipRow]:
    """Return the rows, with rejected clips marked."""
    if options.reject == "paper":
        kept = set(likelihood_rejection([-row.bits_per_sample for row in rows]).kept.tolist())
        return [replace(row, kept=number in kept) for number, row in enumerate(rows)]
    if real is not None:
        low, high = likelihoods_of_real_clips(real)
        note(f"the central real clips have {low:.4f} to {high:.4f} bits per sample")
        return [replace(row, kept=low <= row.bits_per_sample <= high) for row in rows]
    return list(rows)


def _table_text(rows: Sequence[ClipRow], seed: int) -> str:
    lines = [table_line(COLUMNS)]
    lines += [table_line(_cells(row, seed)) for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: ClipRow, seed: int) -> list[str]:
    return [
        row.clip,
        str(seed),
        str(row.number),
        f"{row.seconds:.4f}",
        f"{row.bits_per_sample:.6f}",
        ",".join(row.flags) or "none",
        "yes" if row.kept else "no",
        row.labels or "none",
    ]


def _page(
    options: WaveformGenerationOptions,
    settings: SamplingSettings,
    pairs: Sequence[tuple[Tensor, ClipRow]],
    rows: Sequence[ClipRow],
    rate: int,
) -> str:
    kept = sum(row.kept for row in rows)
    introduction = [f"{len(rows)} clips of {options.model.name}, {settings}, seed {options.seed}; {kept} kept."]
    if options.labels:
        introduction.append(f"Labels: {', '.join(options.labels)}.")
    if len(pairs) < kept:
        introduction.append(f"{len(pairs) or 'None'} can be played here; the others are in separate files.")
    if options.continued is not None:
        introduction.append(f"Each continues {options.continued.name}.")
    captions = [
        f"{row.clip}, {row.bits_per_sample:.3f} bits/sample"
        + (f", {row.labels}" if row.labels else "")
        + (f" ({', '.join(row.flags)})" if row.flags else "")
        for _, row in pairs
    ]
    table = Table(COLUMNS, [_cells(row, options.seed) for row in rows])
    return clip_page("Generated clips", [clip for clip, _ in pairs], rate, captions, table, introduction)
