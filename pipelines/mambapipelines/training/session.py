"""What every training command does before and after its own work.

A driver reads its data, builds its model and measures it; the session does the rest, in this order:

    with TrainingSession(options, recipe, SpeciesTask) as session:    # options checked, output folder checked
        data = ...
        if session.resume({"--length": ..., "sequences": ...}):       # the recorded state, if it is of the same run
            return ...                                                # finished: nothing left to do
        outcome = session.train(task, plan)                           # all steps that are left
        session.publish(save, {...})                                  # the model folder appears when whole
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn

from mambacore.model_folder import CONFIG_NAME
from mambapipelines.console import format_duration, use_threads
from mambapipelines.training.fingerprint import refuse_other_run
from mambapipelines.training.options import RunOptions, check_options, planned_minutes
from mambapipelines.training.plan import RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.provenance import provenance
from mambapipelines.training.recipe import TrainingRecipe
from mambapipelines.training.run import TrainingOutcome, TrainingRun, published_model, run_folder
from mambapipelines.training.state import RunState
from mambapipelines.training.task import TrainingTask


class SessionOptions(RunOptions, Protocol):
    """The options of a command that takes a recipe by name."""

    @property
    def recipe(self) -> str | None: ...


class TrainingSession:
    """One call of a training command; a context manager.

    Attributes:
        folder: the folder of the run's state.
        progress: what the user sees on standard error.
        state: the state that the run continues from, after `resume`; `None` for a new run.

    Args:
        options: what the command was asked.
        recipe: settings, as loaded.
        task: the class of task that is trained.

    Raises:
        InputError: options that make no sense, or an output folder with something else in it.
    """

    def __init__(self, options: SessionOptions, recipe: TrainingRecipe, task: type[TrainingTask]) -> None:
        self.start_seconds = time.monotonic()
        check_options(options, task.unit)
        self.options = options
        self.recipe = recipe
        self.folder = run_folder(options, task, recipe)
        self.progress = TrainingProgress(unit=task.unit)
        self.state: RunState | None = None
        self._fingerprint: dict[str, Any] = {}
        self._steps = 0
        self._threads_before = torch.get_num_threads()

    def __enter__(self) -> Self:
        self._threads_before = torch.get_num_threads()
        use_threads(self.options.threads)
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, traceback)
        torch.set_num_threads(self._threads_before)

    @property
    def seconds(self) -> float:
        """Wall time since the command began."""
        return time.monotonic() - self.start_seconds

    def resume(self, depends_on: Mapping[str, Any]) -> bool:
        """Read the recorded state, if there is one; whether the run is finished and nothing is left to do.

        Args:
            depends_on: what the numbers of the run depend on beside seed, length of the run and recipe; JSON-able, by
                the names that the user knows.

        Raises:
            InputError: the state is damaged, or of a run that depends on something else.
        """
        options = self.options
        content = {
            **depends_on,
            "--seed": options.seed,
            "--steps": options.steps,
            "--minutes": planned_minutes(options, self.recipe),
            "recipe": self.recipe.fingerprint(),
        }
        self._fingerprint = json.loads(json.dumps(content))
        self.state = self.folder.load() if self.folder.holds_a_run() else None
        if self.state is None:
            return False
        refuse_other_run(self.state.fingerprint, self._fingerprint, options.output)
        finished = self.state.step >= self.state.schedule.total_steps and (options.output / CONFIG_NAME).is_file()
        if finished:
            self.progress.note(f"the run in {options.output} is finished: {self.state.step} steps, nothing left to do")
        return finished

    def train(self, task: TrainingTask, plan: RunPlan) -> TrainingOutcome:
        """Take all steps that are left; see `TrainingRun.train`."""
        self._introduce_state()
        run = TrainingRun(
            options=self.options,
            recipe=self.recipe,
            folder=self.folder,
            task=task,
            plan=plan,
            fingerprint=self._fingerprint,
            progress=self.progress,
            start_seconds=self.start_seconds,
        )
        outcome = run.train(self.state)
        self._steps = outcome.steps
        return outcome

    def publish(
        self, save: Callable[[Path, dict[str, Any]], object], details: Mapping[str, Any], remark: str = ""
    ) -> None:
        """Write the model folder with `save(folder, details)`, and say so.

        Args:
            save: writes the files of the model.
            details: of the run, for the configuration; those of every run are added.
            remark: what the last line says beside the place and the time.
        """
        common = {
            "recipe": self.recipe.to_dict(),
            "recipe_name": self.options.recipe,
            "provenance": provenance(),
            "seed": self.options.seed,
            "steps": self._steps,
        }
        with published_model(self.options.output, self.folder) as temporary:
            save(temporary, common | dict(details))
        self.progress.note(f"wrote {self.options.output} after {format_duration(self.seconds)}{remark}")

    def _introduce_state(self) -> None:
        """Say where a resumed run stands."""
        state, now = self.state, torch.get_num_threads()
        if state is not None:
            self.progress.note(f"resuming after step {state.step} of {state.schedule.total_steps}")
            if state.threads != now:
                self.progress.note(
                    f"the run used {state.threads} threads and now uses {now}: "
                    "the last digits may differ from an uninterrupted run"
                )
        elif self.options.resume:
            self.progress.note(f"{self.options.output} holds no training run to resume: starting one")


def parameter_count(model: nn.Module) -> int:
    """Numbers that are trained; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
