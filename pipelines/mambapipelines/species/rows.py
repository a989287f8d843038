"""Rows of the classification table, and a summary of all records in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from genomamba.classification.records import Classification
from mambacore.safe_text import table_line

NOT_AVAILABLE: Final = "NA"
HISTOGRAM_BINS: Final = 20
MOST_LISTED_RECORDS: Final = 1_000
MOST_PLOTTED_RECORDS: Final = 5_000


@dataclass
class ClassificationSummary:
    """Counts and examples for a report, in bounded memory.

    Attributes:
        class_names: in the order of the model.
        records, bases: counts by call.
        histogram: (20,) records by probability of the best class, bins of 0.05.
        listed: the first records.
        plotted: a uniform random sample of the classified records.
    """

    class_names: tuple[str, ...]
    records: dict[str, int] = field(default_factory=dict)
    bases: dict[str, int] = field(default_factory=dict)
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, dtype=np.int64))
    listed: list[Classification] = field(default_factory=list)
    plotted: list[Classification] = field(default_factory=list)
    _classified: int = 0
    _random: np.random.Generator = field(default_factory=lambda: np.random.Generator(np.random.PCG64(0)))

    def add(self, row: Classification) -> None:
        """Count one record."""
        self.records[row.call] = self.records.get(row.call, 0) + 1
        self.bases[row.call] = self.bases.get(row.call, 0) + row.length
        if len(self.listed) < MOST_LISTED_RECORDS:
            self.listed.append(row)
        if row.probabilities is None:
            return
        self.histogram[min(HISTOGRAM_BINS - 1, int(row.probability * HISTOGRAM_BINS))] += 1
        self._classified += 1
        if len(self.plotted) < MOST_PLOTTED_RECORDS:
            self.plotted.append(row)
            return
        place = int(self._random.integers(self._classified))  # reservoir sampling (Vitter 1985, algorithm R)
        if place < MOST_PLOTTED_RECORDS:
            self.plotted[place] = row

    @property
    def record_count(self) -> int:
        """Records of all calls."""
        return sum(self.records.values())

    @property
    def base_count(self) -> int:
        """Bases of all calls."""
        return sum(self.bases.values())


def table_header(class_names: Sequence[str], extra_columns: Sequence[str] = ()) -> bytes:
    """The first line of the table, UTF-8."""
    columns = ["record", "length", "call", "probability", *(f"p_{name}" for name in class_names)]
    return table_line([*columns, *extra_columns]).encode() + b"\n"


def table_row(row: Classification, class_count: int, extra_columns: Sequence[str] = ()) -> bytes:
    """One line of the table, UTF-8; `extra_columns` as `RecordClassifier.extra_columns`."""
    if row.probabilities is None:
        figures = [NOT_AVAILABLE] * (1 + class_count)
    else:
        figures = [f"{value:.6f}" for value in (row.probability, *row.probabilities)]
    for value in (getattr(row, name) for name in extra_columns):
        figures.append(NOT_AVAILABLE if value is None else f"{value:.6f}")
    return table_line([row.name, str(row.length), row.call, *figures]).encode() + b"\n"
