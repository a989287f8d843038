"""The plan of a species classifier's run: what its steps, validations and calibration cost, and when data runs out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from genomamba.data.genomes import GenomeCollection
from mambapipelines.species.recipe import SpeciesRecipe
from mambapipelines.training.plan import FORWARD_PASSES_PER_STEP, STRANDS, RunPlan

MAXIMUM_CALIBRATION_FRACTION = 0.1
MINIMUM_CALIBRATION_BASES = 16_384
# With more classes than this, validation and the least calibration have proportionally fewer windows of each.
CLASSES_IN_FULL = 20
# Without --minutes or --steps, a run passes over its training sequence this often at most: small genomes are not worth
# the recipe's time, and the class likelihoods overfit them (docs/experiments.md).
MOST_PASSES = 20


@dataclass(frozen=True)
class SpeciesPlan(RunPlan):
    """The plan of training a species classifier.

    Attributes:
        recipe: the recipe.
        length: length of a training window in bases.
        classes: number of classes.
        validation_windows: held-out windows of one validation; 0 when there is none.
        calibration_lengths: number of window lengths of the calibration; 0 when there is none.
        most_steps: limit of a run whose time was not given; `None` without one.
    """

    recipe: SpeciesRecipe
    length: int
    classes: int
    validation_windows: int
    calibration_lengths: int
    most_steps: int | None = None

    @property
    def windows_per_step(self) -> int:
        """Windows in one optimiser step."""
        return self.recipe.batch.windows_per_step(self.length)

    def step_positions(self, step: int) -> float:
        """Its bases."""
        length = self.recipe.length.warmup(self.length).length_at(step)
        return self.recipe.batch.windows_per_step(length) * length

    @property
    def validation_steps(self) -> float:
        """Return the cost of one validation in optimiser steps."""
        return STRANDS * self.validation_windows / (FORWARD_PASSES_PER_STEP * self.windows_per_step)

    @property
    def calibration_steps_per_base(self) -> float:
        """Return the cost of one base of the calibration budget in optimiser steps."""
        bases = STRANDS * self.classes * self.calibration_lengths
        return bases / (FORWARD_PASSES_PER_STEP * self.windows_per_step * self.length)

    def calibration_bases_per_class(self, total_steps: int) -> int:
        """Return the budget per calibration length: that of the recipe, but at most 10 % of the work.

        Very short runs exceed this limit, because a calibration needs a minimum number of windows.
        """
        wanted = self.recipe.calibration.bases_per_class
        if self.calibration_lengths == 0:
            return wanted
        affordable = int(MAXIMUM_CALIBRATION_FRACTION * total_steps / self.calibration_steps_per_base)
        least = MINIMUM_CALIBRATION_BASES * CLASSES_IN_FULL // max(CLASSES_IN_FULL, self.classes)
        return min(wanted, max(least, affordable))

    def final_steps(self, total_steps: int) -> float:
        """Return the cost of the calibration in optimiser steps."""
        return self.calibration_bases_per_class(total_steps) * self.calibration_steps_per_base

    def steps_within(self, steps_done: int, affordable: float, validations_done: int = 0) -> int:
        """The most steps that fit (`RunPlan.steps_within`), but at most `most_steps`, and at least one more."""
        fitting = super().steps_within(steps_done, affordable, validations_done)
        return fitting if self.most_steps is None else min(fitting, max(steps_done + 1, self.most_steps))


def steps_of_passes(recipe: SpeciesRecipe, length: int, training: GenomeCollection) -> int:
    """Return the steps, of windows of `length` bases, in which `MOST_PASSES` passes over the sequences are made."""
    bases = sum(sequence.length for sequence in training.sequences)
    return max(1, math.ceil(MOST_PASSES * bases / (recipe.batch.windows_per_step(length) * length)))
