"""The common part of all training commands, before and after their own work.

A driver reads its data, builds its model and measures it; the session does the rest, in this order:

    with TrainingSession(options, recipe, SpeciesTask) as session:    # options checked, output folder checked
        data = ...
        if session.resume({"--length": ..., "sequences": ...}):       # the recorded state, if it is of the same run
            return ...                                                # finished: nothing left to do
        outcome = session.train(task, plan)                           # all remaining steps
        session.publish(save, {...})                                  # writes the model folder atomically
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn

from mambacore.errors import InputError
from mambacore.files import remove_leftovers
from mambacore.model_folder import CONFIG_NAME
from mambapipelines.console import format_duration, use_threads
from mambapipelines.device import choose, deterministic_algorithms
from mambapipelines.processes import signals_raise
from mambapipelines.training.fingerprint import changed_contents, refuse_other_run, write_contents
from mambapipelines.training.lock import RunLock
from mambapipelines.training.options import RunOptions, check_options, check_output, planned_minutes
from mambapipelines.training.plan import RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.provenance import provenance
from mambapipelines.training.ranks import cluster_environment
from mambapipelines.training.recipe import TrainingRecipe
from mambapipelines.training.run import TrainingOutcome, TrainingRun, placed, published_model, run_folder
from mambapipelines.training.state import RunState
from mambapipelines.training.task import TrainingTask


class SessionOptions(RunOptions, Protocol):
    """The options of a command that takes a recipe by name."""

    @property
    def recipe(self) -> str | None: ...


class TrainingSession:
    """One call of a training command; a context manager.

    Attributes:
        placement: device and precision.
        recipe: the settings, with the precision that was chosen.
        folder: the folder of the run's state.
        progress: progress display on standard error.
        state: the state that the run continues from, after `resume`; `None` for a new run.

    Args:
        options: options of the command.
        recipe: settings, as loaded.
        task: class of the task.

    Raises:
        InputError: options that make no sense; on entering, an output folder that another process is working in, or
            that has something else in it.
    """

    def __init__(self, options: SessionOptions, recipe: TrainingRecipe, task: type[TrainingTask]) -> None:
        self.start_seconds = time.monotonic()
        check_options(options, task.unit)
        self.options = options
        self.placement = choose(options.device, options.precision or recipe.precision)
        self.recipe = replace(recipe, precision=self.placement.precision)
        self.folder = run_folder(options, task, recipe)
        self.progress = TrainingProgress(unit=task.unit)
        self.state: RunState | None = None
        self._fingerprint: dict[str, Any] = {}
        self._steps = 0
        self._extended_to: int | None = None
        self._contents: Mapping[str, str] = {}
        self._opened = ExitStack()
        self._model: nn.Module | None = None

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            opened.callback(torch.set_num_threads, torch.get_num_threads())
            use_threads(self.options.threads)
            opened.enter_context(deterministic_algorithms(getattr(self.options, "deterministic", False)))
            opened.enter_context(signals_raise())
            self._take_folder(opened)
            opened.enter_context(self.progress)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def _take_folder(self, opened: ExitStack) -> None:
        """Lock the output folder for this run; the first process does it for all."""
        lock = RunLock(self.folder.path)
        if not self._is_first_process():
            check_output(self.options, self.folder)
            return
        lock.refuse_if_held()
        check_output(self.options, self.folder)
        try:
            lock.acquire()
        except OSError as error:
            raise InputError(
                f"the output folder {self.options.output} cannot be made ({error.strerror}): choose another --output."
            ) from error
        opened.callback(lock.release)
        # Check again: a concurrent run may have ended in between.
        check_output(self.options, self.folder)
        remove_leftovers(self.folder.path)
        remove_leftovers(self.options.output)

    @staticmethod
    def _is_first_process() -> bool:
        environment = cluster_environment()
        return environment is None or environment.global_rank() == 0

    def _write_contents(self) -> None:
        try:
            write_contents(self.folder.path, self._contents)
        except OSError as error:
            raise InputError(
                f"{self.folder.path} cannot be written ({error.strerror or error}): choose another --output."
            ) from error

    @property
    def seconds(self) -> float:
        """Wall time since the command began."""
        return time.monotonic() - self.start_seconds

    def resume(self, depends_on: Mapping[str, Any], contents: Mapping[str, str] | None = None) -> bool:
        """Read the recorded state, if any, and return whether the run is already finished.

        Args:
            depends_on: what the numbers of the run depend on beside seed, length of the run and recipe; JSON-able, by
                the names that the user knows.
            contents: files of the data by name, each with a checksum, so that a refusal can name those that changed.

        Raises:
            InputError: if the state is damaged, or belongs to a different run.
        """
        options = self.options
        content = {
            **depends_on,
            "--seed": options.seed,
            "--steps": options.steps,
            "--minutes": planned_minutes(options, self.recipe),
            "recipe": _without_precision(self.recipe.fingerprint()),
        }
        self._fingerprint = json.loads(json.dumps(content))
        self.state = self.folder.load() if self.folder.holds_a_run() else None
        contents = contents or {}
        if self.state is None:
            self._contents = contents
            return False
        recorded, step = dict(self.state.fingerprint), self.state.step
        # States of earlier versions have the precision in the recipe; another one is worth a warning, not a refusal.
        recorded["recipe"] = _without_precision(recorded.get("recipe") or {})
        taken_all = step >= self.state.schedule.total_steps
        if taken_all and options.steps is not None and options.steps > step:
            self._extended_to = options.steps
            recorded = recorded | {name: self._fingerprint[name] for name in ("--steps", "--minutes")}
        refuse_other_run(
            recorded, self._fingerprint, options.output, lambda: changed_contents(self.folder.path, contents)
        )
        finished = taken_all and self._extended_to is None and _published_steps(options.output) == step
        if finished:
            self.progress.note(
                f"the run in {options.output} is finished: {step} steps, nothing left to do; "
                f"give --steps above {step} to extend it"
            )
        return finished

    def train(self, task: TrainingTask, plan: RunPlan) -> TrainingOutcome:
        """Take all remaining steps; see `TrainingRun.train`."""
        if self.state is not None and self._extended_to is not None:
            self.state = replace(self.state, schedule=plan.schedule(self._extended_to))
            self.progress.note(f"extending the run of {self.state.step} steps to {self._extended_to}")
        self._introduce_state()
        if self._contents and self._is_first_process():
            self._write_contents()
        run = TrainingRun(
            options=self.options,
            recipe=self.recipe,
            folder=self.folder,
            task=task,
            plan=plan,
            fingerprint=self._fingerprint,
            progress=self.progress,
            start_seconds=self.start_seconds,
            placement=self.placement,
        )
        self._model = task.model
        outcome = run.train(self.state)
        self._steps = outcome.steps
        return outcome

    def publish(
        self, save: Callable[[Path, dict[str, Any]], object], details: Mapping[str, Any], remark: str = ""
    ) -> None:
        """Write the model folder with `save(folder, details)`, and report it.

        Args:
            save: function that writes the files of the model.
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

    def _placed(self) -> dict[str, str]:
        """Return the device and processes, as recorded in a state."""
        return placed(self.placement)

    def _introduce_state(self) -> None:
        """Report the step of a resumed run, and the device."""
        state, now = self.state, torch.get_num_threads()
        self.progress.note(self.placement.sentence())
        if state is not None:
            self.progress.note(f"resuming after step {state.step} of {state.schedule.total_steps}")
            if state.threads != now:
                self.progress.note(
                    f"the run used {state.threads} threads and now uses {now}: "
                    "the last digits may differ from an uninterrupted run"
                )
            changed = [
                f"{key} was {before} and is now {self._placed()[key]}"
                for key, before in state.placed.items()
                if before != self._placed()[key]
            ]
            if changed:
                self.progress.note(f"{'; '.join(changed)}: the numbers may differ from an uninterrupted run")
        elif self.options.resume:
            self.progress.note(f"{self.options.output} holds no training run to resume: starting one")


def _without_precision(recipe: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "precision"}


def _published_steps(output: Path) -> int | None:
    """Return the optimiser steps of the model in the output folder; `None` if there is none."""
    try:
        return int(json.loads((output / CONFIG_NAME).read_text(encoding="utf-8"))["details"]["steps"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{output / CONFIG_NAME} is damaged ({error}): choose another --output.") from error


def parameter_count(model: nn.Module) -> int:
    """Return the number of trainable parameters, counting tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
