"""Clips with labels: which files they are, which split they belong to, and how they are changed while learning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiomamba.data.clips import read_in_parallel
from audiomamba.data.splits import LIST_NAMES, files_by_lists, files_by_patterns
from audiomamba.data.waveforms import find_audio_files
from audiomamba.models.clip_classifier import fitted_clip
from audiomamba.models.log_mel import LogMelConfig
from mambacore.errors import InputError

NOISE_FOLDER = "_background_noise_"
"""Of Speech Commands: not words."""

SHIFT_SECONDS = 0.1
QUIETEST_GAIN = 0.25
LOUDEST_GAIN = 2.0
FULL_SCALE = 32_767
STEEPEST_NOISE = 2.0
QUIETEST_LEVEL = 1e-4


class NoiseChange(NamedTuple):
    """Noise that is mixed with clips while learning.

    A classifier that hears words at all depths of noise learns the odds of the words given what is left of them, so it
    becomes unsure where hardly anything is. One that hears clean words only is often sure of noise, of another class
    each time (Hendrycks & Gimpel, arXiv 1610.02136).
    """

    share: float = 0.0  # of the clips that get any
    lowest_ratio_db: float = -30.0  # of the power of the clip to that of the noise, uniformly distributed
    highest_ratio_db: float = 30.0


class LabelledFiles(NamedTuple):
    """Files and their labels, of one split."""

    paths: tuple[Path, ...]
    labels: tuple[str, ...]  # "" where none were asked for


def labelled_splits(
    data: Path | str,
    *,
    label_pattern: str | None = None,
    valid: str | None = None,
    test: str | None = None,
    words: Sequence[str] | None = None,
    labelled: bool = True,
) -> dict[str, LabelledFiles]:
    """The files of a folder for training, validation and the test (`SPLITS`), with labels.

    Args:
        data: a folder with a folder per class, as Speech Commands has them, or with the label in each file's name.
        label_pattern: a regular expression that is searched for in the file's name; its first group is the label.
        valid, test: shell patterns (`*_[5-9].wav`) that paths within the folder are held against. Without any, the
            lists in the folder say it, as in Speech Commands; a split that nothing is said of is empty.
        words: only clips of these labels, for which they need to be known.
        labelled: whether the labels are needed for anything else; without them any layout will do.

    Raises:
        InputError: a pattern that is not valid or matches nothing, a file without a label, or nothing to train on.
    """
    folder = Path(data)
    expression = _expression(label_pattern)
    paths = [path for path in find_audio_files(folder) if path.relative_to(folder).parts[0] != NOISE_FOLDER]
    if not paths:
        raise InputError(f"{folder} has no clips beside background noise; give a folder of labelled clips")
    by_pattern = valid is not None or test is not None
    if words is not None:  # whatever the patterns and lists say of others
        paths = [path for path in paths if _label(path, folder, expression) in words]
        if not paths:
            raise InputError(f"{folder} has no clip of the words {', '.join(words)}; check them")
    if by_pattern or not any((folder / name).is_file() for name in LIST_NAMES.values()):
        found = files_by_patterns(folder, paths, valid, test)
    else:
        found = files_by_lists(folder, paths)
    splits = {}
    for split, files in found.items():
        labels = [_label(path, folder, expression) if labelled else "" for path in files]
        splits[split] = LabelledFiles(tuple(files), tuple(labels))
    return splits


class FittedClips(NamedTuple):
    """Clips that a classifier learns from."""

    samples: Tensor  # (clips, clip_length), int16 (full scale 32,767) because that is half the memory
    labels: tuple[str, ...]
    bad: tuple[str, ...]  # for every file that could not be read and was left out, a sentence


def read_fitted(files: LabelledFiles, log_mel: LogMelConfig, *, skip_bad: bool = False) -> FittedClips:
    """Read files, cut and padded to the duration of a classifier's clips.

    Args:
        files: which.
        log_mel: rate and duration.
        skip_bad: leave out files that cannot be read.

    Raises:
        InputError: the first bad file, unless they are skipped; or none is left.
    """
    rows = torch.empty(len(files.paths), log_mel.clip_length, dtype=torch.int16)
    labels: list[str] = []
    bad: list[str] = []
    clips = read_in_parallel(lambda number: fitted_clip(files.paths[number], log_mel), len(files.paths))
    for found, label in zip(clips, files.labels, strict=True):
        if not isinstance(found, InputError):
            rows[len(labels)] = (found.clamp(-1, 1) * FULL_SCALE).round().short()
            labels.append(label)
        elif skip_bad:
            bad.append(str(found))
        else:
            raise found
    if not labels:
        raise InputError(f"none of {len(files.paths)} files can be read; the first says: {bad[0]}")
    return FittedClips(rows[: len(labels)], tuple(labels), tuple(bad))


def changed_clip(clip: Tensor, sample_rate_hz: int, seed: int, index: int, noise: NoiseChange | None = None) -> Tensor:
    """(samples,) moved by up to 0.1 s, mixed with noise, and made softer or louder.

    A function of (clip, seed, index) only. The gain is uniformly distributed from -12 to 6 dB.
    """
    key = np.array([seed, index], dtype=np.uint64)
    random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 3]))
    most = round(SHIFT_SECONDS * sample_rate_hz)
    shift = int(random.integers(-most, most + 1))
    gain = float(np.exp(random.uniform(np.log(QUIETEST_GAIN), np.log(LOUDEST_GAIN))))
    changed = torch.zeros_like(clip)
    if shift >= 0:
        changed[shift:] = clip[: clip.shape[0] - shift]
    else:
        changed[:shift] = clip[-shift:]
    if noise is not None and random.random() < noise.share:
        changed = _with_noise(changed, random, random.uniform(noise.lowest_ratio_db, noise.highest_ratio_db))
    return (changed * gain).clamp(-1, 1)


def _with_noise(clip: Tensor, random: np.random.Generator, ratio_db: float) -> Tensor:
    """A clip and noise with powers in this ratio, together as loud as the clip was.

    The noise is stationary and Gaussian; its power falls with the frequency to the power of 0 (white, a third of the
    time) to 2 (brown).
    """
    length = clip.shape[0]
    slope = max(0.0, random.uniform(-STEEPEST_NOISE / 2, STEEPEST_NOISE))
    frequencies = np.maximum(np.arange(length // 2 + 1), 1)
    spectrum = np.fft.rfft(random.standard_normal(length)) * frequencies ** (-slope / 2)
    noise = torch.from_numpy(np.fft.irfft(spectrum, length)).float()
    noise /= noise.square().mean().sqrt()
    level = float(clip.square().mean().sqrt().clamp(min=QUIETEST_LEVEL))
    clip_power = 1 / (1 + 10 ** (-ratio_db / 10))
    return clip_power**0.5 * clip + (1 - clip_power) ** 0.5 * level * noise


def _expression(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"the label pattern {pattern!r} is not a regular expression ({error}); correct it") from error
    if expression.groups < 1:
        raise InputError(f"the label pattern {pattern!r} has no group; put the label in parentheses: '^([0-9])_'")
    return expression


def _label(path: Path, folder: Path, expression: re.Pattern[str] | None) -> str:
    if expression is None:
        if path.parent == folder:
            raise InputError(f"{path} lies in no folder of its class; make a folder per class, or give --label-pattern")
        return path.parent.name
    found = expression.search(path.name)
    if found is None or not found.group(1):
        raise InputError(f"the label pattern {expression.pattern!r} finds no label in {path}; correct the pattern")
    return found.group(1)
