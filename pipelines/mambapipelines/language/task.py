"""Pretraining tasks for the training loop: next-base prediction and masked bases.

The batch of a step is a function of the seed and the step. Positions that the letter policy excludes are never targets.
Micro-batches are weighted by their number of targets, so the loss of a step is the mean over all its targets, or 0 if
there are none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from genomamba.data.pretraining_windows import PretrainingWindow, PretrainingWindows
from genomamba.models.language_model import BASE_COUNT, FIRST_BASE_TOKEN, MASK_TOKEN, CoreModel, LanguageModel
from genomamba.scoring.likelihood import causal_losses, is_base, masked_losses
from mambacore.longsequence import TokenCrossEntropy
from mambapipelines.language.recipe import MaskingRecipe, PretrainingRecipe
from mambapipelines.training.task import Batch, Pieces, TrainingTask

IGNORED = -100
# The tokens of a window and its masking use separate random generators.
MASKING_STREAM = 0x6D61736B
VALIDATION_STREAM = 0x76616C69


class LanguageTask(TrainingTask):
    """Base class of both objectives: trains on windows, validates by perplexity.

    Args:
        model: the model, trained in place.
        recipe: batch size and window lengths.
        training: windows of the full length.
        validation: held-out windows of the full length; may be empty.
    """

    validation_figures: ClassVar[dict[str, str]] = {"perplexity": ".4f"}
    deciding_figure = "perplexity"
    higher_is_better = False
    unit = "bases"

    def __init__(
        self,
        model: CoreModel,
        recipe: PretrainingRecipe,
        training: PretrainingWindows,
        validation: Sequence[PretrainingWindow],
    ) -> None:
        self.model: CoreModel = model
        self.recipe = recipe
        self.validation = validation
        self.lengths = recipe.length.warmup(training.length)
        self._windows = {training.length: training}
        self._full = training

    def batch(self, step: int) -> Batch:
        """Examples from windows `step * count` to `(step + 1) * count - 1` at the length of this step."""
        windows = self.windows(self.lengths.length_at(step))
        count = self.recipe.batch.windows_per_step(windows.length)
        tokens, scored = windows.sample_batch(step * count, count)
        return self._examples(tokens, scored, step * count)

    def windows(self, length: int) -> PretrainingWindows:
        """The training windows at a given length of the length warm-up."""
        if length not in self._windows:
            self._windows[length] = self._full.at_length(length)
        return self._windows[length]

    def _examples(self, tokens: np.ndarray, scored: np.ndarray, first_index: int) -> Batch:
        """(windows, length) inputs, and targets with `IGNORED` where there is nothing to predict."""
        raise TypeError(f"{type(self).__name__} does not say what is to be predicted")

    def rows_per_micro_batch(self, length: int) -> int:
        """Number of windows of `length` bases per micro-batch."""
        return self.recipe.batch.windows_per_micro_batch(length)

    def weight(self, micro_batch: Batch) -> float:
        """Number of targets of the micro-batch."""
        return float((micro_batch[1] != IGNORED).sum())

    def loss(self, replica: nn.Module, micro_batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy of the targets in nats; 0 if there are none."""
        inputs, targets = micro_batch
        outputs = replica(inputs.long())
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return {"loss": TokenCrossEntropy(targets.long(), ignored=IGNORED)(logits, slice(0, inputs.shape[1]))}

    def can_validate(self) -> bool:
        """Whether there are held-out windows."""
        return bool(self.validation)

    def validate(self) -> dict[str, float]:
        """Perplexity per base on the held-out windows."""
        self.model.eval()
        language_model = LanguageModel(self.model, self._full.policy)
        rows = self.rows_per_micro_batch(self._full.length)
        total, count = 0.0, 0
        for first in range(0, len(self.validation), rows):
            part = self.validation[first : first + rows]
            tokens = torch.from_numpy(np.stack([window.tokens for window in part]))
            losses, counted = self._held_out_losses(language_model, tokens, first)
            total += float(losses)
            count += counted
        self.model.train()
        return {"perplexity": math.exp(total / count) if count else math.nan}

    def _held_out_losses(self, language_model: LanguageModel, tokens: Tensor, first: int) -> tuple[float, int]:
        """Summed cross-entropy of held-out bases, and their number."""
        raise TypeError(f"{type(self).__name__} has no validation")

    def describe_validation(self, figures: dict[str, float]) -> str:
        """The validation perplexity as text."""
        return f"held-out perplexity {figures['perplexity']:.4f}"

    def bases_seen(self, total_steps: int) -> int:
        """Bases in the windows of the first `total_steps` steps."""
        lengths = [self.lengths.length_at(step) for step in range(total_steps)]
        return sum(length * self.recipe.batch.windows_per_step(length) for length in lengths)


