"""Targets of sequence models: one class of several, several yes-or-no labels, or numbers."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Final, Literal, Self, cast

import numpy as np
import numpy.typing as npt

from genomamba.io.compression import LOGGER
from genomamba.io.tables import SequenceTable
from mambacore.errors import InputError
from mambacore.safe_text import safe_field

TargetKind = Literal["classes", "labels", "numbers"]
TARGET_KINDS: Final[tuple[TargetKind, ...]] = ("classes", "labels", "numbers")
MOST_GUESSED_CLASSES: Final = 50
"""A single column with more distinct integers than this is ambiguous: the user must specify its kind."""
FEW_CLASSES: Final = 5
"""Up to this many distinct values may be classes, however few rows there are."""
MOST_DISTINCT_SHARE: Final = 0.8
"""If more than this share of the values are distinct, they are not classes."""
LARGEST_NUMBER: Final = 1e30
LEAST_DEVIATION: Final = 1e-30
"""Limits of numbers, far from those of single precision, in which models are trained."""
LONGEST_CLASS_NAME: Final = 200
"""A longer class name is another column, or a quote that does not end."""
_TRUTH: Final = {"true": 1.0, "false": 0.0}
_DECIMAL_COMMA: Final = re.compile(r"[-+]?[0-9]+,[0-9]+")

Targets = npt.NDArray[np.float64]
"""(sequences, columns): a class index, 0 or 1, or a number; NaN if the label is missing."""


@dataclass(frozen=True)
class TargetDescription:
    """The targets of a model.

    Attributes:
        kind: `classes`, one column of class names; `labels`, independent columns of 0 and 1; `numbers`, columns of
            numbers.
        columns: names of the columns.
        class_names: for `classes`: the sorted names; a class is encoded as its index.
        means, deviations: for `numbers`: of the training rows; the model predicts (number - mean) / deviation.
    """

    kind: TargetKind
    columns: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    means: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()

    @property
    def outputs(self) -> int:
        """Number of model outputs per sequence."""
        return len(self.class_names) if self.kind == "classes" else len(self.columns)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**settings)


def guess_kind(table: SequenceTable) -> TargetKind:
    """Infer the kind of targets from the values of the label columns.

    A single column of words, or of few distinct integers, is classes; integers with a decimal point only if they are -1
    and 1 or consecutive (`0.0` and `1.0`). Several columns of 0 and 1 (or false and true) are labels; other numeric
    columns are numbers. A column of measurements is not taken for classes because of other values (`<0.01`, `ND`), nor
    is a column of almost all distinct values.

    Raises:
        InputError: if there are no label columns, a value does not fit (with its line), or the kind is ambiguous and
            has to be specified.
    """
    if not table.labels:
        raise InputError(f"{table.source} has no label column: add one, or name it with --label.")
    columns = [[value for value in values if value is not None] for values in table.labels.values()]
    if len(columns) > 1:
        numeric = all(_is_label_or_number(value) for values in columns for value in values)
        if not numeric:
            raise _not_a_number(table, f"and there are {len(columns)} label columns", "name one with --label")
        distinct = {_label_or_number(value) for values in columns for value in values}
        if distinct == {-1.0, 1.0}:
            raise InputError(
                f"the columns {', '.join(map(safe_field, table.labels))} of {table.source} contain only -1 and 1: "
                "write 0 and 1 if they are labels, or give --kind numbers."
            )
        return "labels" if distinct <= {0.0, 1.0} else "numbers"
    return _kind_of_column(table, next(iter(table.labels)), columns[0])


def _kind_of_column(table: SequenceTable, name: str, values: Sequence[str]) -> TargetKind:
    distinct = set(values)
    numbers = sum(_is_number(value) for value in values)
    nearly_all_differ = len(distinct) > FEW_CLASSES and len(distinct) > MOST_DISTINCT_SHARE * len(values)
    if numbers < len(values) and (2 * numbers > len(values) or nearly_all_differ or _are_measurements(distinct)):
        what = (
            "nearly all of its values are distinct" if nearly_all_differ and not numbers else "other values are numbers"
        )
        raise _not_a_number(table, f"and {what}", "give --kind classes")
    if numbers < len(values):
        return "classes"
    if not _may_be_classes(distinct) or nearly_all_differ:
        return "numbers"
    if len(distinct) > MOST_GUESSED_CLASSES:
        raise InputError(
            f"the column '{safe_field(name)}' of {table.source} has {len(distinct)} different integers: "
            "say with --kind whether they are classes or numbers."
        )
    return "classes"


def _are_measurements(values: set[str]) -> bool:
    """Whether the numbers among the values are too many, or too fractional, to be names of classes."""
    numbers = {float(value) for value in values if _is_number(value)}
    return len(numbers) > FEW_CLASSES or sum(not number.is_integer() for number in numbers) > 1


def _not_a_number(table: SequenceTable, why: str, remedy: str) -> InputError:
    """The message about the first value that is neither a number nor, beside other columns, true or false."""
    is_right = _is_number if len(table.labels) == 1 else _is_label_or_number
    name, row = next(
        (name, row)
        for name, values in table.labels.items()
        for row, value in enumerate(values)
        if value is not None and not is_right(value)
    )
    value = safe_field(str(table.labels[name][row]))
    comma = "write a point for a decimal comma" if _DECIMAL_COMMA.fullmatch(value) else "correct it or write NA"
    return InputError(
        f"{table.source} has '{value}' in the column '{safe_field(name)}' of {table.places[row]}, which is not a "
        f"finite number, {why}: {comma}, or {remedy}."
    )


def _may_be_classes(values: set[str]) -> bool:
    """Whether numbers may be class names: integers, which with a decimal point must be -1 and 1 or consecutive."""
    numbers = {float(value) for value in values}
    if not all(number.is_integer() for number in numbers):
        return False
    if all(value.lstrip("+-").isdigit() for value in values) or numbers == {-1.0, 1.0}:
        return True
    return max(numbers) - min(numbers) == len(numbers) - 1


def describe_targets(table: SequenceTable, splits: Sequence[str], kind: TargetKind) -> TargetDescription:
    """Derive a target description from the training rows of a table.

    Raises:
        InputError: if a value does not fit the kind (with its place), there are fewer than two classes, a class has no
            training rows, or a column is constant in them.
    """
    columns = tuple(table.labels)
    if kind == "classes":
        if len(columns) != 1:
            raise InputError(
                f"{table.source} has {len(columns)} label columns ({', '.join(columns)}), but classes are in one: "
                "name it with --label, or give another --kind."
            )
        values = table.labels[columns[0]]
        trained = {value for value, split in zip(values, splits, strict=True) if value is not None and split == "train"}
        for value, split, place in zip(values, splits, table.places, strict=True):
            if value is not None and value not in trained:
                raise InputError(
                    f"{table.source} has the class '{value}' in {place} ({split}) but not in training: add "
                    "training rows of it or remove the row."
                )
        _refuse_two_spellings(trained, columns[0], table.source)
        if len(trained) < 2:
            missing = sum(value is None for value in values)
            also = f" ({missing} values were read as missing)" if missing else ""
            raise InputError(
                f"the column '{columns[0]}' of {table.source} has {len(trained)} class in training{also}: give two or "
                "more."
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
    for name, deviation in zip(columns, deviations, strict=True):
        if deviation < LEAST_DEVIATION:
            raise InputError(
                f"the column '{safe_field(name)}' of {table.source} varies by {deviation:.3g} in training, too little "
                "for single precision: rescale it."
            )
    return TargetDescription(kind, columns, (), tuple(map(float, means)), tuple(map(float, deviations)))


def encode_targets(table: SequenceTable, description: TargetDescription) -> Targets:
    """Encode the targets of all rows, (rows, columns); see `Targets`.

    Raises:
        InputError: if a column is missing, or a value does not fit the description.
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
            same = [name for name in description.class_names if _is_number(name) and _is_number(value)]
            same = [name for name in same if float(name) == float(value)]
            if len(same) == 1:
                numbers[row, 0] = description.class_names.index(same[0])
                continue
            raise InputError(
                f"{table.source} has the class '{value}' in {table.places[row]}, which is not one of "
                f"{', '.join(description.class_names)}."
            )
        numbers[row, 0] = description.class_names.index(value)
    return numbers


