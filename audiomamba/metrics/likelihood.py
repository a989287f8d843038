"""How likely clips are under a waveform model, clip by clip, in memory that does not grow with their length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from audiomamba.data.clips import (
    PADDING_TARGET,
    ClipCollection,
    clip_example,
    prepared_pieces,
    read_clip,
    read_in_parallel,
)
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.waveforms import read_header
from audiomamba.models import WaveformModel, WaveformState
from mambacore.devices import widened
from mambacore.errors import InputError

PIECE_SAMPLES: Final = 65_536
"""That go through a model at once, over all clips of a batch."""

_LOGIT_POSITIONS: Final = 8_192  # logits of 256 classes are 8 MiB then
_SCORED_AT_ONCE: Final = 262_144  # samples of clips in memory
_MOST_CLIPS: Final = 64


class ClipLikelihood(NamedTuple):
    """The negative log-likelihood of a clip."""

    samples: int
    nats: float  # of all samples together


class _Piecewise:
    """Likelihoods of clips side by side, of which one piece after the other comes in."""

    def __init__(self, model: WaveformModel, clips: int, labels: Tensor | None = None) -> None:
        self.model = model
        self.nats = torch.zeros(clips, dtype=torch.float64)
        self._device = model.head.weight.device
        self._state: WaveformState | None = model.labelled_state(None if labels is None else labels.to(self._device))

    def read(self, inputs: Tensor, targets: Tensor) -> None:
        """Go on with (clips, length) of what `audiomamba.data.clips.Example` holds."""
        inputs, targets = inputs.to(self._device), targets.to(self._device)
        hidden, self._state = self.model.hidden(inputs, self._state)
        stretch = max(1, _LOGIT_POSITIONS // inputs.shape[0])
        for part, wanted in zip(hidden.split(stretch, dim=1), targets.split(stretch, dim=1), strict=True):
            logits = self.model.logits(part).flatten(0, 1).float()
            nats = F.cross_entropy(logits, wanted.flatten(), ignore_index=PADDING_TARGET, reduction="none")
            self.nats += widened(nats).view(wanted.shape).sum(dim=1).cpu()


def bits_per_sample(likelihoods: Iterable[ClipLikelihood]) -> float:
    """Bits per sample of some clips, every sample counting the same."""
    nats, samples = map(sum, zip(*((one.nats, one.samples) for one in likelihoods), strict=True))
    return nats / (samples * math.log(2))


def bits_by_label(likelihoods: Mapping[int, ClipLikelihood], collection: ClipCollection) -> dict[str, dict[str, float]]:
    """Bits per sample of the clips of each label, by label set and value.

    Args:
        likelihoods: by the clip's number in the collection.
        collection: with the labels.
    """
    found: dict[str, dict[str, float]] = {}
    for position, one in enumerate(collection.label_sets):
        of_value = [
            [like for clip, like in likelihoods.items() if collection.clips[clip].labels[position] == number]
            for number in range(1, len(one.values) + 1)
        ]
        found[one.name] = {
            value: bits_per_sample(clips) for value, clips in zip(one.values, of_value, strict=True) if clips
        }
    return found


@torch.no_grad()
def collection_likelihoods(
    model: WaveformModel, collection: ClipCollection, length: int, most_samples: int | None = None
) -> dict[int, ClipLikelihood]:
    """What clips in memory cost a model in evaluation mode, given their labels, by their numbers.

    Args:
        model: in evaluation mode.
        collection: the clips.
        length: longer clips are cut into stretches of so many samples, each predicted from its start, as in training.
        most_samples: about so many samples are used, of stretches that are spread evenly over all; None for all.
    """
    clips = collection.clips
    places = [(number, start) for number, clip in enumerate(clips) for start in range(0, clip.classes.shape[0], length)]
    samples = sum(clip.classes.shape[0] for clip in clips)
    if most_samples is not None and samples > most_samples:
        wanted = max(1, len(places) * most_samples // samples)
        places = [places[index * len(places) // wanted] for index in range(wanted)]
    places.sort(key=lambda place: min(length, clips[place[0]].classes.shape[0] - place[1]))
    found: dict[int, ClipLikelihood] = {}
    rows = max(1, _SCORED_AT_ONCE // length)
    for first in range(0, len(places), rows):
        here = places[first : first + rows]
        batch = collection.batch(here, length).without_common_padding()
        scored = _Piecewise(model, len(here), batch.labels)
        scored.read(batch.inputs, batch.targets)
        counts = (batch.targets != PADDING_TARGET).sum(1)
        for (number, _), nats, count in zip(here, scored.nats.tolist(), counts.tolist(), strict=True):
            before = found.get(number, ClipLikelihood(0, 0.0))
            found[number] = ClipLikelihood(before.samples + count, before.nats + nats)
    return found


@torch.no_grad()
def clip_likelihoods(
    model: WaveformModel,
    clips: Sequence[Tensor],
    quantiser: Quantiser,
    piece_samples: int = PIECE_SAMPLES,
    labels: Tensor | None = None,
) -> list[ClipLikelihood]:
    """What clips cost a model in evaluation mode, every sample given all before it (padding is not counted).

    Args:
        clips: (length,) classes each, padded together to the longest, so of like lengths at best.
        quantiser: the model's.
        piece_samples: samples, over all clips, that go through the model at once; the states between pieces are handed
            on, so the result does not depend on it.
        labels: (clips, label sets), numbers; None for none.
    """
    longest = max(clip.shape[0] for clip in clips)
    examples = [clip_example(clip, quantiser, longest) for clip in clips]
    inputs = torch.stack([example.inputs for example in examples])
    targets = torch.stack([example.targets for example in examples])
    found = _Piecewise(model, len(clips), labels)
    piece = max(1, piece_samples // len(clips))
    for read, wanted in zip(inputs.split(piece, dim=1), targets.split(piece, dim=1), strict=True):
        found.read(read, wanted)
    return [ClipLikelihood(clip.shape[0], float(nats)) for clip, nats in zip(clips, found.nats, strict=True)]


@torch.no_grad()
def recording_likelihood(
    model: WaveformModel,
    path: Path,
    piece_samples: int = PIECE_SAMPLES,
    progress: Callable[[int], object] | None = None,
    labels: Tensor | None = None,
) -> ClipLikelihood:
    """As `clip_likelihoods`, of one file of any length, which is read piece by piece as well.

    Args:
        path: the file, of any rate.
        progress: called with how many samples were scored.
        labels: (1, label sets), numbers; None for none.

    Raises:
        InputError: as `audiomamba.data.waveforms.read_waveform`.
    """
    quantiser = model.config.quantiser
    found, samples = _Piecewise(model, 1, labels), 0
    before = torch.full((1,), quantiser.middle_class)
    for block in prepared_pieces(path, quantiser, model.config.preparation.without_trimming())[0]:
        for piece in quantiser.encode(block).long().split(piece_samples):
            found.read(torch.cat([before, piece[:-1]]).unsqueeze(0), piece.unsqueeze(0))
            before = piece[-1:]
            samples += piece.shape[0]
            if progress is not None:
                progress(piece.shape[0])
    return ClipLikelihood(samples, float(found.nats[0]))


def file_likelihoods(
    model: WaveformModel,
    paths: Sequence[Path],
    *,
    piece_samples: int = PIECE_SAMPLES,
    progress: Callable[[int], object] | None = None,
    labels: Tensor | None = None,
) -> list[ClipLikelihood | InputError]:
    """As `clip_likelihoods`, of files in any order; the result is in theirs.

    Short ones go through the model together with others of about their length, at most `piece_samples` with the
    padding; longer ones piece by piece, so memory is bounded whatever their lengths.

    Args:
        paths: the files, of any rate.
        piece_samples: samples that go through the model at once.
        progress: called with how many samples were scored.
        labels: (files, label sets), numbers; None for none.

    Returns:
        For a file that cannot be read, the error: what to do about it is for the caller to say.
    """
    quantiser = model.config.quantiser
    found: dict[int, ClipLikelihood | InputError] = {}
    lengths: dict[int, int] = {}
    for number, length in enumerate(read_in_parallel(lambda one: clip_samples(paths[one], quantiser), len(paths))):
        if isinstance(length, InputError):
            found[number] = length
        else:
            lengths[number] = length
    for batch in _batches(lengths, piece_samples):
        if lengths[batch[0]] > piece_samples:
            try:
                number = batch[0]
                own = None if labels is None else labels[number : number + 1]
                found[number] = recording_likelihood(model, paths[number], piece_samples, progress, own)
            except InputError as error:
                found[batch[0]] = error
            continue
        clips: dict[int, Tensor] = {}
        in_batch = [paths[number] for number in batch]
        for number, clip in zip(batch, _classes(in_batch, model), strict=True):
            if isinstance(clip, InputError):
                found[number] = clip
            else:
                clips[number] = clip
        if clips:
            own = None if labels is None else labels[list(clips)]
            scored = clip_likelihoods(model, list(clips.values()), quantiser, piece_samples, own)
            found |= zip(clips, scored, strict=True)
            if progress is not None:
                progress(sum(clip.shape[0] for clip in clips.values()))
    return [found[number] for number in range(len(paths))]


def _classes(paths: Sequence[Path], model: WaveformModel) -> Iterator[Tensor | InputError]:
    """The files as the model hears them, whole."""
    quantiser, preparation = model.config.quantiser, model.config.preparation.without_trimming()
    return read_in_parallel(
        lambda number: read_clip(paths[number], quantiser, preparation=preparation).classes, len(paths)
    )


def clip_samples(path: Path, quantiser: Quantiser) -> int:
    """About how many samples a file has at a quantiser's rate, by its header.

    Raises:
        InputError: as `audiomamba.data.waveforms.read_header`.
    """
    header = read_header(path)
    return max(1, -(-header.frames * quantiser.sample_rate_hz // header.sample_rate_hz))


def _batches(lengths: dict[int, int], piece_samples: int) -> Iterator[list[int]]:
    """Numbers of clips of like lengths, the shortest first; a batch has at most `piece_samples` with the padding."""
    batch: list[int] = []
    for number in sorted(lengths, key=lambda one: (lengths[one], one)):
        if batch and (len(batch) == _MOST_CLIPS or (len(batch) + 1) * lengths[number] > piece_samples):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
