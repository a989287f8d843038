"""Labels of clips: named sets such as digit and speaker, read from file names or from a table.

A model that is conditioned on labels stores its label sets. Internally a label is its number in its set; 0
(`UNLABELLED`) means unspecified, so a model can be conditioned on some of its label sets, or on none.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mambacore.errors import InputError

UNLABELLED: Final = 0
"""Label number for "unspecified"; the values of a set are numbered from 1."""

EVERY_VALUE: Final = "each"
"""Given as a value: clips cycle through the values of the set."""

WORD_RULE: Final = r"word=^([^/]+)/"
"""The label set of Speech Commands' words: the folder of each clip."""

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_MOST_VALUES: Final = 4096


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """A named set of labels that a model is conditioned on.

    Attributes:
        name: name of the set, such as `digit`.
        values: the values, numbered from 1 in this order.

    Raises:
        InputError: if the name is not a word, or the values are empty or repeated.
    """

    name: str
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InputError(f"{self.name!r} cannot be the name of a label set; use letters, digits, '_' and '-'")
        if not isinstance(self.values, tuple | list) or not all(isinstance(one, str) and one for one in self.values):
            raise InputError(
                f"the values of label set {self.name} are not a list of words; the model folder is damaged"
            )
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values or len(set(self.values)) != len(self.values):
            raise InputError(f"label set {self.name} has no values or repeated values; the model folder is damaged")

    def number(self, value: str) -> int:
        """Return the number of a value.

        Raises:
            InputError: if the set does not have the value.
        """
        if value not in self.values:
            raise InputError(f"{self.name} has no value {value!r}; choose {_listed(self.values)}")
        return self.values.index(value) + 1

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `LabelSet(**values)` is the inverse."""
        return {"name": self.name, "values": list(self.values)}


@dataclasses.dataclass(frozen=True)
class ClipLabels:
    """Labels of the clips of a folder, one column per label set.

    Attributes:
        names: names of the sets.
        columns: for each set, the value of every labelled clip, by its path within the folder.
    """

    names: tuple[str, ...] = ()
    columns: tuple[Mapping[str, str], ...] = ()

    def sets(self, training_clips: Iterable[str]) -> tuple[LabelSet, ...]:
        """Return the label sets, with the values that occur in the training clips, in sorted order."""
        clips = list(training_clips)
        found = []
        for name, column in zip(self.names, self.columns, strict=True):
            values = sorted({column[clip] for clip in clips if clip in column})
            if not values:
                raise InputError(f"no training clip has a label {name!r}; correct --labels")
            if len(values) > _MOST_VALUES:
                raise InputError(f"{name} has {len(values)} values, most of them for one clip only; correct --labels")
            found.append(LabelSet(name, tuple(values)))
        return tuple(found)

    def numbers(self, clip: str, sets: Sequence[LabelSet]) -> tuple[int, ...]:
        """Return the number of a clip's label in each set, `UNLABELLED` if it has none or the set lacks it."""
        columns = dict(zip(self.names, self.columns, strict=True))
        values = [columns.get(one.name, {}).get(clip) for one in sets]
        return tuple(
            one.number(value) if value is not None and value in one.values else UNLABELLED
            for one, value in zip(sets, values, strict=True)
        )


def read_clip_labels(rules: Sequence[str], names: Sequence[str]) -> ClipLabels:
    """Label the clips of a folder by rules.

    Args:
        rules: each is `NAME=REGEX`, whose first group is the label, searched for in the file's name, or in the path
            within the folder if the expression contains a '/'; or a tab-separated table with a header, whose first
            column has paths within the folder (or file names) and whose other columns are label sets.
        names: paths of the clips within the folder.

    Raises:
        InputError: if a rule has another form, an expression has no group or matches nothing, a table is unreadable,
            repeats clips or has none of these, or two sets have the same name.
    """
    columns: dict[str, Mapping[str, str]] = {}
    for rule in rules:
        name, equals, pattern = rule.partition("=")
        if equals and _NAME.fullmatch(name):
            found: dict[str, Mapping[str, str]] = {name: _by_expression(name, pattern, names)}
        elif Path(rule).is_file():
            found = _by_table(Path(rule), names)
        else:
            raise InputError(
                f"--labels {rule!r} is neither NAME=REGEX, such as 'digit=^([0-9])_', nor a table that exists"
            )
        for one in found:
            if one in columns:
                raise InputError(f"--labels defines {one!r} twice; give each label set once")
        columns |= found
    return ClipLabels(tuple(columns), tuple(columns.values()))


