"""How a run divides its time between steps, validation and what follows, from the measured time of a step.

All work is counted in optimiser steps, so everything but the total number of steps is a pure function of it and a
resumed run does the same.
"""

from __future__ import annotations

import bisect
import math

from mambapipelines.training.recipe import TrainingRecipe
from mambapipelines.training.schedules import Schedule

# Forward and backward cost about three forward passes.
FORWARD_PASSES_PER_STEP = 3
# Held-out windows go through the model on both strands.
STRANDS = 2
MAXIMUM_VALIDATION_FRACTION = 0.05


class RunPlan:
    """The work of a run: its steps, its validations, and what a task does in the end.

    Attributes:
        recipe: what is wanted.
    """

    recipe: TrainingRecipe

    @property
    def validation_steps(self) -> float:
        """What one validation costs, in optimiser steps."""
        raise TypeError(f"{type(self).__name__} does not say what a validation costs")

    def final_steps(self, total_steps: int) -> float:
        """What a task does after the last of the steps, in optimiser steps."""
        return 0.0

    def step_positions(self, step: int) -> float:
        """Positions that step `step` (0-based) reads, in any unit; a task with a length warm-up says how many."""
        return 1.0

    @property
    def longest_warmup(self) -> int:
        """Steps after which windows have their full length: it doubles from stage to stage and is below 2^63."""
        return 63 * self.recipe.length.warmup_steps_per_stage

    def step_cost(self, step: int) -> float:
        """What step `step` (0-based) costs beside one of the full length: less where short windows come first."""
        return self.step_positions(step) / self.step_positions(self.longest_warmup)

    def steps_cost(self, steps: int) -> float:
        """What the first `steps` steps cost, in steps of the full length."""
        warming = min(steps, self.longest_warmup)
        return sum(map(self.step_cost, range(warming))) + steps - warming

    def validation_interval(self, total_steps: int) -> int:
        """Steps between validations: as the recipe says, and never more than 5 % of the work."""
        wanted = math.ceil(self.recipe.validation.every_fraction * total_steps)
        return max(1, wanted, math.ceil(self.validation_steps / MAXIMUM_VALIDATION_FRACTION))

    def work(self, total_steps: int) -> float:
        """What a whole run costs, in optimiser steps: steps, validations (one is the last thing), what follows."""
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
