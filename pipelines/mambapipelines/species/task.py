"""Species classification as a task of the training loop."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from genomamba.classification.evidence import evidence_of_records, split_evidence
from genomamba.data.genomes import GenomeCollection
from genomamba.data.windows import EvaluationWindows, WindowSampler
from genomamba.models.species_classifier import SpeciesClassifier
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.training.task import Batch, TrainingTask


class SpeciesTask(TrainingTask):
    """Classify windows: step `s` takes the windows `s * count` to `(s + 1) * count - 1` of a sampler.

    Args:
        model: the model, trained in place.
        recipe: number and lengths of windows.
        sampler: windows of the full length.
        training: genomes that the shorter windows of the length warm-up are sampled from.
        validation: held-out windows.
    """

    training_figures: ClassVar[dict[str, str]] = {"accuracy": ".4f"}
    validation_figures: ClassVar[dict[str, str]] = {"held_out_accuracy": ".4f"}
    deciding_figure = "held_out_accuracy"
    higher_is_better = True
    unit = "bases"

    def __init__(
        self,
        model: SpeciesClassifier,
        recipe: SpeciesRecipe,
        sampler: WindowSampler,
        training: GenomeCollection,
        validation: EvaluationWindows,
    ) -> None:
        self.model: SpeciesClassifier = model
        self.recipe = recipe
        self.training = training
        self.validation = validation
        self.lengths = recipe.length.warmup(sampler.length)
        self._seed = sampler.seed
        self._samplers = {sampler.length: sampler}
        self._labels = np.array([window.label for window in validation.windows])

    def batch(self, step: int) -> Batch:
        """(windows, length) uint8 token ids and (windows,) int64 labels."""
        length = self.lengths.length_at(step)
        if length not in self._samplers:
            self._samplers[length] = WindowSampler(self.training, length, self._seed)
        count = self.recipe.batch.windows_per_step(length)
        tokens, labels = self._samplers[length].sample_batch(step * count, count)
        return torch.from_numpy(tokens), torch.from_numpy(labels).long()

    def rows_per_micro_batch(self, length: int) -> int:
        """Windows of `length` bases per micro-batch."""
        return self.recipe.batch.windows_per_micro_batch(length)

    def loss(self, replica: nn.Module, micro_batch: Batch) -> dict[str, Tensor]:
        """Loss and accuracy of windows of known class."""
        return cast(SpeciesClassifier, replica).loss(*micro_batch)

    def can_validate(self) -> bool:
        """Whether every class has a held-out window of the full length."""
        return not self.validation.missing_classes

    def validate(self) -> dict[str, float]:
        """Accuracy on the held-out windows of the full length."""
        self.model.eval()
        tokens = np.stack([window.tokens() for window in self.validation.windows])
        evidence, _ = split_evidence(self.model, evidence_of_records(self.model, tokens))
        self.model.train()
        return {"held_out_accuracy": float((evidence.argmax(axis=1) == self._labels).mean())}

    def describe_validation(self, figures: dict[str, float]) -> str:
        """The accuracy in percent, and of how many windows where those overlap."""
        windows, independent = len(self.validation.windows), self.validation.independent
        rests_on = f" of {windows} windows, {independent} of them independent" if independent < windows else ""
        return f"held-out accuracy {figures['held_out_accuracy']:.1%}{rests_on}"

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the classifier's groups, with a higher decay for the evidence of contexts."""
        return self.model.parameter_groups(weight_decay)

    def bases_seen(self, total_steps: int) -> int:
        """Bases in the windows of the first `total_steps` steps."""
        lengths = [self.lengths.length_at(step) for step in range(total_steps)]
        return sum(length * self.recipe.batch.windows_per_step(length) for length in lengths)
