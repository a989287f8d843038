"""Clips to train on and to evaluate on, as classes of a quantiser.

A training example is a function of (seed, index), so there is no sampler state to save: resuming is starting at an
index, and workers and ranks take indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from audiomamba.data.clock import NO_CLOCK
from audiomamba.data.labels import UNLABELLED, ClipLabels, LabelSet
from audiomamba.data.preparation import ClipPreparation
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.waveforms import SUFFIXES, cut_or_pad, find_audio_files, waveform_pieces
from mambacore.errors import InputError

PADDING_TARGET: Final = -100
"""Target that PyTorch's cross entropy ignores."""

DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS: Final = ("train", "valid", "test")
SC09_CLIPS: Final[Mapping[str, int]] = {"train": 31_158, "valid": 3_643, "test": 4_107}
"""The digits of Speech Commands v0.02, with its official split."""

RECORDING_SHARES: Final[Mapping[str, float]] = {"train": 0.88, "valid": 0.06, "test": 0.06}
"""Shares of a long recording, in temporal order: those of SaShiMi of YouTubeMix (arXiv 2202.09729, appendix C)."""

_LISTS: Final = {"valid": "validation_list.txt", "test": "testing_list.txt"}
_READERS: Final = 4
READ_AHEAD: Final = 64

Read = TypeVar("Read")


class Clip(NamedTuple):
    """A recording, quantised to classes."""

    name: str
    classes: Tensor  # (length,), the quantiser's class_dtype
    labels: tuple[int, ...] = ()  # one number per label set; 0 if the clip has no such label
    gain: float = 1.0  # factor that its samples were multiplied by


class Example(NamedTuple):
    """Inputs of a model and its targets at each position; with a leading dimension, a batch of examples."""

    inputs: Tensor  # (length,), int64: the middle class, then the clip without its last sample
    targets: Tensor  # (length,), int64: the clip, then PADDING_TARGET
    labels: Tensor  # (label sets,), int64: see `audiomamba.data.labels`
    clock: Tensor  # (2,), int64: duration of the clip and where the example begins, in samples

    def without_common_padding(self) -> Example:
        """The batch up to the end of its longest clip."""
        used = (self.targets != PADDING_TARGET).any(0).nonzero()
        longest = int(used[-1]) + 1 if len(used) else 1
        return Example(self.inputs[:, :longest], self.targets[:, :longest], self.labels, self.clock)


@dataclasses.dataclass(frozen=True)
class ClipCollection:
    """Clips in memory, with the quantiser that produced their classes.

    Attributes:
        clips: in a fixed order.
        quantiser: the quantiser of all clips.
        bad: one message per unreadable file that was skipped.
        label_sets: the label sets that the clips' label numbers refer to.
    """

    clips: tuple[Clip, ...]
    quantiser: Quantiser
    bad: tuple[str, ...] = ()
    label_sets: tuple[LabelSet, ...] = ()

    @property
    def seconds(self) -> float:
        """Total duration of all clips."""
        return sum(clip.classes.shape[0] for clip in self.clips) / self.quantiser.sample_rate_hz

    def example(self, number: int, length: int | None = None, start: int = 0) -> Example:
        """Clip `number` from `start` on, whole or cut or padded to `length`."""
        clip = self.clips[number]
        return clip_example(clip.classes, self.quantiser, length or clip.classes.shape[0] - start, start, clip.labels)

    def batch(self, places: Sequence[tuple[int, int]], length: int) -> Example:
        """A batch of `example`s, given as pairs of clip number and start."""
        return stacked([self.example(number, length, start) for number, start in places])

    def examples(self, length: int) -> Iterator[tuple[Clip, Example]]:
        """Cover every sample of every clip once, in pieces of `length`; the last piece of a clip is padded."""
        _require_length(length)
        for number, clip in enumerate(self.clips):
            for start in range(0, clip.classes.shape[0], length):
                yield clip, self.example(number, length, start)


