"""Lightning modules of every training run: the data of steps, and the computation of a step."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from mambacore.devices import widened
from mambacore.errors import InputError
from mambacore.longsequence import backward_in_pieces
from mambapipelines.device import Placement
from mambapipelines.training.averaging import AveragedWeights
from mambapipelines.training.ranks import ONE_PROCESS, Ranks
from mambapipelines.training.recipe import TrainingRecipe
from mambapipelines.training.replicas import Replicas, Report
from mambapipelines.training.schedules import ValidationHistory, measuring_learning_rate
from mambapipelines.training.sharding import WholeStep, add_gradients, clip_gradients, copy_whole, shard
from mambapipelines.training.sizes import Sizes, first_sizes, fitted
from mambapipelines.training.state import RunState, optimizer_tensors, restore_optimizer
from mambapipelines.training.task import Batch, TrainingTask


class StepDataModule(pl.LightningDataModule):
    """One batch per optimiser step, from `first_step` on.

    A batch is a function of the seed and the step, so there is no sampler state to save. The batches never end; the
    recorder stops the trainer.
    """

    def __init__(self, steps: StepBatches) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches of the task."""
        return DataLoader(self.steps, batch_size=None, num_workers=0)


class StepBatches(IterableDataset[Batch]):
    """The endless batches of `StepDataModule`, in pinned memory if there is a device.

    Args:
        task: the task that makes the batches.
        first_step: step of the first batch.
        placement: their destination.
    """

    def __init__(self, task: TrainingTask, first_step: int, placement: Placement) -> None:
        self.task = task
        self._step = first_step
        self._placement = placement
        self._prepared: Batch | None = None

    def prepare_next(self) -> None:
        """Prepare the next batch while a device is busy; errors are reported when it is requested."""
        if self._prepared is None and not self._placement.is_cpu:
            with contextlib.suppress(Exception):
                self._prepared = self._make()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._prepared if self._prepared is not None else self._make()
            self._prepared = None
            self._step += 1
            yield batch

    def _make(self) -> Batch:
        try:
            batch = self.task.batch(self._step)
        except OSError as error:
            # Without the original traceback, which adds nothing to the message.
            raise InputError(
                f"the data of step {self._step + 1} cannot be read ({error}): the last good state is kept; put the "
                "file back as it was and add --resume."
            ) from error
        pinned = self._placement.device.type == "cuda"
        return tuple(tensor.pin_memory() if pinned else tensor for tensor in batch)