class CausalTask(LanguageTask):
    """Next-base prediction; long windows are processed in pieces, with exact gradients.

    A window may be split over several processes (`mambacore.parallel`): each then processes its stretch as a whole, and
    they exchange states only.
    """

    splits_over_context = True

    def _examples(self, tokens: np.ndarray, scored: np.ndarray, first_index: int) -> Batch:
        return torch.from_numpy(tokens), torch.from_numpy(next_token_targets(tokens, scored))

    def pieces(self, micro_batch: Batch) -> Pieces | None:
        """Process windows longer than `pretraining.piece_length` in pieces."""
        inputs, targets = micro_batch
        piece_length = self.recipe.pretraining.piece_length
        if inputs.shape[1] <= piece_length:
            return None
        return Pieces(inputs.long(), TokenCrossEntropy(targets.long(), ignored=IGNORED), piece_length)

    def _held_out_losses(self, language_model: LanguageModel, tokens: Tensor, first: int) -> tuple[float, int]:
        losses = causal_losses(language_model, tokens, self.recipe.pretraining.piece_length)
        return float(losses.sum()), int(is_base(tokens)[:, 1:].sum())


class MaskedTask(LanguageTask):
    """Predict masked bases from both sides (BERT, Devlin et al., arXiv 1810.04805, section 3.1; Caduceus)."""

    def _examples(self, tokens: np.ndarray, scored: np.ndarray, first_index: int) -> Batch:
        inputs = tokens.copy()
        targets = np.full(tokens.shape, IGNORED, dtype=np.int16)
        for row in range(len(tokens)):
            random = np.random.Generator(
                np.random.Philox(key=np.array([self._full.seed ^ MASKING_STREAM, first_index + row], dtype=np.uint64))
            )
            inputs[row], targets[row] = masked_example(tokens[row], scored[row], self.recipe.masking, random)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _held_out_losses(self, language_model: LanguageModel, tokens: Tensor, first: int) -> tuple[float, int]:
        random = np.random.Generator(np.random.Philox(key=np.array([VALIDATION_STREAM, first], dtype=np.uint64)))
        hidden = torch.from_numpy(random.random(tokens.shape) < self.recipe.masking.fraction) & is_base(tokens)
        losses = masked_losses(language_model, tokens, hidden)
        return float(losses.sum()), int(hidden.sum())


def next_token_targets(tokens: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """The next token of each position if it is scored, else `IGNORED`; int16, of the shape of `tokens`."""
    targets = np.full(tokens.shape, IGNORED, dtype=np.int16)
    targets[:, :-1] = np.where(scored[:, 1:], tokens[:, 1:].astype(np.int16), IGNORED)
    return targets


def masked_example(
    tokens: np.ndarray, scored: np.ndarray, masking: MaskingRecipe, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one window: each scored position is a target with probability `masking.fraction`.

    Some targets become [MASK], some a random base, and the rest stay unchanged, so that the model cannot tell which
    positions are targets.
    """
    chances = random.random((2, len(tokens)))
    is_target = scored & (chances[0] < masking.fraction)
    hide = is_target & (chances[1] < masking.mask_share)
    replace = is_target & ~hide & (chances[1] < masking.mask_share + masking.random_share)
    bases = random.integers(FIRST_BASE_TOKEN, FIRST_BASE_TOKEN + BASE_COUNT, len(tokens), dtype=np.uint8)
    inputs = np.where(hide, np.uint8(MASK_TOKEN), np.where(replace, bases, tokens))
    return inputs, np.where(is_target, tokens.astype(np.int16), IGNORED)
