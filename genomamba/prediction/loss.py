"""The loss of a sequence model, with class weights and missing labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genomamba.data.targets import TargetDescription, Targets
from mambacore.devices import wide_dtype, widened


@dataclass(frozen=True)
class SequenceLoss:
    """Cross-entropy for classes, binary cross-entropy for labels, squared error for standardised numbers.

    Missing labels (NaN) are ignored. With weights, every class, or both values of every label, have equal total weight.

    Attributes:
        description: description of the targets.
        weights: of classes (classes,), or of labels (columns, 2) for 0 and 1; by default all are 1.
    """

    description: TargetDescription
    weights: Tensor | None = field(default=None)

    @classmethod
    def balanced(cls, description: TargetDescription, targets: Targets) -> SequenceLoss:
        """Create a loss with weights from the training rows' targets: rows / (values * rows of the value)."""
        if description.kind == "classes":
            known = targets[~np.isnan(targets)].astype(np.int64)
            counts = np.bincount(known, minlength=len(description.class_names))
            return cls(description, torch.from_numpy(len(known) / (len(counts) * counts)).float())
        if description.kind == "labels":
            counts = np.stack([(targets == value).sum(axis=0) for value in (0, 1)], axis=1)
            return cls(description, torch.from_numpy(counts.sum(axis=1, keepdims=True) / (2 * counts)).float())
        return cls(description)

    def element_weights(self, targets: Tensor) -> Tensor:
        """Return the weight of each target (rows, columns), of the same shape; 0 if missing."""
        known = ~torch.isnan(targets)
        if self.weights is None:
            return known.float()
        numbers = torch.where(known, targets, 0).long()
        weights = self.weights.to(targets.device)
        if self.description.kind == "classes":
            return weights[numbers] * known
        return weights.expand(len(targets), -1, -1).gather(2, numbers.unsqueeze(-1)).squeeze(-1) * known

    def mean(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted mean loss for outputs (rows, outputs) and targets (rows, columns); 0 if all missing."""
        weights = self.element_weights(targets).to(outputs.dtype)
        known = torch.where(torch.isnan(targets), 0, targets)
        if self.description.kind == "classes":
            losses = F.cross_entropy(outputs, known[:, 0].long(), reduction="none").unsqueeze(1)
        elif self.description.kind == "labels":
            losses = F.binary_cross_entropy_with_logits(outputs, known.to(outputs.dtype), reduction="none")
        else:
            means, deviations = (
                torch.tensor(values, dtype=wide_dtype(targets.device), device=targets.device)
                for values in (self.description.means, self.description.deviations)
            )
            losses = (outputs - ((widened(known) - means) / deviations).to(outputs.dtype)) ** 2
        return (losses * weights).sum() / weights.sum().clamp(min=1e-12)