class ClipSampler:
    """Samples training examples of one length.

    Args:
        collection: the clips to sample from.
        length: samples per example. Longer clips are cropped at a random position, shorter ones padded.
        seed: from 0 to 2^64 - 1.
        by_duration: sample clips in proportion to their duration, for a few recordings of very different lengths.
            Otherwise every clip is sampled once per epoch.
        silence_after: samples of silence (the middle class) after each clip, so that a model learns where clips end.
        drop_labels: probability that an example has no labels, so that a model also learns to do without; of several
            label sets, each is also dropped on its own with this probability.
        drop_clock: probability that an example has no clock, whether or not it has labels.

    Raises:
        InputError: if there are no clips, or the length or seed is invalid.
    """

    def __init__(
        self,
        collection: ClipCollection,
        length: int,
        seed: int,
        by_duration: bool = False,
        silence_after: int = 0,
        drop_labels: float = 0.0,
        drop_clock: float = 0.0,
    ) -> None:
        _require_length(length)
        if not 0 <= seed < 2**64:
            raise InputError(f"the seed is {seed}; use an integer from 0 to 2^64 - 1")
        if not collection.clips:
            raise InputError("there are no clips to train on; give a folder that contains some")
        self.collection = collection
        self.length = length
        self.seed = seed
        self.by_duration = by_duration
        self.silence_after = silence_after
        self.drop_labels = drop_labels
        self.drop_clock = drop_clock
        durations = [clip.classes.shape[0] for clip in collection.clips]
        self._shares = np.cumsum(durations) / sum(durations)
        self._order: tuple[int, np.ndarray] | None = None  # order of the last epoch used, a function of (seed, epoch)

    def sample(self, index: int) -> Example:
        """Return example `index`, a function of (seed, index) only."""
        random = self._random(index, stream=0)
        if self.by_duration:
            number = min(int(np.searchsorted(self._shares, random.random(), side="right")), len(self._shares) - 1)
        else:
            epoch, position = divmod(index, len(self.collection.clips))
            number = int(self._epoch_order(epoch)[position])
        clip, quantiser = self.collection.clips[number], self.collection.quantiser
        classes, duration = clip.classes, clip.classes.shape[0]
        if self.drop_clock > 0 and self._random(index, stream=4).random() < self.drop_clock:
            duration = NO_CLOCK
        if self.silence_after:
            classes = torch.cat([classes, classes.new_full((self.silence_after,), quantiser.middle_class)])
        spare = classes.shape[0] - self.length
        start = int(random.integers(spare + 1)) if spare > 0 else 0
        return clip_example(classes, quantiser, self.length, start, self._kept_labels(clip.labels, index), duration)

    def _kept_labels(self, labels: tuple[int, ...], index: int) -> tuple[int, ...]:
        if not labels or self.drop_labels == 0:
            return labels
        uniforms = self._random(index, stream=2).random(1 + len(labels))
        if uniforms[0] < self.drop_labels:
            return (UNLABELLED,) * len(labels)
        if len(labels) == 1:
            return labels
        alone = zip(labels, uniforms[1:], strict=True)
        return tuple(UNLABELLED if uniform < self.drop_labels else number for number, uniform in alone)

    def sample_batch(self, index_start: int, count: int) -> Example:
        """Examples `index_start` to `index_start + count`, each (count, length)."""
        return stacked([self.sample(index) for index in range(index_start, index_start + count)])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        held = self._order
        if held is None or held[0] != epoch:
            held = (epoch, self._random(epoch, stream=1).permutation(len(self.collection.clips)))
            self._order = held
        return held[1]

    def _random(self, number: int, stream: int) -> np.random.Generator:
        """Return a generator that depends on (seed, number, stream) only."""
        key = np.array([self.seed, number], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


def stacked(examples: Sequence[Example]) -> Example:
    """Stack examples of the same length to a batch."""
    return Example(*(torch.stack(tensors) for tensors in zip(*examples, strict=True)))


def clip_example(
    classes: Tensor,
    quantiser: Quantiser,
    length: int,
    start: int = 0,
    labels: Sequence[int] = (),
    duration: int | None = None,
) -> Example:
    """Make an example of `length` samples of (samples,) classes, from `start` on.

    The clock runs for `duration` samples, by default to the end of the classes.

    The inputs begin with the middle class even in the middle of a clip: generation starts from it, and a model trained
    on crops alone would otherwise never see it.
    """
    _require_length(length)
    cut = classes[start : start + length].long()
    first = cut.new_full((1,), quantiser.middle_class)
    inputs = cut_or_pad(torch.cat([first, cut]), length, fill=quantiser.middle_class)
    targets = cut_or_pad(cut, length, fill=PADDING_TARGET)
    clock = torch.tensor([classes.shape[0] if duration is None else duration, start], dtype=torch.int64)
    return Example(inputs, targets, torch.tensor(labels, dtype=torch.int64), clock)


def read_clip(
    path: Path | str,
    quantiser: Quantiser,
    name: str | None = None,
    labels: tuple[int, ...] = (),
    preparation: ClipPreparation | None = None,
) -> Clip:
    """Read a whole file as classes, holding only one piece of it as samples at a time.

    Args:
        path: the file.
        quantiser: converts samples to classes and sets the rate.
        name: name of the clip; by default that of the file.
        labels: one number per label set.
        preparation: gain and trimming; the file is then read twice.

    Raises:
        InputError: as `audiomamba.data.waveforms.read_waveform`.
    """
    pieces, gain = prepared_pieces(path, quantiser, preparation)
    classes = [quantiser.encode(piece) for piece in pieces]
    return Clip(name or Path(path).name, torch.cat(classes), labels, gain)


def prepared_pieces(
    path: Path | str, quantiser: Quantiser, preparation: ClipPreparation | None
) -> tuple[Iterator[Tensor], float]:
    """Return the prepared samples of a file, piece by piece, and the gain that was applied.

    Raises:
        InputError: as `audiomamba.data.waveforms.waveform_pieces`.
    """
    rate = quantiser.sample_rate_hz
    pieces = waveform_pieces(path, rate)
    if preparation is None or preparation.changes_nothing:
        return pieces, 1.0
    measure = preparation.measure(pieces, rate)
    return preparation.apply(waveform_pieces(path, rate), measure), measure.gain


def read_clips(
    paths: Sequence[Path],
    quantiser: Quantiser,
    *,
    folder: Path,
    labels: ClipLabels | None = None,
    label_sets: Sequence[LabelSet] = (),
    preparation: ClipPreparation | None = None,
    skip_bad: bool = False,
) -> ClipCollection:
    """Read files into memory, 1 byte (up to 8 bits) or 4 bytes a sample; their order is kept.

    Args:
        paths: the files.
        quantiser: converts samples to classes and sets the rate.
        folder: clips are named by their paths relative to this folder.
        labels: labels of the clips of the folder.
        label_sets: the label sets that the clips' numbers refer to.
        preparation: gain and trimming of each clip.
        skip_bad: skip files that cannot be read and list them in the collection's `bad`.

    Raises:
        InputError: for the first unreadable file, unless such files are skipped; or if none is left.
    """

    def read(number: int) -> Clip:
        path = paths[number]
        name = path.relative_to(folder).as_posix()
        numbers = (labels or ClipLabels()).numbers(name, label_sets)
        return read_clip(path, quantiser, name, numbers, preparation)

    clips: list[Clip] = []
    bad: list[str] = []
    for found in read_in_parallel(read, len(paths)):
        if not isinstance(found, InputError):
            clips.append(found)
        elif skip_bad:
            bad.append(str(found))
        else:
            raise found
    if not clips:
        raise InputError(f"none of the {len(paths)} files of {folder} can be read; the first error: {bad[0]}")
    return ClipCollection(tuple(clips), quantiser, tuple(bad), tuple(label_sets))


def read_in_parallel(read: Callable[[int], Read], count: int) -> Iterator[Read | InputError]:
    """Yield the results of `read` for 0 to count - 1 in order, computed by several threads.

    The threads are at most `READ_AHEAD` files ahead, so that a slow consumer does not fill the memory. An `InputError`
    is yielded as a result, so that the caller decides what to do about a bad file.
    """

    def attempt(number: int) -> Read | InputError:
        try:
            return read(number)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_READERS) as readers:
        for first in range(0, count, READ_AHEAD):
            yield from readers.map(attempt, range(first, min(first + READ_AHEAD, count)))


