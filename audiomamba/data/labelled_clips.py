"""Labelled clips: their files, their splits and their augmentation during training."""

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
"""Folder of Speech Commands that holds noise, not words."""

SHIFT_SECONDS = 0.1
QUIETEST_GAIN = 0.25
LOUDEST_GAIN = 2.0
FULL_SCALE = 32_767
STEEPEST_NOISE = 2.0
QUIETEST_LEVEL = 1e-4


class NoiseChange(NamedTuple):
    """Noise that is mixed with clips during training.

    A classifier trained on words at all signal-to-noise ratios becomes uncertain where little of a word is left. One
    trained on clean words alone is often confident about noise (Hendrycks & Gimpel, arXiv 1610.02136).
    """

    share: float = 0.0  # share of clips that get noise
    lowest_ratio_db: float = -30.0  # lowest signal-to-noise ratio; uniformly distributed
    highest_ratio_db: float = 30.0


class LabelledFiles(NamedTuple):
    """Files of one split and their labels."""

    paths: tuple[Path, ...]
    labels: tuple[str, ...]  # "" if labels are not used


def labelled_splits(
    data: Path | str,
    *,
    label_pattern: str | None = None,
    valid: str | None = None,
    test: str | None = None,
    words: Sequence[str] | None = None,
    labelled: bool = True,
) -> dict[str, LabelledFiles]:
    """Return the files of a folder by split (`SPLITS`), with labels.

    Args:
        data: a folder with one folder per class, as in Speech Commands, or with the label in each file's name.
        label_pattern: a regular expression that is searched for in the file's name; its first group is the label.
        valid, test: shell patterns (`*_[5-9].wav`) that are matched against paths within the folder. Without any, the
            lists in the folder are used, as in Speech Commands; a split without pattern or list is empty.
        words: use only clips with these labels.
        labelled: whether labels are needed for anything but `words`; if not, any layout is accepted.

    Raises:
        InputError: if a pattern is invalid or matches nothing, a file has no label, or nothing is left to train on.
    """
    folder = Path(data)
    expression = _expression(label_pattern)
    paths = [path for path in find_audio_files(folder) if path.relative_to(folder).parts[0] != NOISE_FOLDER]
    if not paths:
        raise InputError(f"{folder} has no clips except background noise; give a folder of labelled clips")
    by_pattern = valid is not None or test is not None
    if words is not None:  # whatever the patterns and lists assign to other words
        paths = [path for path in paths if _label(path, folder, expression) in words]
        if not paths:
            raise InputError(f"{folder} has no clips of the words {', '.join(words)}; check the words")
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
    """Training clips of a classifier."""

    samples: Tensor  # (clips, clip_length), int16 (full scale 32,767), half the memory of float32
    labels: tuple[str, ...]
    paths: tuple[Path, ...]
    bad: tuple[str, ...]  # one message per unreadable file that was skipped


def read_fitted(files: LabelledFiles, log_mel: LogMelConfig, *, skip_bad: bool = False) -> FittedClips:
    """Read files, cut or padded to the clip duration of a classifier.

    Args:
        files: the files to read.
        log_mel: the rate and duration.
        skip_bad: skip files that cannot be read.

    Raises:
        InputError: for the first unreadable file, unless such files are skipped; or if none is left.
    """
    rows = torch.empty(len(files.paths), log_mel.clip_length, dtype=torch.int16)
    labels: list[str] = []
    paths: list[Path] = []
    bad: list[str] = []
    clips = read_in_parallel(lambda number: fitted_clip(files.paths[number], log_mel), len(files.paths))
    for found, label, path in zip(clips, files.labels, files.paths, strict=True):
        if not isinstance(found, InputError):
            rows[len(labels)] = (found.clamp(-1, 1) * FULL_SCALE).round().short()
            labels.append(label)
            paths.append(path)
        elif skip_bad:
            bad.append(str(found))
        else:
            raise found
    if not labels:
        raise InputError(f"none of {len(files.paths)} files can be read; the first says: {bad[0]}")
    return FittedClips(rows[: len(labels)], tuple(labels), tuple(paths), tuple(bad))


def changed_clip(clip: Tensor, sample_rate_hz: int, seed: int, index: int, noise: NoiseChange | None = None) -> Tensor:
    """Shift (samples,) by up to 0.1 s, mix it with noise and change its loudness.

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
    """Mix a clip with noise at this signal-to-noise ratio; the mix is as loud as the clip was.

    The noise is stationary and Gaussian, its spectrum f^-a with a from 0 (white, a third of the time) to 2 (brown).
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
            raise InputError(
                f"{path} is not in a folder of its class; make one folder per class, or give --label-pattern"
            )
        return path.parent.name
    found = expression.search(path.name)
    if found is None or not found.group(1):
        raise InputError(f"the label pattern {expression.pattern!r} finds no label in {path}; correct the pattern")
    return found.group(1)
