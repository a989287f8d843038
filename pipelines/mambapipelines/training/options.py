"""Options of every training command, and their validation before any file is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

from mambacore.errors import InputError
from mambacore.model_folder import CONFIG_NAME
from mambapipelines import LARGEST_SEED
from mambapipelines.files import STANDARD_OUTPUT
from mambapipelines.training.ranks import check_strategy
from mambapipelines.training.recipe import TrainingRecipe
from mambapipelines.training.state import RunFolder

RUN_FOLDER_NAME = "training"


class RunOptions(Protocol):
    """Options of every training command, which the frozen dataclass of a command has among others.

    Attributes:
        length: positions of a training example (bases or samples).
        output: the folder that becomes the model folder; its subfolder `training` holds the state of the run.
        minutes: wall time of the whole run in minutes; by default the recipe's, unless `steps` is given.
        steps: number of optimiser steps instead of a wall time.
        seed: all randomness is a function of this seed and an index.
        resume: continue the run recorded in `output`, or start one if there is none.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        device, precision: see `mambapipelines.device.choose`; by default, the precision is the recipe's.

    Three attributes are optional: `strategy`, the distribution over processes (one of
    `mambapipelines.training.ranks.STRATEGIES`; by default one process), `context_ranks`, the number of processes per
    sequence, and `deterministic`, whether to use deterministic operators on a GPU.
    """

    @property
    def length(self) -> int: ...
    @property
    def output(self) -> Path: ...
    @property
    def minutes(self) -> float | None: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def resume(self) -> bool: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str | None: ...


def check_options(options: RunOptions, unit: str = "bases") -> None:
    """Check the values of options; `unit` is the unit of lengths.

    Raises:
        InputError: if one is invalid; the message names the option.
    """
    if options.length < 1:
        raise InputError(f"--length is {options.length} {unit}: use 1 or more.")
    if options.minutes is not None and options.steps is not None:
        raise InputError("--minutes and --steps are both given: give only one of them.")
    if options.minutes is not None and not (options.minutes > 0 and math.isfinite(options.minutes)):
        raise InputError(f"--minutes is {options.minutes}: use a number greater than 0.")
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps is {options.steps}: use a number of 1 or more.")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads is {options.threads}: use a number of 1 or more.")
    if not 0 <= options.seed <= LARGEST_SEED:
        raise InputError(f"--seed is {options.seed}: use an integer from 0 to {LARGEST_SEED}.")
    check_strategy(*strategy_of(options))


def strategy_of(options: RunOptions) -> tuple[str, int]:
    """Return the strategy and the number of processes per sequence; by default a single process."""
    return getattr(options, "strategy", "single"), getattr(options, "context_ranks", 1)


def check_output(options: RunOptions, run: RunFolder) -> None:
    """Check that an output folder is empty or has the run to resume.

    Raises:
        InputError: if it has other contents, which the message describes.
    """
    output = options.output
    if str(output) == STANDARD_OUTPUT:
        raise InputError("--output - is not the name of a folder: a run is written to a folder.")
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file: give a folder as --output.")
    if run.holds_a_run():
        if not options.resume:
            raise InputError(f"{output} holds a training run already: add --resume or choose another --output.")
        return
    if (output / CONFIG_NAME).exists():
        raise InputError(f"{output} holds a model and no training run to resume: choose another --output.")
    # A run that was stopped before its first state leaves the folder `training` and nothing to resume.
    if output.is_dir() and any(entry.name != RUN_FOLDER_NAME for entry in output.iterdir()):
        raise InputError(f"the output folder {output} is not empty: choose another --output.")


def planned_minutes(options: RunOptions, recipe: TrainingRecipe) -> float | None:
    """Return the planned wall time of a run; `None` if its number of steps is given."""
    if options.steps is not None:
        return None
    return options.minutes if options.minutes is not None else recipe.minutes
