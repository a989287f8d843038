"""The interface between a task and the training loop: model, batches, loss and validation."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from mambacore.layers import parameters_without_decay
from mambacore.longsequence.losses import Loss

Batch = tuple[Tensor, ...]


class Pieces(NamedTuple):
    """A micro-batch that goes through a causal model piece by piece (`mambacore.longsequence`)."""

    sequence: Tensor
    loss: Loss
    piece_length: int
    state: Any = None  # of the model before the sequence


class TrainingTask:
    """What is learned. A subclass gives everything that has no default here.

    Attributes:
        model: trained in place.
        training_figures: means beside the loss that `loss` gives, with the format of each in the metrics.
        validation_figures: what `validate` gives, with the format of each; none when there is nothing to validate on.
        deciding_figure: the validation figure that chooses the best state and that a plateau is seen in.
        higher_is_better: of the deciding figure.
        unit: what a position of a batch is called in the figures of speed.
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
    splits_over_context: ClassVar[bool] = False
    steps_done: int = 0

    def batch(self, step: int) -> Batch:
        """Tensors with one row per example, the first of them (rows, length, ...): all that step `step` learns from.

        A function of the task's seed and the step alone, so that a resumed run sees the same.
        """
        raise TypeError(f"{type(self).__name__} gives no batches")

    def loss(self, replica: nn.Module, micro_batch: Batch) -> dict[str, Tensor]:
        """Means over the micro-batch: the key `loss` with its graph, and the training figures.

        `replica` is the model or a copy of it with the same weights.
        """
        raise TypeError(f"{type(self).__name__} has no loss")

    def rows_per_micro_batch(self, length: int) -> int:
        """Rows of `length` positions that go through the model at once."""
        raise TypeError(f"{type(self).__name__} does not say how many rows go through the model at once")

    def trimmed(self, micro_batch: Batch) -> Batch:
        """The micro-batch without padding that all of its rows share; it lies on the CPU still."""
        return micro_batch

    def weight(self, micro_batch: Batch) -> float:
        """What a mean over the micro-batch counts in the mean over the batch: its rows, unless a task says otherwise.

        A batch whose weights are all 0 gives the loss 0 and no gradient.
        """
        return len(micro_batch[0])

    def pieces(self, micro_batch: Batch) -> Pieces | None:
        """How a long micro-batch goes through the model in bounded memory; `None` for all at once."""
        return None

    def can_validate(self) -> bool:
        """Whether there is anything to validate on."""
        return False

    def validate(self) -> dict[str, float]:
        """The validation figures of the model as it is."""
        return {}

    def describe_validation(self, figures: dict[str, float]) -> str:
        """The figures in words, for the progress display."""
        return ", ".join(f"{name} {figures[name]:{form}}" for name, form in self.validation_figures.items())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimiser; see `parameter_groups`."""
        return parameter_groups(self.model, weight_decay)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for the optimiser: matrices decay; norms, biases and the dynamics of mixers (A, D, ...) do not.

    These are the groups of the Mamba paper's code (Gu & Dao, arXiv 2312.00752, appendix E.2).
    """
    spared = {id(parameter) for parameter in parameters_without_decay(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.dim() > 1 and id(parameter) not in spared]
    chosen = {id(parameter) for parameter in decaying}
    others = [parameter for parameter in trained if id(parameter) not in chosen]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
