"""Planning of a run: time for steps, validations and final work, from the measured time of a step.

All work is measured in optimiser steps, so the plan is a pure function of the total number of steps, and a resumed run
follows the same plan.
"""

from __future__ import annotations

import bisect
import math

from mambapipelines.training.recipe import TrainingRecipe
from mambapipelines.training.schedules import Schedule

# Forward and backward cost about three forward passes.
FORWARD_PASSES_PER_STEP = 3
# Held-out windows are evaluated on both strands.
STRANDS = 2
MAXIMUM_VALIDATION_FRACTION = 0.05


class RunPlan:
    """The plan of a run: its steps, its validations, and the final work of a task.

    Attributes:
        recipe: the recipe.
    """

    recipe: TrainingRecipe

    @property
    def validation_steps(self) -> float:
        """Return the cost of one validation in optimiser steps."""
        raise TypeError(f"{type(self).__name__} does not say what a validation costs")

    def final_steps(self, total_steps: int) -> float:
        """Return the cost of a task's final work in optimiser steps."""
        return 0.0

    def step_positions(self, step: int) -> float:
        """Return the positions of step `step` (0-based), in any unit; needed for a length warm-up."""
        return 1.0

    @property
    def longest_warmup(self) -> int:
        """Steps after which windows have their full length: it doubles from stage to stage and is below 2^63."""
        return 63 * self.recipe.length.warmup_steps_per_stage

    def step_cost(self, step: int) -> float:
        """Return the cost of step `step` (0-based) relative to full length: less during a length warm-up."""
        return self.step_positions(step) / self.step_positions(self.longest_warmup)

    def steps_cost(self, steps: int) -> float:
        """Return the cost of the first `steps` steps in steps of the full length."""
        warming = min(steps, self.longest_warmup)
        return sum(map(self.step_cost, range(warming))) + steps - warming

    def validation_interval(self, total_steps: int) -> int:
        """Return the steps between validations, such that these take at most 5 % of the work."""
        wanted = math.ceil(self.recipe.validation.every_fraction * total_steps)
        return max(1, wanted, math.ceil(self.validation_steps / MAXIMUM_VALIDATION_FRACTION))

    def work(self, total_steps: int) -> float:
        """Return the cost of a run in optimiser steps: steps, validations (one at the end), final work."""
        validations = math.ceil(total_steps / self.validation_interval(total_steps))
        return self.steps_cost(total_steps) + validations * self.validation_steps + self.final_steps(total_steps)

    def schedule(self, total_steps: int, measured_steps: int = 0) -> Schedule:
        """The schedule of a run of `total_steps` steps, the first `measured_steps` of which have been taken."""
        settings = self.recipe.optimizer
        return Schedule(
            peak_learning_rate=settings.learning_rate,
            warmup_steps=max(measured_steps, math.ceil(settings.warmup_fraction * total_steps)),
            total_steps=total_steps,
            final_fraction=settings.final_fraction,
            measured_steps=measured_steps,
            kind=settings.schedule,
            plateau_factor=settings.plateau_factor,
        )

    def schedule_for_time(self, measured_steps: int, seconds_per_step: float, seconds_left: float) -> Schedule:
        """The schedule with the most steps that fit into `seconds_left` after the first `measured_steps`."""
        # The steps that were timed may have had shorter windows than those to come.
        seconds_per_full_step = seconds_per_step * (max(1, measured_steps) / (self.steps_cost(measured_steps) or 1.0))
        return self.schedule(self.steps_within(measured_steps, seconds_left / seconds_per_full_step), measured_steps)

    def steps_within(self, steps_done: int, affordable: float, validations_done: int = 0) -> int:
        """The most steps of a whole run whose rest costs no more than `affordable`, in steps of the full length.

        At least one step follows the `steps_done`, even if it is not affordable.
        """
        done = self.steps_cost(steps_done) + validations_done * self.validation_steps
        most = max(steps_done + 1, math.ceil(self.steps_cost(steps_done) + affordable)) + self.longest_warmup
        candidates = range(steps_done + 1, most + 1)
        fitting = bisect.bisect_right(candidates, done + affordable, key=self.work)
        return candidates[max(0, fitting - 1)]