def speech_commands_files(folder: Path | str, split: str, words: Sequence[str] = DIGITS) -> list[Path]:
    """List the clips of the given words in a split of Speech Commands, in a fixed order.

    The archive lists the clips of validation and test; all others are for training.

    Args:
        folder: the unpacked archive.
        split: one of `SPLITS`.
        words: names of its folders; the ten digits make SC09.

    Raises:
        InputError: if the split is unknown, or a list, the folder of a word or a listed clip is missing.
    """
    folder = Path(folder)
    if split not in SPLITS:
        raise InputError(f"Speech Commands has no split {split!r}; choose {', '.join(SPLITS)}")
    listed = {
        name: [clip for clip in listed_clips(folder / list_name) if clip.split("/")[0] in words]
        for name, list_name in _LISTS.items()
    }
    for word in words:
        if not (folder / word).is_dir():
            raise InputError(f"{folder} has no folder {word!r}; unpack the whole archive of Speech Commands there")
    if split != "train":
        for name in listed[split]:
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder / _LISTS[split]} lists {name}, which is not there; unpack the archive of Speech Commands "
                    "again"
                )
        return [folder / name for name in sorted(listed[split])]
    held_out = set(listed["valid"]) | set(listed["test"])
    found = {path.relative_to(folder).as_posix() for word in words for path in find_audio_files(folder / word)}
    names = sorted(found)
    return [folder / name for name in names if name not in held_out]