def _refuse_two_spellings(names: set[str], column: str, source: str) -> None:
    """Check that no two classes are the same number or look the same; warn of names that differ only in case.

    Examples are `1` and `1.0`, and two words of which one has an invisible character or another Unicode form.
    """
    found: dict[object, str] = {}
    for name in sorted(names):
        if len(name) > LONGEST_CLASS_NAME:
            raise InputError(
                f"the column '{safe_field(column)}' of {source} has a class name of {len(name):,} characters, which "
                f"begins with '{safe_field(name[:20])}': use at most {LONGEST_CLASS_NAME}."
            )
        looks = _as_it_looks(name)
        for what, key in (("are the same number", Decimal(name) if _is_number(name) else name), ("look alike", looks)):
            other = found.setdefault((what, key), name)
            if other != name:
                raise InputError(
                    f"the column '{safe_field(column)}' of {source} has the classes '{safe_field(other)}' and "
                    f"'{safe_field(name)}', which {what}: write them in one way."
                )
        other = found.setdefault(("case", looks.casefold()), name)
        if other != name:
            LOGGER.warning(
                "%s: the classes '%s' and '%s' of the column '%s' differ only in case and are kept apart: correct the "
                "table if they are one",
                source,
                safe_field(other),
                safe_field(name),
                safe_field(column),
            )