def parse_labels(texts: Sequence[str], sets: Sequence[LabelSet], option: str = "--label") -> dict[str, str]:
    """Parse `NAME=VALUE` texts to a mapping, checked against the label sets of a model.

    Raises:
        InputError: if a text has another form, the model lacks a set or value, or a set is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{option} {text!r} is not of the form NAME=VALUE, such as digit=7")
        if name in found:
            raise InputError(
                f"{option} gives {name} twice; give it once, or {name}={EVERY_VALUE} to cycle through all values"
            )
        found[name] = value
    check_labels(found, sets)
    return found


def check_labels(labels: Mapping[str, str], sets: Sequence[LabelSet]) -> None:
    """Check that a model has these labels.

    Raises:
        InputError: if it does not; the message lists those it has.
    """
    known = {one.name: one for one in sets}
    for name, value in labels.items():
        if not known:
            raise InputError("the model was trained without labels; leave them out")
        if name not in known:
            raise InputError(f"the model has no labels {name!r}; it has {_listed(list(known))}")
        if value != EVERY_VALUE:
            known[name].number(value)


def labels_of_clip(labels: Mapping[str, str], sets: Sequence[LabelSet], number: int) -> dict[str, str]:
    """Return the labels of clip `number`; `EVERY_VALUE` cycles through the values, the last such set fastest."""
    found: dict[str, str] = {}
    for one in reversed(sets):
        if one.name not in labels:
            continue
        value = labels[one.name]
        if value == EVERY_VALUE and value not in one.values:
            number, position = divmod(number, len(one.values))
            value = one.values[position]
        found[one.name] = value
    return {one.name: found[one.name] for one in sets if one.name in found}


def label_numbers(labels: Mapping[str, str], sets: Sequence[LabelSet]) -> tuple[int, ...]:
    """Return the label number for each set, `UNLABELLED` where none is given.

    Raises:
        InputError: if a set or value does not exist.
    """
    check_labels(labels, sets)
    return tuple(one.number(labels[one.name]) if one.name in labels else UNLABELLED for one in sets)


def _by_expression(name: str, pattern: str, names: Sequence[str]) -> dict[str, str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"the expression of --labels {name}={pattern} is not valid ({error}); correct it") from error
    if expression.groups < 1:
        raise InputError(
            f"the expression of --labels {name}={pattern} has no group; put the label in parentheses: '^([0-9])_'"
        )
    found = {}
    for clip in names:
        match = expression.search(clip if "/" in pattern else PurePosixPath(clip).name)
        if match is not None and match.group(1):
            found[clip] = match.group(1)
    if not found:
        example = f", such as {names[0]}" if names else ""
        raise InputError(f"the expression of --labels {name}={pattern} matches no clip{example}; correct it")
    return found


def _by_table(path: Path, names: Sequence[str]) -> dict[str, Mapping[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = list(csv.reader(stream, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the table of labels {path} cannot be read ({error}); write it as UTF-8") from error
    rows = [[cell.strip() for cell in line] for line in lines if any(cell.strip() for cell in line)]
    if len(rows) < 2 or len(rows[0]) < 2:
        raise InputError(f"{path} is not a table of labels; write a header, clip and label sets, separated by tabs")
    header = rows[0]
    for name in header[1:]:
        LabelSet(name, ("x",))
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise InputError(f"row {number} of {path} has {len(row)} columns, the header {len(header)}; correct it")
    by_path = {name: name for name in names}
    counts = Counter(PurePosixPath(name).name for name in names)
    by_name = {PurePosixPath(name).name: name for name in names if counts[PurePosixPath(name).name] == 1}
    columns: dict[str, dict[str, str]] = {name: {} for name in header[1:]}
    seen: set[str] = set()
    for row in rows[1:]:
        listed = row[0].replace("\\", "/").removeprefix("./")
        clip = by_path.get(listed) or by_name.get(listed)
        if clip is None:
            continue
        if clip in seen:
            raise InputError(f"{path} labels {clip} twice; give each clip one row")
        seen.add(clip)
        for name, value in zip(header[1:], row[1:], strict=True):
            if value:
                columns[name][clip] = value
    if not seen:
        raise InputError(f"{path} labels none of the {len(names)} clips; its first column must contain their paths")
    return dict(columns)


def _listed(values: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