def split_recording(
    path: Path | str,
    quantiser: Quantiser,
    shares: Mapping[str, float] = RECORDING_SHARES,
    labels: tuple[int, ...] = (),
    preparation: ClipPreparation | None = None,
) -> dict[str, ClipCollection]:
    """Cut a long recording into consecutive parts, each a collection of one clip.

    Args:
        path: the recording.
        quantiser: converts samples to classes and sets the rate.
        shares: name and share of every part, in temporal order; they sum to 1.
        labels: one number per label set, for every part.
        preparation: applied to the whole recording, so that all parts get the same gain.

    Raises:
        InputError: as `read_clip`; or if the shares are not positive or do not sum to 1, or the recording is too short.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f"the parts of {path} have shares {dict(shares)}; give positive ones that add up to 1")
    whole = read_clip(path, quantiser, labels=labels, preparation=preparation)
    ends = np.round(np.cumsum(list(shares.values())) * whole.classes.shape[0]).astype(int).tolist()
    parts = {}
    for name, begin, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
        if end <= begin:
            raise InputError(f"{path} has too few samples to split ({whole.classes.shape[0]}); give a longer one")
        clip = Clip(f"{whole.name} ({name})", whole.classes[begin:end], labels, whole.gain)
        parts[name] = ClipCollection((clip,), quantiser)
    return parts


def listed_clips(path: Path) -> list[str]:
    """Read the list of a split, one path per line; a leading `./` and backslashes are accepted.

    Raises:
        InputError: if the list cannot be read, is empty, or has a path outside its folder.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing, and with it the official split; unpack the whole archive of Speech Commands"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); write one path per line") from error
    names = [PurePosixPath(line.strip().replace("\\", "/")).as_posix() for line in lines if line.strip()]
    if not names:
        raise InputError(f"{path} is empty; list the clips of the split, or remove it")
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or name == ".":
            raise InputError(f"{path} lists {name}, which is outside its folder; list paths within the folder")
    return [_as_converted(path.parent, name) for name in names]


def _as_converted(folder: Path, name: str) -> str:
    """Return the name of a listed clip, or of its conversion (`x.flac` where the list has `x.wav`)."""
    if (folder / name).is_file():
        return name
    converted = [PurePosixPath(name).with_suffix(suffix).as_posix() for suffix in SUFFIXES]
    there = [other for other in converted if (folder / other).is_file()]
    return there[0] if len(there) == 1 else name


def _require_length(length: int) -> None:
    if length < 1:
        raise InputError(f"an example has at least one sample but length is {length}")
