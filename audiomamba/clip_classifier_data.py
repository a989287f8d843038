"""Clips with labels: which files they are, which split they belong to, and how they are changed while learning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiomamba.clip_classifier import fitted_clip
from audiomamba.datasets import SPLITS, speech_commands_files
from audiomamba.log_mel import LogMelConfig
from audiomamba.splits import LIST_NAMES
from audiomamba.waveforms import find_audio_files
from mambacore.errors import InputError

SHIFT_SECONDS = 0.1
QUIETEST_GAIN = 0.25
LOUDEST_GAIN = 2.0
FULL_SCALE = 32_767


class LabelledFiles(NamedTuple):
    """Files and their labels, of one split."""

    paths: tuple[Path, ...]
    labels: tuple[str, ...]


def labelled_splits(
    data: Path | str,
    *,
    label_pattern: str | None = None,
    valid: str | None = None,
    test: str | None = None,
    words: Sequence[str] | None = None,
) -> dict[str, LabelledFiles]:
    """The files of a folder for training, validation and the test (``SPLITS``), with labels.

    Args:
        data: a folder with a folder per class, as Speech Commands has them, or with the label in each file's name.
        label_pattern: a regular expression that is searched for in the file's name; its first group is the label.
        valid, test: shell patterns (``*_[5-9].wav``) that paths within the folder are held against. Without any, the
            lists in the folder say it, as in Speech Commands; a split that nothing is said of is empty.
        words: only clips of these labels.

    Raises:
        InputError: a pattern that is none or fits nothing, a file without a label, or nothing to train on.
    """
    folder = Path(data)
    expression = _expression(label_pattern)
    lists = [name for name in LIST_NAMES.values() if (folder / name).is_file()]
    if valid is None and test is None and len(lists) == len(LIST_NAMES):
        folders = {path.parent.name for path in find_audio_files(folder) if path.parent != folder}
        chosen = words or sorted(folders - {"_background_noise_"})
        found = {split: speech_commands_files(folder, split, chosen) for split in SPLITS}
    else:
        found = {split: [] for split in SPLITS}
        for path in find_audio_files(folder):
            name = path.relative_to(folder).as_posix()
            fits = [
                split for split, pattern in (("valid", valid), ("test", test)) if pattern and fnmatch(name, pattern)
            ]
            if len(fits) > 1:
                raise InputError(f"{path} fits the patterns of validation and of test; make them exclude each other")
            found[fits[0] if fits else "train"].append(path)
    splits = {}
    for split, paths in found.items():
        labelled = [(path, _label(path, folder, expression)) for path in paths]
        kept = [(path, label) for path, label in labelled if words is None or label in words]
        splits[split] = LabelledFiles(tuple(path for path, _ in kept), tuple(label for _, label in kept))
    for split, pattern in (("valid", valid), ("test", test)):
        if pattern is not None and not splits[split].paths:
            raise InputError(f"no file of {folder} fits the pattern {pattern!r}; check it, in quotes")
    if not splits["train"].paths:
        raise InputError(f"{folder} has no clip left to train on; narrow the patterns, or check the words")
    return splits


def read_fitted(files: LabelledFiles, log_mel: LogMelConfig) -> Tensor:
    """(clips, clip_length) samples of files, int16 (full scale 32,767) because that is half the memory.

    Raises:
        InputError: a file that cannot be read.
    """
    rows = torch.empty(len(files.paths), log_mel.clip_length, dtype=torch.int16)
    for number, path in enumerate(files.paths):
        rows[number] = (fitted_clip(path, log_mel).clamp(-1, 1) * FULL_SCALE).round().short()
    return rows


def changed_clip(clip: Tensor, sample_rate_hz: int, seed: int, index: int) -> Tensor:
    """(samples,) moved by up to 0.1 s and made softer or louder: a function of (clip, seed, index) only.

    The gain is drawn evenly in decibels from -12 to 6.
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
    return (changed * gain).clamp(-1, 1)


def _expression(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"the label pattern {pattern!r} is no regular expression ({error}); correct it") from error
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
