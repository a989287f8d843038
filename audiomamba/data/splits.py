"""Training, validation and test splits of folders of clips and of long recordings."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from audiomamba.data.clips import (
    DIGITS,
    RECORDING_SHARES,
    SPLITS,
    ClipCollection,
    listed_clips,
    read_clips,
    speech_commands_files,
    split_recording,
)
from audiomamba.data.clock import LabelDurations, label_durations
from audiomamba.data.labels import UNLABELLED, WORD_RULE, ClipLabels, LabelSet, read_clip_labels
from audiomamba.data.preparation import ClipPreparation
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.waveforms import SUFFIXES, find_audio_files
from mambacore.errors import InputError

NO_LABELS: Final = "none"
"""Given instead of label rules: no labels, not even the words of Speech Commands."""

LIST_NAMES: Final[Mapping[str, str]] = {"valid": "validation_list.txt", "test": "testing_list.txt"}
"""Files in a folder that list the clips of a split, one per line, named as in Speech Commands."""

LOGGER: Final = logging.getLogger(__name__)
_LONGEST_LISTED_NAME: Final = 4096

FEWEST_FILES: Final = 20
"""A folder with fewer files is taken to hold long recordings, each of which is cut by time."""

VALIDATION_SHARE: Final = 20
"""Without patterns or lists, one clip in so many is used for validation, chosen by checksums of their names."""


class SplitClips(NamedTuple):
    """The clips of a training run."""

    train: ClipCollection
    valid: ClipCollection | None  # None: no validation clips
    rule: str  # description of how they were split
    are_recordings: bool  # few and long: sample in proportion to duration
    test_names: tuple[str, ...] = ()  # paths of the test clips within the folder, unread
    label_rules: tuple[str, ...] = ()

    @property
    def label_sets(self) -> tuple[LabelSet, ...]:
        """The label sets of the clips."""
        return self.train.label_sets

    @property
    def typical_gain(self) -> float:
        """Median gain of the training clips."""
        return float(np.median([clip.gain for clip in self.train.clips]))

    def durations(self) -> tuple[LabelDurations, ...]:
        """Return a summary of the durations of the training clips by label."""
        rate = self.train.quantiser.sample_rate_hz
        return label_durations((clip.labels, clip.classes.shape[0] / rate) for clip in self.train.clips)

    def unlabelled(self) -> dict[str, list[str]]:
        """For each label set, the clips without a label that occurs in training."""
        clips = [*self.train.clips, *(() if self.valid is None else self.valid.clips)]
        found = {
            one.name: [clip.name for clip in clips if clip.labels[number] == UNLABELLED]
            for number, one in enumerate(self.label_sets)
        }
        return {name: names for name, names in found.items() if names}

    def names(self) -> dict[str, tuple[str, ...]]:
        """The clips of every split, in a fixed order."""
        held_out = () if self.valid is None else tuple(clip.name for clip in self.valid.clips)
        return {"train": tuple(clip.name for clip in self.train.clips), "valid": held_out, "test": self.test_names}


def read_split_clips(
    data: Path | str,
    quantiser: Quantiser,
    *,
    valid: str | None = None,
    test: str | None = None,
    words: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    preparation: ClipPreparation | None = None,
    skip_bad: bool = False,
) -> SplitClips:
    """Read the training and validation clips of a folder or a recording; the test clips are not read.

    A single recording is cut by time (`RECORDING_SHARES`). The files of a folder are split by the patterns `valid` and
    `test` if given; else by the lists in the folder (`LIST_NAMES`), as in Speech Commands; else, if the files are few,
    each is cut by time, and if they are many, one in twenty, by checksums of their names, is used for validation.

    Args:
        data: a folder of any layout, or one audio file.
        quantiser: converts samples to classes and sets the rate.
        valid, test: shell patterns (`*_1[0-4].wav`) that are matched against the paths of files within the folder.
        words: use only clips in folders with these names; for Speech Commands the ten digits (SC09) by default.
        labels: rules of `audiomamba.data.labels.read_clip_labels`. By default the words of Speech Commands are the
            label set `word`; `NO_LABELS` alone disables labels.
        preparation: gain and trimming of each clip.
        skip_bad: skip files that cannot be read and list them in the collections' `bad`.

    Raises:
        InputError: if there is nothing to read, a pattern matches no file or all files, or a file is unreadable.
    """
    data = Path(data)
    how = _Reading(data, quantiser, tuple(labels), preparation, skip_bad)
    if data.is_file():
        if valid is not None or test is not None or words is not None or how.rules:
            raise InputError(
                f"{data} is one recording, cut by time; patterns, words and labels apply only to folders of clips"
            )
        parts = split_recording(data, quantiser, preparation=preparation)
        left = tuple(clip.name for clip in parts["test"].clips)
        return SplitClips(parts["train"], parts["valid"], "one recording, cut by time", True, left)
    if valid is None and test is None and _is_speech_commands(data, words):
        chosen = tuple(words or DIGITS)
        files = {split: speech_commands_files(data, split, chosen) for split in SPLITS}
        if not labels:
            how = how._replace(labels=(WORD_RULE,))
        return how.read(files, f"the official split of Speech Commands, {len(chosen)} words")
    paths = _files_of_words(data, words)
    if valid is not None or test is not None:
        return how.read(files_by_patterns(data, paths, valid, test), "by pattern")
    if any((data / name).is_file() for name in LIST_NAMES.values()):
        return how.read(files_by_lists(data, paths), "by the lists in the folder")
    _warn_of_other_lists(data)
    if len(paths) < FEWEST_FILES:
        return how.cut(paths)
    by_checksum = sorted(paths, key=lambda path: zlib.crc32(os.fsencode(path.relative_to(data).as_posix())))
    held_out = set(by_checksum[: -(-len(paths) // VALIDATION_SHARE)])
    files = {"train": [path for path in paths if path not in held_out], "valid": sorted(held_out)}
    return how.read(files, "one file in twenty for validation, by their names")


def _warn_of_other_lists(folder: Path) -> None:
    """Warn of text files that list clips but are not named as lists are, which would be left out of account."""
    for path in sorted(folder.glob("*.txt")):
        try:
            with path.open(encoding="utf-8-sig", errors="replace") as lines:
                first = lines.readline(_LONGEST_LISTED_NAME).strip().replace("\\", "/")
        except OSError:
            continue
        if first.lower().endswith(SUFFIXES) and "\0" not in first and (folder / first).is_file():
            LOGGER.warning(
                "%s lists clips but is not used: lists of splits are called %s",
                path,
                " and ".join(LIST_NAMES.values()),
            )


def _is_speech_commands(folder: Path, words: Sequence[str] | None) -> bool:
    has_lists = all((folder / name).is_file() for name in LIST_NAMES.values())
    return has_lists and all((folder / word).is_dir() for word in words or DIGITS)


def _files_of_words(folder: Path, words: Sequence[str] | None) -> list[Path]:
    paths = find_audio_files(folder)
    if words is None:
        return paths
    for word in words:
        if not (folder / word).is_dir():
            raise InputError(f"{folder} has no folder {word!r}; name existing folders")
    return [path for path in paths if path.relative_to(folder).parts[0] in words]


def files_by_patterns(
    folder: Path, paths: Sequence[Path], valid: str | None, test: str | None
) -> dict[str, list[Path]]:
    """Assign files to splits by shell patterns of their paths within the folder; the others are for training.

    Raises:
        InputError: if a pattern matches nothing, two patterns match the same file, or no file is left for training.
    """
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        fits = [split for split, pattern in (("valid", valid), ("test", test)) if pattern and fnmatch(name, pattern)]
        if len(fits) > 1:
            raise InputError(f"{path} matches the patterns of both validation and test; make them exclusive")
        files[fits[0] if fits else "train"].append(path)
    for split, pattern in (("valid", valid), ("test", test)):
        if pattern is not None and not files[split]:
            raise InputError(f"no file of {folder} matches the pattern {pattern!r}; check it, and quote it")
    if not files["train"]:
        raise InputError(
            f"every file of {folder} matches a pattern, which leaves none for training; narrow the patterns"
        )
    return files


def files_by_lists(folder: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Assign files to splits by the lists in the folder (`LIST_NAMES`); the others are for training.

    Raises:
        InputError: if a list is unreadable, has a missing or repeated clip, or no file is left for training.
    """
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    split_of: dict[str, str] = {}
    for split, list_name in LIST_NAMES.items():
        if not (folder / list_name).is_file():
            continue
        names = listed_clips(folder / list_name)
        for name in names:
            if not (folder / name).is_file():
                raise InputError(f"{folder / list_name} lists {name}, which is not there; correct the list")
            if split_of.setdefault(name, split) != split:
                raise InputError(f"{name} is listed for both validation and test in {folder}; list it once")
    for path in paths:
        files[split_of.get(path.relative_to(folder).as_posix(), "train")].append(path)
    if not files["train"]:
        raise InputError(f"the lists in {folder} leave no file for training; shorten them")
    return files


