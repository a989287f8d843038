"""The choice among clips generated for the same request, by the model's own likelihoods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from audiomamba.data.labels import UNLABELLED
from audiomamba.metrics.likelihood import clip_likelihoods
from audiomamba.metrics.selection import flags_of
from audiomamba.models import WaveformModel
from mambacore.errors import InputError

MOST_CANDIDATES: Final = 256


def check_candidates(candidates: int, has_labels: bool) -> None:
    """Check how many clips are to be generated for each that is kept.

    Raises:
        InputError: if the number is out of range, or there are no labels to compare the candidates by.
    """
    if not 1 <= candidates <= MOST_CANDIDATES:
        raise InputError(f"{candidates} candidates were asked for; ask for 1 to {MOST_CANDIDATES}")
    if candidates > 1 and not has_labels:
        raise InputError("candidates are compared by how well they fit their labels; ask for a label too")


def best_candidates(
    model: WaveformModel,
    classes: Tensor,
    rows: Tensor,
    clocks: Tensor,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Return the number of the best candidate of each clip.

    That is the one with the highest log p(clip | labels) - log p(clip), both given the clock: how much more likely it
    is for what was asked. Spoken digits are not heard more often by it (docs/audio-evaluation.md). A silent candidate
    is taken only where all are. Each clip is compared by itself, so that the choice depends on nothing else.

    Args:
        model: the model that generated them.
        classes: (clips, candidates, samples).
        rows: (clips, label sets), numbers of labels.
        clocks: (clips,), durations of the clocks in samples.
        progress: called with the number of candidates compared.
    """
    quantiser = model.config.quantiser
    chosen = []
    for found, labels, clock in zip(classes, rows, clocks, strict=True):
        count = len(found)
        asked = torch.stack([labels, torch.full_like(labels, UNLABELLED)]).repeat_interleave(count, 0)
        likelihoods = clip_likelihoods(model, [*found, *found], quantiser, labels=asked, clocks=clock.repeat(2 * count))
        ratios = [
            without.nats - given.nats for given, without in zip(likelihoods[:count], likelihoods[count:], strict=True)
        ]
        silent = ["silent" in flags_of(quantiser.decode(one)) for one in found]
        chosen.append(max(range(count), key=lambda one: (not silent[one], ratios[one])))
        if progress is not None:
            progress(count)
    return torch.tensor(chosen)
