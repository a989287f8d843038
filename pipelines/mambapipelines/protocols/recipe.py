"""The recipe of a published species task, and its scaled schedule."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from mambapipelines.finetuning.recipe import MODEL_DEFAULTS
from mambapipelines.training.recipe import TrainingRecipe
from mambapipelines.training.schedules import LengthWarmup


@dataclass(frozen=True)
class ProtocolRecipe:
    """The schedule of a task, in its own units.

    `epochs` of `steps_per_epoch` steps of `windows_per_step` windows at every length. Windows longer than
    `warmup_length` begin with that length, which doubles every `epochs_per_length` epochs. Up to `mean_pooling_up_to`
    bases the head reads the mean of all positions, beyond it the last one.
    """

    epochs: int = 10
    steps_per_epoch: int = 1024
    windows_per_step: int = 64
    warmup_length: int = 16_384
    epochs_per_length: int = 1
    mean_pooling_up_to: int = 0


@dataclass(frozen=True)
class SpeciesProtocolRecipe(TrainingRecipe):
    """The recipe of a published species task; of `batch` only the size of micro-batches is used."""

    folder: ClassVar[str] = "species"
    model_defaults: ClassVar[dict[str, Any]] = MODEL_DEFAULTS

    protocol: ProtocolRecipe = field(default_factory=ProtocolRecipe)

    def positive_values(self) -> dict[str, float]:
        """Return values of task-specific sections that must be positive, by key."""
        values = asdict(self.protocol)
        return {f"protocol.{key}": value for key, value in values.items() if key != "mean_pooling_up_to"}

    def pooling(self, length: int) -> str:
        """Return the pooling for windows of `length` bp."""
        return "mean" if length <= self.protocol.mean_pooling_up_to else "last"


@dataclass(frozen=True)
class ProtocolSchedule:
    """Number of steps, and of windows per step.

    Attributes:
        steps, published_steps: optimiser steps, with and without the scale.
        windows_per_step: windows per step.
        lengths: window length by step.
    """

    steps: int
    published_steps: int
    windows_per_step: int
    lengths: LengthWarmup

    def describe(self) -> str:
        """Describe the schedule in comparison with the published one."""
        share = self.steps / self.published_steps
        return (
            f"{self.steps:,} steps of {self.windows_per_step} windows, {share:.2%} of the recipe's "
            f"{self.published_steps:,} steps"
        )


def scaled_schedule(recipe: SpeciesProtocolRecipe, length: int, scale: float) -> ProtocolSchedule:
    """Return the published schedule with the steps per epoch multiplied by `scale`, at least one."""
    protocol = recipe.protocol
    per_epoch = max(1, round(scale * protocol.steps_per_epoch))
    return ProtocolSchedule(
        steps=protocol.epochs * per_epoch,
        published_steps=protocol.epochs * protocol.steps_per_epoch,
        windows_per_step=protocol.windows_per_step,
        lengths=LengthWarmup(protocol.warmup_length, protocol.epochs_per_length * per_epoch, length),
    )
