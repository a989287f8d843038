"""Evidence of held-out windows, used to fit calibration and OOD detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntegerArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOutEvidence:
    """Evidence of held-out windows; rows of all arrays correspond.

    Attributes:
        mean_evidence: (windows, classes) per base, averaged over both strands.
        lengths_bp: (windows,) length of each window.
        labels: (windows,) true class.
        folds: (windows,) 0 or 1: which half of its sequence the window lies in, so that a fit on one fold is tested on
            other bases.
        own_likelihood: (windows,) of `novelty.own_likelihood`, or 0 where p-values are not needed.
        scored_share: (windows,) `novelty.count_scored_words` per base, if p-values need it.
        counted: (windows, parts, classes) per base, of a model with counted parts; `mean_evidence` is of the stack.
    """

    mean_evidence: FloatArray
    lengths_bp: IntegerArray
    labels: IntegerArray
    folds: IntegerArray
    own_likelihood: FloatArray | float = 0.0
    scored_share: FloatArray | float = 1.0
    counted: FloatArray | None = None

    @classmethod
    def joined(cls, parts: Sequence[HeldOutEvidence]) -> HeldOutEvidence:
        """Concatenate the rows of several."""

        def of_all(name: str) -> FloatArray:
            return np.concatenate([np.broadcast_to(getattr(part, name), part.lengths_bp.shape) for part in parts])

        return cls(
            mean_evidence=np.concatenate([part.mean_evidence for part in parts]),
            lengths_bp=np.concatenate([part.lengths_bp for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            folds=np.concatenate([part.folds for part in parts]),
            own_likelihood=of_all("own_likelihood"),
            scored_share=of_all("scored_share"),
            counted=None
            if any(part.counted is None for part in parts)
            else np.concatenate([part.counted for part in parts if part.counted is not None]),
        )

    def subset(self, chosen: npt.NDArray[np.bool_]) -> HeldOutEvidence:
        """Return the chosen windows, without their own likelihood."""
        return HeldOutEvidence(
            mean_evidence=self.mean_evidence[chosen],
            lengths_bp=self.lengths_bp[chosen],
            labels=self.labels[chosen],
            folds=self.folds[chosen],
            counted=None if self.counted is None else self.counted[chosen],
        )
