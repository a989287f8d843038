"""The interface between a task and the training loop: model, batches, loss and validation."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from mambacore.layers import parameters_without_decay
from mambacore.longsequence.losses import Loss
from mambapipelines.training.schedules import LengthWarmup

Batch = tuple[Tensor, ...]


class Pieces(NamedTuple):
    """A micro-batch that is processed by a causal model piece by piece (`mambacore.longsequence`)."""

    sequence: Tensor
    loss: Loss
    piece_length: int
    state: Any = None  # state of the model before the sequence


class TrainingTask:
    """Base class of tasks; subclasses define everything that has no default here.

    Attributes:
        model: the model, trained in place.
        training_figures: means returned by `loss` in addition to the loss, with their formats in the metrics.
        validation_figures: metrics returned by `validate`, with their formats; empty without validation data.
        deciding_figure: the validation metric that selects the best state and detects a plateau.
        higher_is_better: whether higher values of the deciding metric are better.
        unit: name of a position of a batch, for the speed.
        divisible: whether a batch may go through the model in parts that add up to the same gradient.
        lengths: a task whose windows grow has their lengths by step (`LengthWarmup`) under this name.
        splits_over_context: whether the tensors of a batch are all (rows, length, ...), `loss` is a mean over positions
            that `weight` counts, and the model reads stretches (`mambacore.parallel`): then `--context-ranks` works.
        steps_done: optimiser steps taken when `validate` is called.
    """

    model: nn.Module
    training_figures: ClassVar[dict[str, str]] = {}
    validation_figures: ClassVar[dict[str, str]] = {}
    deciding_figure: ClassVar[str]
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "positions"
    divisible: ClassVar[bool] = True
    splits_over_context: ClassVar[bool] = False
    steps_done: int = 0

    def batch(self, step: int) -> Batch:
        """Tensors with one row per example, the first of them (rows, length, ...): all that step `step` learns from.

        It is a function of the task's seed and the step alone, so that a resumed run is identical.
        """
        raise TypeError(f"{type(self).__name__} gives no batches")

    def longest_batch(self) -> Batch:
        """A batch as long as any of the run, which has to fit the memory of a device."""
        lengths: LengthWarmup | None = getattr(self, "lengths", None)
        return self.batch(0 if lengths is None else lengths.longest_step)

    def loss(self, replica: nn.Module, micro_batch: Batch) -> dict[str, Tensor]:
        """Return means over the micro-batch: `loss` with its graph, and the training metrics.

        `replica` is the model or a copy of it with the same weights.
        """
        raise TypeError(f"{type(self).__name__} has no loss")

    def rows_per_micro_batch(self, length: int) -> int:
        """Rows of `length` positions per micro-batch."""
        raise TypeError(f"{type(self).__name__} does not define the rows per micro-batch")

    def trimmed(self, micro_batch: Batch) -> Batch:
        """Remove padding shared by all rows of the micro-batch, which is still on the CPU."""
        return micro_batch

    def weight(self, micro_batch: Batch) -> float:
        """Return the weight of the micro-batch in the mean over the batch; by default its number of rows.

        A batch with a total weight of 0 has a loss of 0 and no gradient.
        """
        return len(micro_batch[0])

    def pieces(self, micro_batch: Batch) -> Pieces | None:
        """Return how a long micro-batch is processed in pieces; `None` for all at once."""
        return None

    def can_validate(self) -> bool:
        """Return whether there is validation data."""
        return False

    def validate(self) -> dict[str, float]:
        """Return the validation metrics of the current model."""
        return {}

    def describe_validation(self, figures: dict[str, float]) -> str:
        """Describe the metrics for the progress display."""
        return ", ".join(f"{name} {figures[name]:{form}}" for name, form in self.validation_figures.items())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups for the optimiser; see `parameter_groups`."""
        return parameter_groups(self.model, weight_decay)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups for the optimiser: weight decay for matrices, none for norms, biases and dynamics (A, D, ...).

    These are the groups of the Mamba paper's code (Gu & Dao, arXiv 2312.00752, appendix E.2).
    """
    spared = {id(parameter) for parameter in parameters_without_decay(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.dim() > 1 and id(parameter) not in spared]
    chosen = {id(parameter) for parameter in decaying}
    others = [parameter for parameter in trained if id(parameter) not in chosen]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
