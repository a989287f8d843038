"""The clock of a model: how far a clip has progressed, a condition that changes with time.

A model that knows only what is said has to keep track of where in it it is, and loses that when it hears nothing but
itself. With a clock, each position is also conditioned on `t / T`, its time over the duration of the clip's sound, in
bins; positions after the end have a bin of their own. A clip without a duration has no clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from audiomamba.data.labels import UNLABELLED
from mambacore.errors import InputError

NO_CLOCK: Final = 0
"""Duration of a clip without a clock, in samples, and the bin of all its positions."""

MOST_BINS: Final = 1024
QUANTILES: Final = 9
"""Durations that are kept of the training clips with the same labels: quantiles from the shortest to the longest."""

MOST_LABELLINGS: Final = 4096
"""With more combinations of labels than this, only the durations of all clips together are kept."""


@dataclasses.dataclass(frozen=True)
class LabelDurations:
    """Durations of the training clips that have the same labels.

    Attributes:
        labels: one number per label set.
        clips: number of these clips.
        seconds: evenly spaced quantiles of their durations, the shortest first.
    """

    labels: tuple[int, ...]
    clips: int
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "seconds", tuple(self.seconds))
        whole = all(isinstance(one, int) and one >= 0 for one in (*self.labels, self.clips))
        numbers = all(isinstance(one, int | float) and one > 0 for one in self.seconds)
        if not whole or not numbers or self.clips < 1 or list(self.seconds) != sorted(self.seconds) or not self.seconds:
            raise InputError(f"the durations of label numbers {self.labels} are invalid; the model folder is damaged")

    def quantile(self, share: float) -> float:
        """Return the duration in seconds that this share of the clips does not exceed."""
        return float(np.interp(share, np.linspace(0, 1, len(self.seconds)), self.seconds))


@dataclasses.dataclass(frozen=True)
class Clock:
    """The clock of a model, stored with it.

    Attributes:
        bins: parts of a clip that are told apart; 0 for a model without a clock.
        by_label: whether each label has its own vectors for the bins, so that the model is told what is said when.
        durations: of the training clips, for clips to be generated whose duration is not asked for.

    Raises:
        InputError: if a value is out of range.
    """

    bins: int = 0
    by_label: bool = False
    durations: tuple[LabelDurations, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or not 0 <= self.bins <= MOST_BINS:
            raise InputError(f"the clock has {self.bins!r} bins; give an integer from 0 (no clock) to {MOST_BINS}")
        if not isinstance(self.by_label, bool):
            raise InputError(f"by_label of the clock is {self.by_label!r}; give true or false")
        object.__setattr__(self, "durations", tuple(self.durations))

    def typical_seconds(self, labels: Sequence[int], uniforms: Sequence[float]) -> float:
        """Return a duration such as the training clips with these labels have.

        Args:
            labels: one number per label set; sets that are `UNLABELLED` are averaged over.
            uniforms: two numbers from 0 to below 1, which choose among clips with other labels and among durations.

        Raises:
            InputError: if the model has no durations.
        """
        if not self.durations:
            raise InputError("the model has no durations of training clips; give the clock's duration")
        fitting = [
            one
            for one in self.durations
            if all(asked in (UNLABELLED, own) for asked, own in zip(labels, one.labels, strict=True))
        ] or list(self.durations)
        shares = np.cumsum([one.clips for one in fitting]) / sum(one.clips for one in fitting)
        chosen = fitting[min(int(np.searchsorted(shares, uniforms[0], side="right")), len(fitting) - 1)]
        return chosen.quantile(uniforms[1])

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_config` is the inverse."""
        rows = [
            {"labels": list(one.labels), "clips": one.clips, "seconds": list(one.seconds)} for one in self.durations
        ]
        return {"bins": self.bins, "by_label": self.by_label, "durations": rows}

    @classmethod
    def from_config(cls, values: Any) -> Clock:
        """Inverse of `to_config`; an empty mapping is no clock.

        Raises:
            InputError: if a key is unknown or missing, or a value is invalid.
        """
        rows = values.get("durations", ()) if isinstance(values, Mapping) else None
        keys = {"labels", "clips", "seconds"}
        if (
            not isinstance(values, Mapping)
            or not set(values) <= {"bins", "by_label", "durations"}
            or not isinstance(rows, list | tuple)
            or not all(isinstance(row, Mapping) and set(row) == keys for row in rows)
            or not all(isinstance(row[key], list | tuple) for row in rows for key in ("labels", "seconds"))
        ):
            raise InputError("clock in the model's configuration is not a table of bins and durations; it is damaged")
        durations = tuple(LabelDurations(**row) for row in rows)
        return cls(values.get("bins", 0), values.get("by_label", False), durations)


def label_durations(clips: Iterable[tuple[Sequence[int], float]]) -> tuple[LabelDurations, ...]:
    """Summarise the durations of clips by their labels.

    Args:
        clips: label numbers and duration in seconds of each clip.
    """
    found: dict[tuple[int, ...], list[float]] = {}
    for labels, seconds in clips:
        found.setdefault(tuple(labels), []).append(seconds)
    if len(found) > MOST_LABELLINGS:
        unlabelled = (UNLABELLED,) * len(next(iter(found)))
        found = {unlabelled: [seconds for durations in found.values() for seconds in durations]}
    return tuple(
        LabelDurations(
            labels,
            len(durations),
            tuple(round(float(one), 4) for one in np.quantile(durations, np.linspace(0, 1, QUANTILES))),
        )
        for labels, durations in sorted(found.items())
    )
