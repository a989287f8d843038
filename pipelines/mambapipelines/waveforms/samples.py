"""Clips generated during training: sounds and spectrograms at each validation, for inspection."""

from __future__ import annotations

from pathlib import Path

import torch

from audiomamba.data.labels import EVERY_VALUE
from audiomamba.data.writing import write_waveform
from audiomamba.generation import WaveformGenerator
from audiomamba.models import WaveformModel
from mambacore.errors import InputError
from mambapipelines.files import write_whole
from mambapipelines.pages.clips import clip_picture

# Silence between concatenated clips.
PAUSE_SECONDS = 0.1


def write_samples(model: WaveformModel, folder: Path, step: int, clips: int, seconds: float, seed: int) -> None:
    """Write `step-000120.wav` and `.png`: concatenated clips, whose labels cycle through all values.

    The same seed at every step shows what changed.

    Raises:
        InputError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made ({error.strerror}): choose another --output.") from error
    rate = model.config.quantiser.sample_rate_hz
    labels = {one.name: EVERY_VALUE for one in model.config.label_sets}
    found = WaveformGenerator(model).generate(clips, seconds, seed, labels=labels, candidates=1)
    pause = torch.zeros(round(PAUSE_SECONDS * rate))
    strip = torch.cat([part for clip in found.samples for part in (clip, pause)])
    write_waveform(folder / f"step-{step:06d}.wav", strip, rate)
    write_whole(folder / f"step-{step:06d}.png", clip_picture(strip, rate))
