"""Reading and writing of settings in foreign configurations, by the tables of `names`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mambacore.checkpoints.names import COMBINATIONS, REQUIRED, Family
from mambacore.errors import InputError

_ABSENT = object()


def read_settings(config: Mapping[str, Any], family: Family, source: object) -> dict[str, Any]:
    """Read our settings from a foreign configuration.

    Args:
        config: the foreign `config.json`.
        family: its family.
        source: name of the configuration in messages.

    Raises:
        InputError: if keys are missing, of the wrong kind, or have unsupported values; all are listed.
    """
    missing, wrong, refused = [], [], []
    settings = {}
    for ours, key in family.keys.items():
        value = _find(config, key.name)
        if value is _ABSENT:
            if key.default is REQUIRED:
                missing.append(key.name)
                continue
            value = key.default
        try:
            settings[ours] = _READERS[key.kind](value)
        except ValueError as error:
            wrong.append(f"{key.name} as {value!r}, which is not {error}")
    for name, rule in family.refused.items():
        value = _find(config, name)
        if value is not _ABSENT and value not in rule.accepted:
            refused.append(f"{name} as {value!r}, but {rule.reason}")
    known = {key.name for key in family.keys.values()} | family.ignored
    nested = {name.split(".")[0] for name in known if "." in name}
    unknown = sorted(name for name in _nested_names(config, nested) if name not in known)
    problems = [
        *([f"lacks {', '.join(missing)}"] if missing else []),
        *([f"has {', '.join(wrong)}"] if wrong else []),
        *([f"has {'; and '.join(refused)}"] if refused else []),
        *([f"has {', '.join(unknown)}, which are not supported"] if unknown else []),
    ]
    if problems:
        raise InputError(
            f"{source} cannot be used as a {family.title} configuration, it {', and it '.join(problems)}: "
            "correct it or choose another checkpoint."
        )
    return settings


def write_settings(settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the foreign configuration of our settings."""
    config: dict[str, Any] = copy.deepcopy(dict(family.constants))
    for ours, key in family.keys.items():
        value = _WRITERS.get(key.kind, lambda same: same)(settings[ours])
        if value is _ABSENT:
            continue
        *outer, last = key.name.split(".")
        level = config
        for name in outer:
            level = level.setdefault(name, {})
        level[last] = value
    return config


def _find(config: Mapping[str, Any], dotted: str) -> Any:
    """Return the value of a dotted key, or _ABSENT; null counts as an empty level."""
    level: Any = config
    for name in dotted.split("."):
        if not isinstance(level, Mapping) or name not in level:
            return _ABSENT
        level = level[name]
    return level


def _nested_names(config: Mapping[str, Any], levels: set[str]) -> Iterator[str]:
    for outer in levels:
        inner = config.get(outer) or {}
        if not isinstance(inner, Mapping):
            yield outer
            continue
        yield from (f"{outer}.{name}" for name in inner)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("a positive integer")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError("a positive number")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _rank(value: Any) -> int | None:
    if value == "auto":
        return None
    try:
        return _whole(value)
    except ValueError:
        raise ValueError('a positive integer or "auto"') from None


def _limits(value: Any) -> tuple[float, float] | None:
    """Parse two increasing numbers; None if they are no limits. transformers writes infinity as a mapping."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("two numbers")
    found: list[Any] = [next(iter(one.values()), None) if isinstance(one, Mapping) else one for one in value]
    try:
        smallest, largest = (float(one) for one in found)
    except (TypeError, ValueError):
        raise ValueError("two numbers") from None
    if not 0 <= smallest < largest:
        raise ValueError("two increasing non-negative numbers")
    return None if (smallest, largest) == (0.0, float("inf")) else (smallest, largest)


def _written_limits(limits: tuple[float, float] | None) -> Any:
    """Return the limits to write, omitted if they are no limits, which is the default everywhere."""
    return _ABSENT if limits is None else list(limits)


def _strategy(value: Any) -> str:
    value = "add" if value is None else value
    if not isinstance(value, str) or value not in COMBINATIONS:
        raise ValueError(f"one of {', '.join(COMBINATIONS)}")
    return COMBINATIONS[value]


def _map(value: Any) -> tuple[int, ...] | None:
    """Parse a map from token to token, whatever the order of its entries.

    JSON keys are strings, and programs that sort them put "10" before "2".
    """
    if value is None:
        return None
    try:
        numbered = {int(token): _token(other) for token, other in value.items()}
        return tuple(numbered[token] for token in range(len(value)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("a map from every token 0, 1, ... to a token") from None


def _token(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return value


_READERS: dict[str, Callable[[Any], Any]] = {
    "whole": _whole,
    "number": _number,
    "flag": _flag,
    "rank": _rank,
    "strategy": _strategy,
    "map": _map,
    "limits": _limits,
}
_WRITERS: dict[str, Callable[[Any], Any]] = {
    "limits": _written_limits,
    "strategy": {ours: theirs for theirs, ours in COMBINATIONS.items()}.__getitem__,
    "map": lambda table: None if table is None else {str(token): other for token, other in enumerate(table)},
}
