"""What a model of sequences is trained to say: one class of several, several yes-or-no labels, or numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Self, cast

import numpy as np
import numpy.typing as npt

from genomamba.io.tables import SequenceTable
from mambacore.errors import InputError

TargetKind = Literal["classes", "labels", "numbers"]
TARGET_KINDS: Final[tuple[TargetKind, ...]] = ("classes", "labels", "numbers")
MOST_GUESSED_CLASSES: Final = 50
"""A single column of more different whole numbers than this could be either: the user must say."""

Targets = npt.NDArray[np.float64]
"""(sequences, columns): a class's number, 0 or 1, or a number; NaN where the label is missing."""


@dataclass(frozen=True)
class TargetDescription:
    """The targets of a model.

    Attributes:
        kind: `classes`, one column whose values are class names; `labels`, columns of 0 and 1 that do not exclude each
            other; `numbers`, columns of numbers.
        columns: their names.
        class_names: of `classes`, sorted; a class is its place here.
        means, deviations: of `numbers`, over the training rows: the model predicts (number - mean) / deviation.
    """

    kind: TargetKind
    columns: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    means: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()

    @property
    def outputs(self) -> int:
        """Values that a model gives for a sequence."""
        return len(self.class_names) if self.kind == "classes" else len(self.columns)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The opposite of `to_dict`."""
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**settings)


def guess_kind(table: SequenceTable) -> TargetKind:
    """What the label columns look like.

    Several columns of 0 and 1 are labels; a single column of words, or of few whole numbers written without a point,
    is classes; columns of numbers otherwise are numbers.

    Raises:
        InputError: there are no label columns, or a single one of many different whole numbers.
    """
    if not table.labels:
        raise InputError(f"{table.source} has no column of labels: add one, or name it with --label.")
    columns = [[value for value in values if value is not None] for values in table.labels.values()]
    numeric = all(_is_number(value) for values in columns for value in values)
    if len(columns) > 1:
        return "labels" if all(value in ("0", "1") for values in columns for value in values) else "numbers"
    if not numeric:
        return "classes"
    distinct = set(columns[0])
    whole = all(value.isdigit() for value in distinct)
    if whole and len(distinct) > MOST_GUESSED_CLASSES:
        raise InputError(
            f"the column '{next(iter(table.labels))}' of {table.source} has {len(distinct)} different whole numbers: "
            "say with --kind whether they are classes or numbers."
        )
    return "classes" if whole else "numbers"


def describe_targets(table: SequenceTable, splits: Sequence[str], kind: TargetKind) -> TargetDescription:
    """What is learned from the training rows of a table.

    Raises:
        InputError: values of another kind (with their place), fewer than two classes, a class that has no training
            rows, or a column that is the same in all of them.
    """
    columns = tuple(table.labels)
    if kind == "classes":
        if len(columns) != 1:
            raise InputError(
                f"{table.source} has {len(columns)} columns of labels ({', '.join(columns)}), and classes are in one: "
                "name it with --label, or give another --kind."
            )
        values = table.labels[columns[0]]
        trained = {value for value, split in zip(values, splits, strict=True) if value is not None and split == "train"}
        for value, split, place in zip(values, splits, table.places, strict=True):
            if value is not None and value not in trained:
                raise InputError(
                    f"{table.source} has the class '{value}' in {place} ({split}) and nowhere in training: add "
                    "training rows of it or remove the row."
                )
        if len(trained) < 2:
            raise InputError(
                f"the column '{columns[0]}' of {table.source} has {len(trained)} class to train on: give two or more."
            )
        return TargetDescription(kind, columns, tuple(sorted(trained)))
    raw = _numbers(table, columns, only_labels=kind == "labels")
    training = raw[[split == "train" for split in splits]]
    for name, column in zip(columns, training.T, strict=True):
        known = column[~np.isnan(column)]
        if len(known) == 0 or known.min() == known.max():
            found = "no value" if len(known) == 0 else f"only the value {known[0]:g}"
            raise InputError(
                f"the column '{name}' of {table.source} has {found} in training: there is nothing to learn."
            )
    if kind == "labels":
        return TargetDescription(kind, columns)
    means, deviations = np.nanmean(training, axis=0), np.nanstd(training, axis=0)
    return TargetDescription(kind, columns, (), tuple(map(float, means)), tuple(map(float, deviations)))


def encode_targets(table: SequenceTable, description: TargetDescription) -> Targets:
    """The targets of all rows, (rows, columns); see `Targets`.

    Raises:
        InputError: a column that is missing, or a value that is none of the description's.
    """
    for name in description.columns:
        if name not in table.labels:
            raise InputError(f"{table.source} has no column '{name}', which the model was trained on: add it.")
    if description.kind != "classes":
        return _numbers(table, description.columns, only_labels=description.kind == "labels")
    column = description.columns[0]
    numbers = np.full((len(table), 1), math.nan)
    for row, value in enumerate(table.labels[column]):
        if value is None:
            continue
        if value not in description.class_names:
            raise InputError(
                f"{table.source} has the class '{value}' in {table.places[row]}, which is none of "
                f"{', '.join(description.class_names)}."
            )
        numbers[row, 0] = description.class_names.index(value)
    return numbers


def _numbers(table: SequenceTable, columns: Sequence[str], only_labels: bool) -> Targets:
    numbers = np.full((len(table), len(columns)), math.nan)
    for which, name in enumerate(columns):
        for row, value in enumerate(table.labels[name]):
            if value is None:
                continue
            if not _is_number(value):
                raise InputError(
                    f"{table.source} has '{value}' in the column '{name}' of {table.places[row]}, which is no number: "
                    "correct it or write NA."
                )
            number = float(value)
            if only_labels and number not in (0, 1):
                raise InputError(
                    f"{table.source} has {value} in the column '{name}' of {table.places[row]}, and labels are 0 or 1: "
                    "correct it, or give --kind numbers."
                )
            numbers[row, which] = number
    return numbers


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def checked_kind(name: str) -> TargetKind:
    """A kind by name.

    Raises:
        InputError: another name.
    """
    if name not in TARGET_KINDS:
        raise InputError(f"there is no kind of labels '{name}': use {', '.join(TARGET_KINDS)} or auto.")
    return cast(TargetKind, name)
