"""The Lightning side of species training: what a step computes, where its windows come from, and its record keeping."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from genomamba.models import SpeciesClassifier
from genomamba.windows import WindowSampler
from mambacore.errors import InputError
from mambapipelines.progress import TrainingProgress
from mambapipelines.recipes import Recipe
from mambapipelines.replicas import Replicas, Report
from mambapipelines.run_state import (
    MetricsLog,
    RunFolder,
    RunState,
    Schedule,
    measuring_learning_rate,
    optimizer_tensors,
    restore_optimizer,
)

SECONDS_BETWEEN_SAVES = 30.0
# The first steps are slower (threads start, caches fill), so they are not timed.
UNTIMED_STEPS = 2
TIMED_STEPS = 10
# Measuring never takes more than this part of the run, which matters when one step takes minutes.
MEASURING_FRACTION = 0.05

Batch = tuple[torch.Tensor, torch.Tensor]


class WindowDataModule(pl.LightningDataModule):
    """One batch per optimiser step: step `s` takes the windows `s * batch_size` to `(s + 1) * batch_size - 1`.

    A window is a function of the seed and its index, so there is no sampler state to save: a resumed run starts at
    `first_step`. The batches never end; the recorder stops the trainer.
    """

    def __init__(self, sampler: WindowSampler, windows_per_step: int, first_step: int) -> None:
        super().__init__()
        self.steps = StepWindows(sampler, windows_per_step, first_step)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of (windows, length) uint8 token ids and (windows,) int64 labels."""
        return DataLoader(self.steps, batch_size=None, num_workers=0)


class StepWindows(IterableDataset[Batch]):
    """The endless batches of `WindowDataModule`."""

    def __init__(self, sampler: WindowSampler, windows_per_step: int, first_step: int) -> None:
        self.sampler = sampler
        self.windows_per_step = windows_per_step
        self.first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        step = self.first_step
        while True:
            tokens, labels = self.sampler.sample_batch(step * self.windows_per_step, self.windows_per_step)
            yield torch.from_numpy(tokens), torch.from_numpy(labels).long()
            step += 1