def _as_it_looks(name: str) -> str:
    """A name without what cannot be seen: invisible characters, and differences of blanks and of Unicode forms."""
    visible = "".join(
        letter for letter in unicodedata.normalize("NFKC", name) if unicodedata.category(letter) not in ("Cc", "Cf")
    )
    return " ".join(visible.split())


def _numbers(table: SequenceTable, columns: Sequence[str], only_labels: bool) -> Targets:
    numbers = np.full((len(table), len(columns)), math.nan)
    for which, name in enumerate(columns):
        for row, value in enumerate(table.labels[name]):
            if value is None:
                continue
            if not (_is_label_or_number(value) if only_labels else _is_number(value)):
                raise InputError(
                    f"{table.source} has '{safe_field(value)}' in the column '{safe_field(name)}' of "
                    f"{table.places[row]}, which is not a finite number: correct it or write NA."
                )
            number = _label_or_number(value)
            if abs(number) > LARGEST_NUMBER:
                raise InputError(
                    f"{table.source} has {safe_field(value)} in the column '{safe_field(name)}' of "
                    f"{table.places[row]}, beyond {LARGEST_NUMBER:g}: rescale the column."
                )
            if only_labels and number not in (0, 1):
                raise InputError(
                    f"{table.source} has {value} in the column '{name}' of {table.places[row]}, but labels are 0 or 1: "
                    "correct it, or give --kind numbers."
                )
            numbers[row, which] = number
    return numbers


def _is_number(text: str) -> bool:
    try:
        # Python reads 1_000 as a number; in a table that is a code, or a mistake.
        return "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False


def _is_label_or_number(text: str) -> bool:
    return text.lower() in _TRUTH or _is_number(text)


def _label_or_number(text: str) -> float:
    truth = _TRUTH.get(text.lower())
    return float(text) if truth is None else truth


def checked_kind(name: str) -> TargetKind:
    """Check and return a kind of targets.

    Raises:
        InputError: if the name is unknown.
    """
    if name not in TARGET_KINDS:
        raise InputError(f"there is no target kind '{name}': use {', '.join(TARGET_KINDS)} or auto.")
    return cast(TargetKind, name)