class TrainingModule(pl.LightningModule):
    """AdamW on a task: gradient accumulation, clipping, learning rate schedule and averaging of the weights.

    Args:
        task: the task, whose model already has the weights of `state` and is on the device.
        recipe: settings.
        placement: device and precision.
        batches: source of batches, which are prepared while the device is busy.
        state: state to continue from; by default the model starts at step 0.
        ranks: the processes of the run.
    """

    def __init__(
        self,
        task: TrainingTask,
        recipe: TrainingRecipe,
        placement: Placement,
        state: RunState | None = None,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # The task keeps its whole model for validation and for the end; a copy is sharded.
        self.model = copy.deepcopy(task.model) if ranks.sharded else task.model
        self.ranks = ranks
        self.placement = placement
        self.whole: WholeStep | None = None
        self.task = task
        self.recipe = recipe
        self.steps_done = state.step if state is not None else 0
        self.schedule = state.schedule if state is not None else None
        self.history = state.history if state is not None else ValidationHistory()
        self.loss_of_step = math.nan
        self.figures_of_step: dict[str, float] = {}
        self.batches = StepBatches(task, self.steps_done, placement)
        self._average_tensors = state.average if state is not None else None
        self.average: AveragedWeights | None = None
        if not ranks.sharded:
            self._start_average()
        self._restored_tensors = state.optimizer if state is not None else None
        self._adamw: torch.optim.AdamW | None = None
        self._replicas: Replicas | None = None
        self.sizes = first_sizes(placement, task.divisible)
        self._sizes_fit = self.sizes.positions is None
        if state is not None and state.positions is not None and not self._sizes_fit:
            # Those of the run so far, so that sums are in the same order.
            self.sizes, self._sizes_fit = Sizes(state.positions), True

    def fit_sizes(self, say: Callable[[str], None]) -> None:
        """Find out how much fits the device by a micro-batch of the full length, before anything is learned.

        Where parameters or sequences are divided among processes, all of them would have to run out of memory at once
        to try again, so nothing is tried there.

        Args:
            say: called with a sentence when something does not fit.

        Raises:
            InputError: nothing fits.
        """
        if self._sizes_fit:
            return
        self._sizes_fit = True
        if self.ranks.sharded or self.ranks.context_count > 1:
            return
        batch = self.ranks.rows(self.task.longest_batch())

        self.model.train()

        def attempt(sizes: Sizes) -> None:
            rows = sizes.rows(self.task.rows_per_micro_batch(batch[0].shape[1]), batch[0].shape[1])
            # Rows may be sorted by length, either way.
            parts = list(zip(*(tensor.split(rows) for tensor in batch), strict=True))
            largest = max((self.task.trimmed(part) for part in parts), key=lambda part: part[0].shape[1])
            self._backward(self.model, self.placement.put(largest), 1.0, sizes)

        found = fitted(self.sizes, attempt, self.model, self.placement, say)
        # The processes of a run have equal shares of the work.
        self.sizes = Sizes(-int(self.ranks.largest([-float(found.positions or 0)])[0]))

    def configure_model(self) -> None:
        """Shard the model over the processes, if configured."""
        if self.ranks.sharded and self.whole is None:
            self.whole = shard(self.model, self.placement.device)
            self._start_average()

    def _start_average(self) -> None:
        if self.recipe.optimizer.average_decay > 0:
            self.average = AveragedWeights(self.model, self.recipe.optimizer.average_decay, self._average_tensors)
        self._average_tensors = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the task's parameter groups, with the state of the run that is resumed."""
        settings = self.recipe.optimizer
        self._adamw = torch.optim.AdamW(
            self._own(self.task.parameter_groups(settings.weight_decay)),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            fused=True if self.placement.device.type == "cuda" else None,
        )
        if self._restored_tensors is not None:
            restore_optimizer(self._adamw, self.model, self._restored_tensors)
        return self._adamw

    def _own(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the task's groups with this module's parameters, which differ if they are sharded."""
        if self.model is self.task.model:
            return groups
        names = {id(parameter): name for name, parameter in self.task.model.named_parameters()}
        own = dict(self.model.named_parameters())
        return [group | {"params": [own[names[id(parameter)]] for parameter in group["params"]]} for group in groups]

    def on_train_end(self) -> None:
        """Stop the threads of the replicas."""
        if self._replicas is not None:
            self._replicas.close()
            self._replicas = None

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch unchanged: only the part of this process is moved later."""
        return batch

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Tensors of AdamW, by name."""
        return optimizer_tensors(self._adamw, self.model) if self._adamw is not None else {}

    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        if self.schedule is None:
            return measuring_learning_rate(self.recipe.optimizer.learning_rate, self.steps_done)
        return self.schedule.learning_rate(self.steps_done, self.history.reductions)

    def validate(self) -> dict[str, float]:
        """Return validation metrics, with averaged weights if any; those of the first process in all processes."""
        self.task.steps_done = self.steps_done
        with contextlib.ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.in_place())
            if self.ranks.sharded:
                copy_whole(self.model, self.task.model)
            figures = self.task.validate() if self.ranks.is_first else {}
        names = list(self.task.validation_figures)
        return dict(zip(names, self.ranks.of_first([figures.get(name, math.nan) for name in names]), strict=True))

    def finish(self) -> None:
        """Give the task's model its final weights, averaged if configured."""
        if self.average is not None:
            self.average.keep()
        if self.ranks.sharded:
            copy_whole(self.model, self.task.model)

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """One update from all rows of the step, accumulated over micro-batches.

        Raises:
            InputError: if loss or gradient are not finite; no update is made then.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate()
        length = batch[0].shape[1]
        rows = self.sizes.rows(self.task.rows_per_micro_batch(length), length)
        batch = self.ranks.stretch(self.ranks.rows(batch))
        # Weights are computed before the tensors are moved, to avoid waiting for the device.
        whole_micro_batches = zip(*(tensor.split(rows) for tensor in batch), strict=True)
        cut: list[Batch] = [self.task.trimmed(micro_batch) for micro_batch in whole_micro_batches]
        weights = [self.task.weight(micro_batch) for micro_batch in cut]
        total_weight = self.ranks.sums([math.fsum(weights)])[0] or 1.0
        weighted = zip(weights, cut, strict=True)
        micro_batches = [(torch.tensor(weight, dtype=torch.float64), *micro_batch) for weight, micro_batch in weighted]
        # Threads are for CPUs. Lengths may change during a run, and the number of micro-batches with them.
        alone = self.ranks.count > 1 or not self.placement.is_cpu
        count = 1 if alone else min(torch.get_num_threads(), len(micro_batches))
        if self._replicas is not None and len(self._replicas.models) != count:
            self.on_train_end()
        if self._replicas is None:
            self._replicas = Replicas(self.model, count, torch.get_num_threads())

        def backward(replica: nn.Module, weight: torch.Tensor, *micro_batch: torch.Tensor) -> Report:
            return self._backward(replica, self.placement.put(micro_batch), float(weight) / total_weight, self.sizes)

        around = contextlib.nullcontext if self.ranks.sharded else self.placement.casts_kept
        reports = self._replicas.accumulate(micro_batches, backward, around)
        if self.ranks.count > 1:
            add_gradients(self.model, self.ranks)
        gradient_norm = clip_gradients(self.model, self.recipe.optimizer.gradient_clip, self.ranks)
        self.batches.prepare_next()
        sums = self._sums(reports)
        if not math.isfinite(sums["loss"]) or not math.isfinite(float(gradient_norm)):
            raise InputError(
                f"the loss or its gradient stopped being a finite number at step {self.steps_done + 1}: "
                "the last good state is kept; lower optimizer.learning_rate in the recipe and choose another --output."
            )
        optimizer.step()
        self.steps_done += 1
        if self.average is not None:
            self.average.update(self.steps_done)
        self.loss_of_step = sums.pop("loss")
        self.figures_of_step = sums

    def _sums(self, reports: list[Report]) -> dict[str, float]:
        """Return the metrics of a step from its micro-batches; this is the only synchronisation with the device."""
        names = list(reports[0])
        shares = torch.stack([torch.stack([report[name] for name in names]) for report in reports]).tolist()
        sums = [math.fsum(share[number] for share in shares) for number in range(len(names))]
        return dict(zip(names, self.ranks.sums(sums), strict=True))

    def _backward(self, replica: nn.Module, micro_batch: Batch, share: float, sizes: Sizes) -> Report:
        """Add the gradients of a micro-batch that counts `share` to the replica's; its part of the step's figures."""
        names = ("loss", *self.task.training_figures)
        low_precision = self.placement.autocast()
        # Parameters that are divided come together for one whole forward pass, and a stretch is read at once.
        pieces = self.task.pieces(micro_batch) if not self.ranks.sharded and self.ranks.context_count == 1 else None
        if pieces is not None:
            pieces = sizes.pieces(pieces)
            with low_precision:
                result = backward_in_pieces(
                    replica,
                    pieces.sequence,
                    pieces.loss,
                    piece_length=pieces.piece_length,
                    state=pieces.state,
                    scale=share,
                )
            return {"loss": widened(torch.as_tensor(result.loss).detach()) * share}
        # Around the forward pass only: backward takes the precision of each forward step by itself.
        with self.ranks.sharing_sequences():
            with low_precision:
                if self.whole is not None:
                    report = self.whole(lambda: self.task.loss(replica, micro_batch))
                else:
                    report = self.task.loss(replica, micro_batch)
            (report["loss"] * share).backward()
        return {name: widened(report[name].detach()) * share for name in names}
