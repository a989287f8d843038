"""Waveform models as a task of the training loop: predict the next sample, in bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from audiomamba.data.clips import PADDING_TARGET, ClipCollection, ClipSampler, Example
from audiomamba.metrics.likelihood import bits_per_sample, collection_likelihoods
from audiomamba.models import WaveformModel
from mambacore.longsequence import TokenCrossEntropy
from mambapipelines.training.task import Batch, Pieces, TrainingTask
from mambapipelines.waveforms.recipe import WaveformTrainingRecipe

NATS_PER_BIT = math.log(2)


class BitsCrossEntropy(TokenCrossEntropy):
    """The mean cross-entropy over all positions in bits, in shares."""

    def __call__(self, logits: Tensor, positions: slice) -> Tensor:
        return super().__call__(logits, positions) / NATS_PER_BIT


class WaveformTask(TrainingTask):
    """Predict every sample of clips from those before it: step `s` takes the clips `s * count` on of a sampler.

    The loss is the negative log-likelihood in bits per sample, over all samples that are not padding.

    Args:
        model: the model, trained in place.
        recipe: number and length of clips.
        training: training clips.
        validation: held-out clips, if any.
        seed: seed of the order of the clips and of the crops of long ones.
        by_duration: see `audiomamba.data.clips.ClipSampler`.
        write_samples: called at each validation with the current model and step to generate clips.
    """

    validation_figures: ClassVar[dict[str, str]] = {"valid_bits_per_sample": ".4f"}
    deciding_figure = "valid_bits_per_sample"
    unit = "samples"

    def __init__(
        self,
        model: WaveformModel,
        recipe: WaveformTrainingRecipe,
        training: ClipCollection,
        validation: ClipCollection | None,
        seed: int,
        by_duration: bool = False,
        write_samples: Callable[[WaveformModel, int], object] | None = None,
    ) -> None:
        self.model: WaveformModel = model
        self.recipe = recipe
        self.training = training
        self.validation = validation
        self.lengths = recipe.length.warmup(recipe.batch.clip_length)
        self._silence_after = round(recipe.preparation.end_seconds * model.config.quantiser.sample_rate_hz)
        self._seed = seed
        self._by_duration = by_duration
        self._write_samples = write_samples
        self._samplers: dict[int, ClipSampler] = {}

    def batch(self, step: int) -> Batch:
        """An `Example` with a leading dimension, the longest clip first."""
        length = self.lengths.length_at(step)
        if length not in self._samplers:
            self._samplers[length] = ClipSampler(
                self.training,
                length,
                self._seed,
                self._by_duration,
                self._silence_after,
                self.recipe.labels.drop_probability,
                self.recipe.clock.drop_probability,
            )
        count = self.recipe.batch.clips_per_step(length)
        found = self._samplers[length].sample_batch(step * count, count)
        order = (found.targets != PADDING_TARGET).sum(1).argsort(descending=True, stable=True)
        return tuple(tensor[order] for tensor in found)

    def rows_per_micro_batch(self, length: int) -> int:
        """Clips of `length` samples per micro-batch."""
        return self.recipe.batch.clips_per_micro_batch(length)

    def trimmed(self, micro_batch: Batch) -> Batch:
        """The micro-batch up to the end of its longest clip."""
        return tuple(Example(*micro_batch).without_common_padding())

    def weight(self, micro_batch: Batch) -> float:
        """Return the number of samples that are not padding."""
        return float((micro_batch[1] != PADDING_TARGET).sum())

    def pieces(self, micro_batch: Batch) -> Pieces | None:
        """Process clips longer than `piece_length` in pieces."""
        inputs, targets, labels, clock = Example(*micro_batch)
        if inputs.shape[1] <= self.recipe.batch.piece_length:
            return None
        state = self.model.labelled_state(labels, clock)
        return Pieces(inputs, BitsCrossEntropy(targets), self.recipe.batch.piece_length, state)

    def loss(self, replica: nn.Module, micro_batch: Batch) -> dict[str, Tensor]:
        """Bits per sample of a micro-batch."""
        inputs, targets, labels, clock = Example(*micro_batch)
        model = cast(WaveformModel, replica)
        total, count, _ = model.loss(inputs, targets, model.labelled_state(labels, clock))
        return {"loss": total / (count.clamp(min=1) * NATS_PER_BIT)}

    def can_validate(self) -> bool:
        """Whether there are held-out clips."""
        return self.validation is not None

    def validate(self) -> dict[str, float]:
        """Return the bits per sample of the held-out clips; also generates clips."""
        assert self.validation is not None
        self.model.eval()
        figure = bits_per_sample(
            collection_likelihoods(
                self.model, self.validation, self.recipe.batch.clip_length, self.recipe.validation.samples
            ).values()
        )
        if self._write_samples is not None:
            self._write_samples(self.model, self.steps_done)
        self.model.train()
        return {"valid_bits_per_sample": figure}

    def describe_validation(self, figures: dict[str, float]) -> str:
        """In words."""
        return f"held out {figures['valid_bits_per_sample']:.3f} bits/sample"

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the model's groups, without weight decay of the embedding."""
        return self.model.parameter_groups(weight_decay)

    def samples_seen(self, total_steps: int) -> int:
        """Samples in the examples of the first `total_steps` steps, padding included."""
        lengths = [self.lengths.length_at(step) for step in range(total_steps)]
        return sum(length * self.recipe.batch.clips_per_step(length) for length in lengths)