class _Reading(NamedTuple):
    """Settings for reading the files of a folder."""

    folder: Path
    quantiser: Quantiser
    labels: tuple[str, ...]
    preparation: ClipPreparation | None
    skip_bad: bool

    @property
    def rules(self) -> tuple[str, ...]:
        return () if self.labels == (NO_LABELS,) else self.labels

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def labelled(self, train: Sequence[Path], others: Sequence[Path]) -> tuple[ClipLabels, tuple[LabelSet, ...]]:
        names = [self.name(path) for path in train]
        labels = read_clip_labels(self.rules, [*names, *map(self.name, others)])
        return labels, labels.sets(names)

    def read(self, files: Mapping[str, Sequence[Path]], rule: str) -> SplitClips:
        if not files["train"]:
            raise InputError(f"{self.folder} has no clips to train on; give a folder that contains some")
        labels, sets = self.labelled(files["train"], files["valid"])
        train, valid = (
            read_clips(
                files[split], self.quantiser, folder=self.folder, labels=labels, label_sets=sets,
                preparation=self.preparation, skip_bad=self.skip_bad,
            )
            if files[split]
            else None
            for split in ("train", "valid")
        )  # fmt: skip
        assert train is not None  # see above
        left = tuple(self.name(path) for path in files.get("test", ()))
        return SplitClips(train, valid, rule, False, left, self.rules)

    def cut(self, paths: Sequence[Path]) -> SplitClips:
        """Read recordings, each cut by time."""
        labels, sets = self.labelled(paths, ())
        parts: dict[str, list] = {name: [] for name in RECORDING_SHARES}
        bad: list[str] = []
        for path in paths:
            numbers = labels.numbers(self.name(path), sets)
            try:
                cut = split_recording(path, self.quantiser, labels=numbers, preparation=self.preparation)
            except InputError as error:
                if not self.skip_bad:
                    raise
                bad.append(str(error))
                continue
            for name, collection in cut.items():
                parts[name].extend(collection.clips)
        if not parts["train"]:
            raise InputError(f"none of the {len(paths)} files of {self.folder} can be read; the first error: {bad[0]}")
        train = ClipCollection(tuple(parts["train"]), self.quantiser, tuple(bad), sets)
        valid = ClipCollection(tuple(parts["valid"]), self.quantiser, label_sets=sets)
        left = tuple(clip.name for clip in parts["test"])
        return SplitClips(train, valid, "each recording cut by time", True, left, self.rules)
