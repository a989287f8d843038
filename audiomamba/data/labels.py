"""Labels of clips: named sets such as digit and speaker, read from file names or from a table.

A model that is conditioned on labels stores its label sets. Inside, a label is its number in its set; 0 means that
nothing is said (`UNLABELLED`), so a model can be asked for one label of several, or for none.
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
"""Number of the label that says nothing; the values of a set have the numbers from 1 on."""

EVERY_VALUE: Final = "each"
"""Asked for as a value, the clips take the values of the set in turn."""

WORD_RULE: Final = r"word=^([^/]+)/"
"""The words of Speech Commands: the folder of each clip."""

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_MOST_VALUES: Final = 4096


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """A named set of labels that a model is conditioned on.

    Attributes:
        name: such as `digit`.
        values: in the order of their numbers, the first of which is 1.

    Raises:
        InputError: a name that is not a word, no values, or the same value twice.
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
            raise InputError(f"label set {self.name} has no values, or one of them twice; the model folder is damaged")

    def number(self, value: str) -> int:
        """The number of a value.

        Raises:
            InputError: the set does not have it.
        """
        if value not in self.values:
            raise InputError(f"{self.name} has no value {value!r}; choose {_listed(self.values)}")
        return self.values.index(value) + 1

    def to_config(self) -> dict[str, Any]:
        """JSON-able; `LabelSet(**values)` reads it back."""
        return {"name": self.name, "values": list(self.values)}


@dataclasses.dataclass(frozen=True)
class ClipLabels:
    """What the clips of a folder are labelled with, one column per label set.

    Attributes:
        names: of the sets.
        columns: for each set, the value of every clip that has one, by its path within the folder.
    """

    names: tuple[str, ...] = ()
    columns: tuple[Mapping[str, str], ...] = ()

    def sets(self, training_clips: Iterable[str]) -> tuple[LabelSet, ...]:
        """The label sets with the values that occur among the clips to train on, in the order of their names."""
        clips = list(training_clips)
        found = []
        for name, column in zip(self.names, self.columns, strict=True):
            values = sorted({column[clip] for clip in clips if clip in column})
            if not values:
                raise InputError(f"no clip to train on has a label {name!r}; correct --labels")
            if len(values) > _MOST_VALUES:
                raise InputError(f"{name} has {len(values)} values, most of them of one clip; correct --labels")
            found.append(LabelSet(name, tuple(values)))
        return tuple(found)

    def numbers(self, clip: str, sets: Sequence[LabelSet]) -> tuple[int, ...]:
        """The number of a clip's label in each set, `UNLABELLED` where it has none that the set knows."""
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
            within the folder where the expression contains a '/'; or a tab-separated table with a header, whose first
            column has paths within the folder (or file names) and whose other columns are label sets.
        names: paths of the clips within the folder.

    Raises:
        InputError: a rule that is neither, an expression without a group or that matches nothing, a table that cannot
            be read or that names clips twice or none of these, or two sets of the same name.
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
                raise InputError(f"two of --labels define {one!r}; give each label set once")
        columns |= found
    return ClipLabels(tuple(columns), tuple(columns.values()))


def parse_labels(texts: Sequence[str], sets: Sequence[LabelSet], option: str = "--label") -> dict[str, str]:
    """`NAME=VALUE` texts as a mapping, checked against the label sets of a model.

    Raises:
        InputError: another form, a set or value that the model does not have, or a set twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{option} {text!r} is not of the form NAME=VALUE, such as digit=7")
        if name in found:
            raise InputError(f"{option} gives {name} twice; give it once, or {name}={EVERY_VALUE} for all in turn")
        found[name] = value
    check_labels(found, sets)
    return found


def check_labels(labels: Mapping[str, str], sets: Sequence[LabelSet]) -> None:
    """Refuse labels that a model does not have.

    Raises:
        InputError: naming what there is.
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
    """The labels of clip `number`: `EVERY_VALUE` becomes the values in turn, the last such set changing fastest."""
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
    """The number of each set's label, `UNLABELLED` where none is given.

    Raises:
        InputError: a set or value that there is not.
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
        raise InputError(f"{path} labels none of the {len(names)} clips; its first column must have their paths")
    return dict(columns)


def _listed(values: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
