"""Likelihoods of clips under a waveform model, in memory that does not grow with their length."""

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
"""Samples per forward pass, over all clips of a batch."""

_LOGIT_POSITIONS: Final = 8_192  # logits of 256 classes are 8 MiB then
_SCORED_AT_ONCE: Final = 262_144  # samples per batch of clips in memory
_MOST_CLIPS: Final = 64


class ClipLikelihood(NamedTuple):
    """The negative log-likelihood of a clip."""

    samples: int
    nats: float  # sum over all samples


class _Piecewise:
    """Accumulates the likelihoods of a batch of clips piece by piece."""

    def __init__(
        self, model: WaveformModel, clips: int, labels: Tensor | None = None, clock: Tensor | None = None
    ) -> None:
        self.model = model
        self.nats = torch.zeros(clips, dtype=torch.float64)
        self._device = model.head.weight.device
        labels, clock = (None if one is None else one.to(self._device) for one in (labels, clock))
        self._state: WaveformState | None = model.labelled_state(labels, clock)

    def read(self, inputs: Tensor, targets: Tensor) -> None:
        """Add a piece: (clips, length) inputs and targets as in `audiomamba.data.clips.Example`."""
        inputs, targets = inputs.to(self._device), targets.to(self._device)
        hidden, self._state = self.model.hidden(inputs, self._state)
        stretch = max(1, _LOGIT_POSITIONS // inputs.shape[0])
        for part, wanted in zip(hidden.split(stretch, dim=1), targets.split(stretch, dim=1), strict=True):
            logits = self.model.logits(part).flatten(0, 1).float()
            nats = F.cross_entropy(logits, wanted.flatten(), ignore_index=PADDING_TARGET, reduction="none")
            self.nats += widened(nats).view(wanted.shape).sum(dim=1).cpu()


def bits_per_sample(likelihoods: Iterable[ClipLikelihood]) -> float:
    """Return the bits per sample of clips, averaged over samples."""
    nats, samples = map(sum, zip(*((one.nats, one.samples) for one in likelihoods), strict=True))
    return nats / (samples * math.log(2))


def bits_by_label(likelihoods: Mapping[int, ClipLikelihood], collection: ClipCollection) -> dict[str, dict[str, float]]:
    """Return the bits per sample of the clips of each label, by label set and value.

    Args:
        likelihoods: likelihoods by number of the clip in the collection.
        collection: the clips with their labels.
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
    """Compute the likelihoods of clips in memory given their labels and durations, by clip number.

    Args:
        model: in evaluation mode.
        collection: the clips.
        length: longer clips are cut into sections of this many samples, each predicted from its start, as in training.
        most_samples: approximate number of samples to score, in sections spread evenly over the clips; None for all.
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
        scored = _Piecewise(model, len(here), batch.labels, batch.clock)
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
    clocks: Tensor | None = None,
) -> list[ClipLikelihood]:
    """Compute the likelihoods of clips, each sample given all before it (padding is not counted).

    Args:
        clips: (length,) classes each; they are padded to the longest, so lengths should be similar.
        quantiser: the model's.
        piece_samples: samples per forward pass, over all clips; states are carried between pieces, so the result does
            not depend on it.
        labels: (clips, label sets) label numbers; None for no labels.
        clocks: (clips,) durations of the clocks in samples; None for no clocks.
    """
    longest = max(clip.shape[0] for clip in clips)
    examples = [clip_example(clip, quantiser, longest) for clip in clips]
    inputs = torch.stack([example.inputs for example in examples])
    targets = torch.stack([example.targets for example in examples])
    begun = None if clocks is None else torch.stack([clocks, torch.zeros_like(clocks)], dim=1)
    found = _Piecewise(model, len(clips), labels, begun)
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
    """As `clip_likelihoods`, for one file of any length, which is read piece by piece.

    Args:
        path: the file, at any rate.
        progress: called with the number of samples scored.
        labels: (1, label sets) label numbers; None for no labels.

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
    """As `clip_likelihoods`, for files; results are in the order of `paths`.

    Short files are batched with others of similar length, up to `piece_samples` including padding; longer ones are
    processed piece by piece, so memory is bounded whatever their lengths.

    Args:
        paths: the files, at any rate.
        piece_samples: samples per forward pass.
        progress: called with the number of samples scored.
        labels: (files, label sets) label numbers; None for no labels.

    Returns:
        A likelihood per file, or the error if the file cannot be read.
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
    """Yield the prepared and quantised files."""
    quantiser, preparation = model.config.quantiser, model.config.preparation.without_trimming()
    return read_in_parallel(
        lambda number: read_clip(paths[number], quantiser, preparation=preparation).classes, len(paths)
    )


def clip_samples(path: Path, quantiser: Quantiser) -> int:
    """Return the approximate number of samples of a file at a quantiser's rate, from its header.

    Raises:
        InputError: as `audiomamba.data.waveforms.read_header`.
    """
    header = read_header(path)
    return max(1, -(-header.frames * quantiser.sample_rate_hz // header.sample_rate_hz))


def _batches(lengths: dict[int, int], piece_samples: int) -> Iterator[list[int]]:
    """Yield batches of clip numbers of similar length, shortest first, of at most `piece_samples` with padding."""
    batch: list[int] = []
    for number in sorted(lengths, key=lambda one: (lengths[one], one)):
        if batch and (len(batch) == _MOST_CLIPS or (len(batch) + 1) * lengths[number] > piece_samples):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