class SpeciesTrainingModule(pl.LightningModule):
    """The classifier, AdamW, gradient accumulation and the learning rate of each step.

    Args:
        model: the classifier to train, in place.
        recipe: optimiser settings.
        windows_per_micro_batch: windows that go through the model at once.
        state: state to go on from; absent, the model is taken as it is at step 0.
    """

    def __init__(
        self, model: SpeciesClassifier, recipe: Recipe, windows_per_micro_batch: int, state: RunState | None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.recipe = recipe
        self.windows_per_micro_batch = windows_per_micro_batch
        self.steps_done = state.step if state is not None else 0
        self.schedule = state.schedule if state is not None else None
        self.loss_of_step = math.nan
        self.accuracy_of_step = math.nan
        self._restored_tensors = state.optimizer if state is not None else None
        self._adamw: torch.optim.AdamW | None = None
        self._replicas: Replicas | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the model's parameter groups, with the state of the run that is resumed."""
        settings = self.recipe.optimizer
        self._adamw = torch.optim.AdamW(
            self.model.parameter_groups(settings.weight_decay),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
        )
        if self._restored_tensors is not None:
            restore_optimizer(self._adamw, self.model, self._restored_tensors)
        return self._adamw

    def on_train_end(self) -> None:
        """End the threads of the replicas."""
        if self._replicas is not None:
            self._replicas.close()
            self._replicas = None

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Tensors of AdamW, by name."""
        return optimizer_tensors(self._adamw, self.model) if self._adamw is not None else {}

    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        if self.schedule is None:
            return measuring_learning_rate(self.recipe.optimizer.learning_rate, self.steps_done)
        return self.schedule.learning_rate(self.steps_done)

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """One update from all windows of the step, accumulated over micro-batches.

        Raises:
            InputError: loss or gradient are not finite; no update is made then.
        """
        tokens, labels = batch
        optimizer = self.optimizers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate()
        micro_batches = list(
            zip(tokens.split(self.windows_per_micro_batch), labels.split(self.windows_per_micro_batch), strict=True)
        )
        if self._replicas is None:
            threads = torch.get_num_threads()
            self._replicas = Replicas(self.model, min(threads, len(micro_batches)), threads)

        def backward(replica: nn.Module, chosen_tokens: torch.Tensor, chosen_labels: torch.Tensor) -> Report:
            share = len(chosen_labels) / len(labels)
            # Around the forward pass only: backward takes the precision of each forward step by itself.
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                report = replica.loss(chosen_tokens, chosen_labels)  # type: ignore[operator]
            (report["loss"] * share).backward()
            return {name: float(report[name].detach()) * share for name in ("loss", "accuracy")}

        reports = self._replicas.accumulate(micro_batches, backward)
        loss = math.fsum(report["loss"] for report in reports)
        accuracy = math.fsum(report["accuracy"] for report in reports)
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.gradient_clip)
        if not math.isfinite(loss) or not math.isfinite(float(gradient_norm)):
            raise InputError(
                f"the loss or its gradient stopped being a finite number at step {self.steps_done + 1}: "
                "the last good state is kept; lower optimizer.learning_rate in the recipe and choose another --output."
            )
        optimizer.step()
        self.steps_done += 1
        self.loss_of_step, self.accuracy_of_step = loss, accuracy


class TrainingRecorder(pl.Callback):
    """After every step: decide the length of the run, validate, log, save, and stop when it is time.

    Args:
        folder: where states and metrics go.
        metrics: log of this run, already cut back to the first step.
        progress: what the user sees.
        fingerprint: what the run depends on, stored with every state.
        plan_schedule: called once, with the number of steps done and the mean seconds of a step, when enough steps have
            been timed; gives the schedule. Not called when the module already has one.
        validation_interval: steps between validations, of the total number of steps.
        validate: held-out accuracy; absent without hold-outs.
        planned_seconds: length of the whole run, of which only a small part may be spent on timing steps.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        metrics: MetricsLog,
        progress: TrainingProgress,
        fingerprint: dict[str, Any],
        plan_schedule: Callable[[int, float], Schedule],
        validation_interval: Callable[[int], int],
        validate: Callable[[], float] | None,
        planned_seconds: float,
    ) -> None:
        self.folder = folder
        self.metrics = metrics
        self.progress = progress
        self.fingerprint = fingerprint
        self.plan_schedule = plan_schedule
        self.validation_interval = validation_interval
        self.validate = validate
        self.planned_seconds = planned_seconds
        self.held_out_accuracy: float | None = None
        self.stop_signal: int | None = None
        self.finished = False
        self._saved_step: int | None = None
        self._saved_seconds = 0.0
        self._start_seconds = time.monotonic()
        self._step_end_seconds = self._start_seconds
        self._step_durations: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks and take the signals over from Lightning, whose own handling exits without saving."""
        module = _species_module(pl_module)
        total_steps = module.schedule.total_steps if module.schedule is not None else None
        self.progress.start(module.steps_done, total_steps)
        self._step_end_seconds = self._saved_seconds = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Everything that happens between two steps."""
        module = _species_module(pl_module)
        tokens: torch.Tensor = batch[0]
        seconds = time.monotonic() - self._step_end_seconds
        self._step_durations.append(seconds)
        learning_rate = module.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        if module.schedule is None and self._measured_enough():
            timed = self._step_durations[UNTIMED_STEPS:]
            module.schedule = self.plan_schedule(module.steps_done, sum(timed) / len(timed))
            self.progress.set_total(module.schedule.total_steps)
        step, schedule = module.steps_done, module.schedule
        self.finished = schedule is not None and step >= schedule.total_steps
        row: dict[str, object] = {
            "step": step,
            "loss": f"{module.loss_of_step:.6f}",
            "accuracy": f"{module.accuracy_of_step:.4f}",
            "learning_rate": f"{learning_rate:.6g}",
            "bases_per_second": f"{tokens.numel() / seconds:.0f}",
            "seconds": f"{seconds:.3f}",
        }
        due = schedule is not None and (self.finished or step % self.validation_interval(schedule.total_steps) == 0)
        if due and self.validate is not None:
            self.held_out_accuracy = self.validate()
            self.progress.held_out(self.held_out_accuracy)
            row["held_out_accuracy"] = f"{self.held_out_accuracy:.4f}"
        self.metrics.append(row)
        self.progress.step(step, module.loss_of_step, tokens.numel() / seconds)
        stopping = self.finished or self.stop_signal is not None
        if stopping or self._saved_step is None or time.monotonic() - self._saved_seconds >= SECONDS_BETWEEN_SAVES:
            self.save(module)
        if stopping:
            trainer.should_stop = True
        self._step_end_seconds = time.monotonic()

    def save(self, module: SpeciesTrainingModule) -> None:
        """Write the state of the run; nothing before the length of the run is known.

        Raises:
            InputError: the disk is full or the folder is not writable; the state before this one is kept.
        """
        if module.schedule is None:
            return
        state = RunState(
            step=module.steps_done,
            schedule=module.schedule,
            fingerprint=self.fingerprint,
            threads=torch.get_num_threads(),
            weights={name: tensor.detach().clone() for name, tensor in module.model.state_dict().items()},
            optimizer=module.optimizer_state(),
        )
        try:
            self.folder.save(state)
        except OSError as error:
            raise InputError(
                f"the state of the run cannot be written to {self.folder.path} ({error.strerror or error}): "
                "make room and add --resume."
            ) from error
        self._saved_step, self._saved_seconds = module.steps_done, time.monotonic()

    def _measured_enough(self) -> bool:
        timed = len(self._step_durations) - UNTIMED_STEPS
        late = time.monotonic() - self._start_seconds > MEASURING_FRACTION * self.planned_seconds
        return timed >= TIMED_STEPS or (timed >= 1 and late)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal is not None:
            raise SystemExit(128 + number)
        self.stop_signal = number
        self.progress.note("stopping after this step; once more to stop at once, back at the last saved state")


def _species_module(module: pl.LightningModule) -> SpeciesTrainingModule:
    assert isinstance(module, SpeciesTrainingModule)
    return module


@contextmanager
def signal_handlers_restored() -> Iterator[None]:
    """Put the handlers of SIGINT and SIGTERM back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
