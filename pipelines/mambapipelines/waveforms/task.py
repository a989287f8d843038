"""Waveform models as a task of the training road: foretell the next sample, in bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from audiomamba.data.clips import PADDING_TARGET, ClipCollection, ClipSampler, Example
from audiomamba.models import WaveformModel
from mambacore.longsequence import TokenCrossEntropy
from mambapipelines.training.task import Batch, Pieces, TrainingTask
from mambapipelines.waveforms.recipe import AudioRecipe

NATS_PER_BIT = math.log(2)


class BitsCrossEntropy(TokenCrossEntropy):
    """The mean cross entropy over all positions in bits, in shares."""

    def __call__(self, logits: Tensor, positions: slice) -> Tensor:
        return super().__call__(logits, positions) / NATS_PER_BIT


class WaveformTask(TrainingTask):
    """Foretell every sample of clips from those before it: step `s` takes the clips `s * count` on of a sampler.

    The loss is the negative log-likelihood in bits per sample, over all samples that are no padding.

    Args:
        model: trained in place.
        recipe: how many clips, and how long.
        training: what is learned from.
        validation: held-out clips, or none.
        seed: of the order of the clips and of the places at which long ones are cut.
        by_duration: see `audiomamba.data.clips.ClipSampler`.
        draw: called at each validation with the model as it is and the steps taken: writes clips that it generates.
    """

    validation_figures: ClassVar[dict[str, str]] = {"valid_bits_per_sample": ".4f"}
    deciding_figure = "valid_bits_per_sample"
    unit = "samples"

    def __init__(
        self,
        model: WaveformModel,
        recipe: AudioRecipe,
        training: ClipCollection,
        validation: ClipCollection | None,
        seed: int,
        by_duration: bool = False,
        draw: Callable[[WaveformModel, int], object] | None = None,
    ) -> None:
        self.model: WaveformModel = model
        self.recipe = recipe
        self.training = training
        self.validation = validation
        self.lengths = recipe.length.warmup(recipe.batch.clip_length)
        self._seed = seed
        self._by_duration = by_duration
        self._draw = draw
        self._samplers: dict[int, ClipSampler] = {}

    def batch(self, step: int) -> Batch:
        """Inputs and targets, each (clips, length) int64, the longest clip first: neighbours are of like lengths."""
        length = self.lengths.length_at(step)
        if length not in self._samplers:
            self._samplers[length] = ClipSampler(self.training, length, self._seed, self._by_duration)
        count = self.recipe.batch.clips_per_step(length)
        inputs, targets = self._samplers[length].sample_batch(step * count, count)
        order = (targets != PADDING_TARGET).sum(1).argsort(descending=True, stable=True)
        return inputs[order], targets[order]

    def rows_per_micro_batch(self, length: int) -> int:
        """Clips of `length` samples that go through the model at once."""
        return self.recipe.batch.clips_per_micro_batch(length)

    def weight(self, micro_batch: Batch) -> float:
        """Its samples that are no padding."""
        return float((micro_batch[1] != PADDING_TARGET).sum())

    def pieces(self, micro_batch: Batch) -> Pieces | None:
        """Pieces for clips that are longer than the recipe's."""
        inputs, targets = without_common_padding(Example(micro_batch[0], micro_batch[1]))
        if inputs.shape[1] <= self.recipe.batch.piece_length:
            return None
        return Pieces(inputs, BitsCrossEntropy(targets), self.recipe.batch.piece_length)

    def loss(self, replica: nn.Module, micro_batch: Batch) -> dict[str, Tensor]:
        """Bits per sample of a micro-batch."""
        inputs, targets = without_common_padding(Example(micro_batch[0], micro_batch[1]))
        total, count, _ = cast(WaveformModel, replica).loss(inputs, targets)
        return {"loss": total / (count.clamp(min=1) * NATS_PER_BIT)}

    def can_validate(self) -> bool:
        """Whether there are held-out clips."""
        return self.validation is not None

    def validate(self) -> dict[str, float]:
        """Bits per sample of the held-out clips; draws clips besides."""
        assert self.validation is not None
        self.model.eval()
        figure = bits_per_sample(
            self.model, self.validation, self.recipe.batch.clip_length, self.recipe.validation.samples
        )
        if self._draw is not None:
            self._draw(self.model, self.steps_done)
        self.model.train()
        return {"valid_bits_per_sample": figure}

    def describe_validation(self, figures: dict[str, float]) -> str:
        """In words."""
        return f"held out {figures['valid_bits_per_sample']:.3f} bits/sample"

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Those of the model, whose embedding does not decay."""
        return self.model.parameter_groups(weight_decay)

    def samples_seen(self, total_steps: int) -> int:
        """Samples in the examples of the first `total_steps` steps, padding included."""
        lengths = [self.lengths.length_at(step) for step in range(total_steps)]
        return sum(length * self.recipe.batch.clips_per_step(length) for length in lengths)


@torch.no_grad()
def bits_per_sample(
    model: WaveformModel, collection: ClipCollection, length: int, most_samples: int | None = None
) -> float:
    """The mean negative log-likelihood of clips, in bits per sample.

    Args:
        model: in evaluation mode.
        collection: the clips.
        length: longer clips are cut into stretches of so many samples, each foretold from its start, as in training.
        most_samples: about so many samples are used, of stretches that are spread evenly over all; None for all.
    """
    stretches = [
        (number, start)
        for number, clip in enumerate(collection.clips)
        for start in range(0, clip.classes.shape[0], length)
    ]
    samples = sum(clip.classes.shape[0] for clip in collection.clips)
    if most_samples is not None and samples > most_samples:
        wanted = max(1, len(stretches) * most_samples // samples)
        stretches = [stretches[index * len(stretches) // wanted] for index in range(wanted)]
    stretches.sort(key=lambda place: min(length, collection.clips[place[0]].classes.shape[0] - place[1]))
    total, count = 0.0, 0
    for examples in _batches(collection, stretches, length):
        nats, counted, _ = model.loss(*without_common_padding(examples))
        total, count = total + float(nats), count + int(counted)
    return total / (count * NATS_PER_BIT)


def without_common_padding(examples: Example) -> Example:
    """(batch, length) inputs and targets up to the last sample of the longest clip."""
    used = (examples.targets != PADDING_TARGET).any(0).nonzero()
    longest = int(used[-1]) + 1 if len(used) else 1
    return Example(examples.inputs[:, :longest], examples.targets[:, :longest])


def _batches(
    collection: ClipCollection, stretches: list[tuple[int, int]], length: int, positions: int = 262_144
) -> Iterator[Example]:
    rows = max(1, positions // length)
    for first in range(0, len(stretches), rows):
        examples = [collection.example(number, length, start) for number, start in stretches[first : first + rows]]
        yield Example(
            torch.stack([example.inputs for example in examples]),
            torch.stack([example.targets for example in examples]),
        )
