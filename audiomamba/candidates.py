"""The choice among clips generated for the same request, by the model's own likelihoods or by a clip classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from audiomamba.data.labels import UNLABELLED, LabelSet
from audiomamba.data.waveforms import Waveform
from audiomamba.metrics.likelihood import clip_likelihoods
from audiomamba.metrics.selection import flags_of
from audiomamba.models import WaveformModel
from audiomamba.models.clip_classifier import ClipClassifier
from mambacore.devices import device_of


class Judge(NamedTuple):
    """A clip classifier that compares candidates.

    Attributes:
        classifier: in evaluation mode.
        place: position of the label set whose values it tells apart.
        classes: number of the class of each value of that set.
    """

    classifier: ClipClassifier
    place: int
    classes: tuple[int, ...]

    def scores(self, model: WaveformModel, found: Tensor, labels: Tensor) -> list[float]:
        """Log-probability of the label for each of (candidates, samples) classes."""
        quantiser = model.config.quantiser
        heard = torch.stack(
            [self.classifier.fitted(Waveform(quantiser.decode(one), quantiser.sample_rate_hz)) for one in found]
        )
        logits = self.classifier(heard.to(device_of(self.classifier))).cpu().double()
        return logits.log_softmax(-1)[:, self.classes[int(labels[self.place]) - 1]].tolist()


def judge_of(classifier: ClipClassifier, label_sets: Sequence[LabelSet], asked: Mapping[str, str]) -> Judge | None:
    """Return the judge that a classifier is of clips with these labels; `None` if it knows no label set of them.

    Args:
        classifier: in evaluation mode.
        label_sets: those of the model.
        asked: values of label sets, `each` for all of a set.
    """
    known = {name: number for number, name in enumerate(classifier.config.class_names)}
    for place, one in enumerate(label_sets):
        if one.name in asked and set(one.values) <= set(known):
            return Judge(classifier, place, tuple(known[value] for value in one.values))
    return None


def best_candidates(
    model: WaveformModel,
    classes: Tensor,
    rows: Tensor,
    clocks: Tensor,
    judge: Judge | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Return the number of the best candidate of each clip.

    With a judge that is the one with the highest probability of what was asked for. Without one it is the one that the
    model itself tells apart best from what was not asked for: with the largest difference between log p(clip | labels)
    and the highest log p(clip | other labels), where one label is replaced by another value of its set, or left out if
    there is no other. The clock is given in all of them, and only what comes before its end is compared. (The ratio
    against no labels at all does not serve: docs/audio-evaluation.md.) A silent candidate is taken only where all
    are. Each clip is compared by itself, so that the choice depends on nothing else.

    Args:
        model: the model that generated them.
        classes: (clips, candidates, samples).
        rows: (clips, label sets), numbers of labels.
        clocks: (clips,), durations of the clocks in samples; 0 for none.
        judge: a classifier to choose by.
        progress: called with the number of candidates compared.
    """
    quantiser = model.config.quantiser
    chosen = []
    for found, labels, clock in zip(classes, rows, clocks, strict=True):
        silent = ["silent" in flags_of(quantiser.decode(one)) for one in found]
        scores = judge.scores(model, found, labels) if judge else _margins(model, found, labels, clock)
        chosen.append(max(range(len(found)), key=lambda one: (not silent[one], scores[one])))
        if progress is not None:
            progress(len(found))
    return torch.tensor(chosen)


def _margins(model: WaveformModel, found: Tensor, labels: Tensor, clock: Tensor) -> list[float]:
    """How much more likely each of (candidates, samples) classes is with the labels than with the next likely ones."""
    compared = torch.tensor(_alternatives(labels.tolist(), model.config.label_sets))
    margins = []
    for candidate in found:
        sound = candidate[: int(clock)] if clock > 0 else candidate
        likelihoods = clip_likelihoods(
            model,
            [sound] * len(compared),
            model.config.quantiser,
            labels=compared,
            clocks=clock.repeat(len(compared)),
        )
        asked, *others = (one.nats for one in likelihoods)
        margins.append(min(others) - asked)
    return margins


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
