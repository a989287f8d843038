"""Training a sequence model, as tasks of the training loop: on the rows of a table, or on windows of genomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from genomamba.data.genomes import GenomeCollection
from genomamba.data.pretraining_windows import shuffled_position
from genomamba.data.targets import Targets
from genomamba.data.windows import WindowSampler
from genomamba.models.sequence_model import SequenceModel
from genomamba.prediction.loss import SequenceLoss
from genomamba.prediction.predict import model_outputs, padded_batch, predictions_from
from genomamba.tokenizer import COMPLEMENT_IDS, Tokens
from mambacore.longsequence.losses import PooledLoss
from mambapipelines.training.recipe import BatchRecipe
from mambapipelines.training.schedules import LengthWarmup
from mambapipelines.training.task import Batch, Pieces, TrainingTask


class LabelledSequences(NamedTuple):
    """Sequences, and their targets (rows, columns)."""

    tokens: Sequence[Tokens]
    targets: Targets


class SequenceModelTask(TrainingTask):
    """Base class of both tasks; a batch is tokens (rows, length), lengths (rows,) and targets (rows, columns).

    A single row longer than a micro-batch is processed by a causal stack in pieces, exactly and in bounded memory.

    Args:
        model: the model, trained in place.
        loss: loss of its outputs.
        sizes: sizes of micro-batches.
        validation: held-out sequences and their targets; empty for none.
    """

    validation_figures: ClassVar[dict[str, str]] = {"validation_loss": ".6f", "validation_score": ".4f"}
    deciding_figure = "validation_loss"
    unit = "bases"

    def __init__(
        self, model: SequenceModel, loss: SequenceLoss, sizes: BatchRecipe, validation: LabelledSequences
    ) -> None:
        self.model: SequenceModel = model
        self.sequence_loss = loss
        self.sizes = sizes
        self.validation = validation

    def rows_per_micro_batch(self, length: int) -> int:
        """Rows of `length` bases per micro-batch."""
        return max(1, self.sizes.bases_per_micro_batch // length)

    def trimmed(self, micro_batch: Batch) -> Batch:
        """The micro-batch up to the end of its longest row."""
        tokens, lengths, targets = micro_batch
        return tokens[:, : int(lengths.max())], lengths, targets

    def weight(self, micro_batch: Batch) -> float:
        """Total weight of the labels that are not missing."""
        return float(self.sequence_loss.element_weights(micro_batch[2]).sum())

    def loss(self, replica: nn.Module, micro_batch: Batch) -> dict[str, Tensor]:
        """The mean loss of the rows."""
        tokens, lengths, targets = micro_batch
        outputs = cast(SequenceModel, replica).padded(tokens, lengths)
        return {"loss": self.sequence_loss.mean(outputs, targets)}

    def pieces(self, micro_batch: Batch) -> Pieces | None:
        """Process a single long row in pieces; the model does the pooling."""
        tokens, _, targets = micro_batch
        piece_length = self.sizes.bases_per_micro_batch
        if len(tokens) > 1 or tokens.shape[1] <= piece_length or not self.model.is_causal:
            return None
        loss = PooledLoss(lambda outputs: self.sequence_loss.mean(outputs, targets), pooling=None)
        return Pieces(tokens, loss, piece_length)

    def can_validate(self) -> bool:
        """Whether there are held-out sequences."""
        return len(self.validation.tokens) > 0

    def validate(self) -> dict[str, float]:
        """Loss of the held-out sequences, and a score: accuracy of classes or labels, R2 of numbers."""
        sequences, targets = self.validation
        outputs = model_outputs(self.model, sequences)
        loss = float(self.sequence_loss.mean(outputs, torch.from_numpy(targets)))
        return {"validation_loss": loss, "validation_score": self._score(outputs, targets)}

    def _score(self, outputs: Tensor, targets: Targets) -> float:
        description = self.sequence_loss.description
        predictions, known = predictions_from(description, outputs), ~np.isnan(targets)
        if not known.any():
            return float("nan")
        if description.kind == "classes":
            return float((predictions.argmax(axis=1)[known[:, 0]] == targets[known[:, 0], 0]).mean())
        if description.kind == "labels":
            return float(((predictions >= 0.5) == (targets == 1))[known].mean())
        errors = ((predictions - targets)[known] ** 2).sum()
        spread = ((targets - np.nanmean(targets, axis=0))[known] ** 2).sum()
        return float(1 - errors / spread) if spread > 0 else float("nan")


class TableTask(SequenceModelTask):
    """Rows of a table, each once per epoch, in an order that is a function of the seed and the epoch.

    Args:
        model, loss, sizes, validation: see `SequenceModelTask`.
        training: sequences and targets.
        rows_per_step: rows per optimiser step.
        seed: seed of the order and of the strands; models of both strands get each row on a random strand.
    """

    def __init__(
        self,
        model: SequenceModel,
        loss: SequenceLoss,
        sizes: BatchRecipe,
        validation: LabelledSequences,
        training: LabelledSequences,
        rows_per_step: int,
        seed: int,
    ) -> None:
        super().__init__(model, loss, sizes, validation)
        self.training = training
        self.rows_per_step = rows_per_step
        self.seed = seed

    def batch(self, step: int) -> Batch:
        """Return the rows of a step, sorted by length to reduce padding."""
        sequences, targets = self.training
        rows: list[tuple[Tokens, int]] = []
        for index in range(step * self.rows_per_step, (step + 1) * self.rows_per_step):
            epoch, position = divmod(index, len(sequences))
            row = shuffled_position(position, len(sequences), self.seed, epoch)
            tokens = sequences[row]
            random = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
            if self.model.config.both_strands and random.random() < 0.5:
                tokens = COMPLEMENT_IDS[tokens[::-1]]
            rows.append((tokens, row))
        rows.sort(key=lambda pair: len(pair[0]))
        tokens_of_step, lengths = padded_batch([tokens for tokens, _ in rows])
        return tokens_of_step, lengths, torch.from_numpy(targets[[row for _, row in rows]])

    def longest_batch(self) -> Batch:
        """The longest sequences."""
        sequences, targets = self.training
        longest = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))[-self.rows_per_step :]
        tokens, lengths = padded_batch([sequences[row] for row in longest])
        return tokens, lengths, torch.from_numpy(targets[longest])


class GenomeWindowTask(SequenceModelTask):
    """Windows of genomes to classify: uniform class, uniform chromosome, uniform start, either strand.

    Args:
        model, loss, sizes, validation: see `SequenceModelTask`; the model's classes are those of the genomes.
        genomes: genomes that windows are sampled from.
        lengths: window length by step.
        windows_per_step: windows per step, at every length.
        seed: seed of the windows.
    """

    def __init__(
        self,
        model: SequenceModel,
        loss: SequenceLoss,
        sizes: BatchRecipe,
        validation: LabelledSequences,
        genomes: GenomeCollection,
        lengths: LengthWarmup,
        windows_per_step: int,
        seed: int,
    ) -> None:
        super().__init__(model, loss, sizes, validation)
        self.lengths = lengths
        self.windows_per_step = windows_per_step
        self._genomes, self._seed = genomes, seed
        self._samplers: dict[int, WindowSampler] = {}

    def batch(self, step: int) -> Batch:
        """The windows of a step."""
        length = self.lengths.length_at(step)
        if length not in self._samplers:
            self._samplers[length] = WindowSampler(self._genomes, length, self._seed)
        count = self.windows_per_step
        tokens, labels = self._samplers[length].sample_batch(step * count, count)
        return torch.from_numpy(tokens), torch.full((count,), length), torch.from_numpy(labels).double().unsqueeze(1)
