"""The choice among clips generated for the same request, by the model's own likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from audiomamba.data.labels import UNLABELLED, LabelSet
from audiomamba.metrics.likelihood import clip_likelihoods
from audiomamba.metrics.selection import flags_of
from audiomamba.models import WaveformModel


def best_candidates(
    model: WaveformModel,
    classes: Tensor,
    rows: Tensor,
    clocks: Tensor,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Return the number of the best candidate of each clip.

    That is the one that is told apart best from what was not asked for: with the largest difference between
    log p(clip | labels) and the highest log p(clip | other labels), where one label is replaced by another value of
    its set, or left out if there is no other. The clock is given in all of them, and only what comes before its end
    is compared. A silent candidate is taken only where all are. Each clip is compared by itself, so that the choice
    depends on nothing else.

    The likelihood ratio against no labels at all does not serve: it is no higher for digits that are heard
    (docs/audio-evaluation.md).

    Args:
        model: the model that generated them.
        classes: (clips, candidates, samples).
        rows: (clips, label sets), numbers of labels.
        clocks: (clips,), durations of the clocks in samples; 0 for none.
        progress: called with the number of candidates compared.
    """
    quantiser = model.config.quantiser
    chosen = []
    for found, labels, clock in zip(classes, rows, clocks, strict=True):
        compared = torch.tensor(_alternatives(labels.tolist(), model.config.label_sets))
        silent = ["silent" in flags_of(quantiser.decode(one)) for one in found]
        margins = []
        for candidate in found:
            sound = candidate[: int(clock)] if clock > 0 else candidate
            likelihoods = clip_likelihoods(
                model, [sound] * len(compared), quantiser, labels=compared, clocks=clock.repeat(len(compared))
            )
            asked, *others = (one.nats for one in likelihoods)
            margins.append(min(others) - asked)
            if progress is not None:
                progress(1)
        chosen.append(max(range(len(found)), key=lambda one: (not silent[one], margins[one])))
    return torch.tensor(chosen)


def _alternatives(labels: Sequence[int], label_sets: Sequence[LabelSet]) -> list[list[int]]:
    """Return the labels, and then each way to replace one of them by another value of its set."""
    found = [list(labels)]
    for place, one in enumerate(label_sets):
        if labels[place] == UNLABELLED:
            continue
        others = [number for number in range(1, len(one.values) + 1) if number != labels[place]]
        for other in others or [UNLABELLED]:
            found.append([*labels[:place], other, *labels[place + 1 :]])
    return found
