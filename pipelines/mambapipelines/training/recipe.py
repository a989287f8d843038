"""Recipes: all settings of a training run except its data, read from YAML and checked key by key.

The package has `tiny` (seconds; tests), `demo` (the three-minute demo) and `small` (the default). A recipe holds
sizes in bases rather than in windows, so that one recipe serves every `--length`.

A task declares its own recipe as a subclass of `TrainingRecipe` with further values and sections (frozen dataclasses).
The kind of a value follows from its default: a number, an integer, true or false, a string, or a list (a tuple here).
The field's metadata has the rest: `choices` for a string or a list's entries, and `entries`, the kind of a list's
entries if the default is empty.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml

from mambacore.errors import InputError
from mambapipelines.device import PRECISIONS
from mambapipelines.training.schedules import SCHEDULES, LengthWarmup

Section = TypeVar("Section")


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW (Loshchilov & Hutter 2019) with a linear warm-up and one of the `SCHEDULES` after it.

    `cosine` decays to `final_fraction` of the peak; `plateau` multiplies the rate by `plateau_factor` whenever
    `plateau_patience` validations in a row were no better than the best, and not below `final_fraction` of the peak.
    With an `average_decay` above 0, validation and the finished model have the moving average of the weights.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    warmup_fraction: float = 0.1
    final_fraction: float = 0.02
    schedule: str = field(default="cosine", metadata={"choices": SCHEDULES})
    plateau_factor: float = 0.5
    plateau_patience: int = 3
    average_decay: float = 0.0


@dataclass(frozen=True)
class BatchRecipe:
    """Sizes of a step and of micro-batches, in bases.

    A step takes `bases_per_step / length` windows, at least `minimum_windows_per_step`; gradients are accumulated over
    micro-batches of about `bases_per_micro_batch`, because activations that stay in the cache are faster on a CPU.
    """

    bases_per_step: int = 131_072
    minimum_windows_per_step: int = 8
    bases_per_micro_batch: int = 16_384

    def windows_per_step(self, length: int) -> int:
        """Windows of `length` bases in one optimiser step."""
        return max(self.minimum_windows_per_step, self.bases_per_step // length)

    def windows_per_micro_batch(self, length: int) -> int:
        """Windows of `length` bases per micro-batch."""
        return min(self.windows_per_step(length), max(1, self.bases_per_micro_batch // length))


@dataclass(frozen=True)
class ValidationRecipe:
    """Held-out windows during training: every `every_fraction` of the run, and never more than 5 % of the work."""

    every_fraction: float = 0.05
    windows_per_class: int = 32


@dataclass(frozen=True)
class CheckpointRecipe:
    """Checkpoints to keep: the last ones, and optionally that of the best validation (0 or 1)."""

    keep_last: int = 1
    keep_best: int = 0


@dataclass(frozen=True)
class LengthRecipe:
    """Length warm-up: from `warmup_first_length`, doubled every `warmup_steps_per_stage` steps (0: no warm-up)."""

    warmup_first_length: int = 1024
    warmup_steps_per_stage: int = 0

    def warmup(self, length: int) -> LengthWarmup:
        """Return the window lengths of a run with a full length of `length` positions."""
        return LengthWarmup(self.warmup_first_length, self.warmup_steps_per_stage, length)


@dataclass(frozen=True)
class TrainingRecipe:
    """Settings of every training run; the recipe of a task adds sections.

    `minutes` is the wall time used when the command line gives neither minutes nor steps. `precision` is that of the
    linear layers in training (states, norms, heads and the optimiser stay in float32): `bfloat16`, `float32`, or
    `auto`, bfloat16 where the device multiplies in it.
    """

    # Folder of the package's recipes for the task, and the settings of its model, with defaults.
    folder: ClassVar[str] = ""
    # Earlier names of recipes: their current recipe, and sections that replace its own.
    aliases: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {}
    model_defaults: ClassVar[dict[str, Any]] = {}

    minutes: float = 40.0
    precision: str = field(default="float32", metadata={"choices": PRECISIONS})
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    length: LengthRecipe = field(default_factory=LengthRecipe)
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    checkpoints: CheckpointRecipe = field(default_factory=CheckpointRecipe)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe with all defaults, as stored with a run."""
        return asdict(self)

    def fingerprint(self) -> dict[str, Any]:
        """Return the part of the recipe that a resumed run must share with the recorded one; by default all."""
        return self.to_dict()

    def positive_values(self) -> dict[str, float]:
        """Return values of task-specific sections that must be positive, by key."""
        return {}

    @classmethod
    def from_dict(cls, content: object, source: str = "the recipe") -> Self:
        """Check a recipe and fill in defaults.

        Raises:
            InputError: if a key is unknown (with the nearest valid one), or a value has the wrong kind or is out of
                range.
        """
        content = _mapping(content, source)
        _refuse_unknown_keys(content, [item.name for item in fields(cls)], source)
        model = _mapping(content.get("model"), f"model in {source}")
        _refuse_unknown_keys(model, list(cls.model_defaults), f"model in {source}")
        values: dict[str, Any] = {
            "model": {
                key: _model_value(cls.model_defaults[key], value, f"{key} of model in {source}")
                for key, value in model.items()
            }
        }
        for item in fields(cls):
            kind = item.default_factory
            if isinstance(kind, type) and is_dataclass(kind):
                values[item.name] = _section(kind, content.get(item.name), f"{item.name} in {source}")
            elif item.name in content and item.name not in values:
                values[item.name] = _value(item, content[item.name], f"{item.name} in {source}")
        recipe = cls(**values)
        _check_ranges(recipe, source)
        return recipe


AnyRecipe = TypeVar("AnyRecipe", bound=TrainingRecipe)


def recipe_names(folder: str) -> list[str]:
    """Return the names of the package's recipes for a task."""
    entries = (files("mambapipelines") / "recipes" / folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_task_recipe(kind: type[AnyRecipe], name_or_path: str, changes: Sequence[str] = ()) -> AnyRecipe:
    """Load a recipe by name, or from a YAML file.

    Args:
        kind: the task's class of recipes.
        name_or_path: a name of `recipe_names` or a file.
        changes: values that replace the recipe's, each written `section.key=value` with the value in YAML.

    Raises:
        InputError: neither a recipe's name nor a readable file, not YAML, a change that is none, or content that
            `TrainingRecipe.from_dict` refuses.
    """
    now, sections = kind.aliases.get(name_or_path, (name_or_path, {}))
    content, source = _recipe_content(now, kind.folder)
    if sections:
        content, source = {**_mapping(content, source), **sections}, f"recipe {name_or_path}"
    if not changes:
        return kind.from_dict(content, source)
    changed = copy.deepcopy(dict(_mapping(content, source)))
    for change in changes:
        _apply(change, changed)
    return kind.from_dict(changed, f"{source} with --set {' --set '.join(changes)}")


def recipe_text(recipe: TrainingRecipe) -> str:
    """Return a recipe as YAML with all values, including those of the model; `load_task_recipe` is the inverse."""
    content = recipe.to_dict() | {"model": recipe.model_defaults | recipe.model}
    return yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False)


def _apply(change: str, content: dict[str, Any]) -> None:
    """Set one `section.key=value` in a recipe's content; the key is checked later."""
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {change!r} is not of the form key=value: write for example --set model.layers=8")
    try:
        value = _parsed(text)
    except yaml.YAMLError as error:
        raise InputError(f"the value of --set {change!r} is not valid YAML: put it in quotes") from error
    place = content
    for depth, key in enumerate(keys[:-1]):
        inner = place.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise InputError(f"--set {change!r}: {'.'.join(keys[: depth + 1])} is a value, not a section of the recipe")
        place[key] = {} if inner is None else inner
        place = place[key]
    place[keys[-1]] = value


def _recipe_content(name_or_path: str, folder: str) -> tuple[object, str]:
    """Return the unchecked content of a recipe's YAML, and its name in messages."""
    if name_or_path in recipe_names(folder):
        text = (files("mambapipelines") / "recipes" / folder / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        return _parsed(text), f"recipe {name_or_path}"
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(
            f"there is no recipe and no file named {name_or_path!r}: "
            f"give a YAML file or one of {', '.join(recipe_names(folder))}"
        )
    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read ({error}): give a readable YAML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {path} is not UTF-8 text: save it as UTF-8") from error
    except yaml.YAMLError as error:
        place, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" at line {place.line + 1}" if place is not None else ""
        reason = f" ({problem})" if problem else ""
        raise InputError(f"the recipe {path} is not valid YAML{line}{reason}: correct the file") from error
    return content, f"recipe {path}"


class _Loader(yaml.SafeLoader):
    """Reads YAML in which no mapping has a key twice: of two values, PyYAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, unless it has a key twice."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} twice", problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(text: str) -> object:
    """Parse YAML.

    Raises:
        yaml.YAMLError: if it is not valid, nested too deeply, or has a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="nested too deeply") from error


def _mapping(content: object, source: str) -> Mapping[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{source} must be a mapping of keys to values, not {type(content).__name__}: indent its keys")
    return content


def _refuse_unknown_keys(content: Mapping[str, Any], valid_keys: list[str] | tuple[str, ...], source: str) -> None:
    for key in content:
        if key in valid_keys:
            continue
        nearest = difflib.get_close_matches(str(key), valid_keys, n=1, cutoff=0.5)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys are {', '.join(valid_keys)}"
        raise InputError(f"unknown key {key!r} in {source}: {remedy}")


def _number(value: object, kind: type, source: str) -> Any:
    """Convert `value` to `kind`; YAML 1.1 reads numbers such as `3e-3`, without a dot, as text."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (kind is int and number != int(number)):
        wanted = "an integer" if kind is int else "a number"
        raise InputError(f"{source} must be {wanted}, not {value!r}: correct the recipe")
    return kind(number)


def _section(section: type[Section], content: object, source: str) -> Section:
    """Parse a section of a recipe, with values of the kind of their defaults."""
    values = _mapping(content, source)
    items = {item.name: item for item in fields(section)}  # type: ignore[arg-type]
    _refuse_unknown_keys(values, list(items), source)
    return section(**{key: _value(items[key], value, f"{key} of {source}") for key, value in values.items()})


def _model_value(default: Any, value: object, source: str) -> Any:
    """Parse a setting of a model: a number or a switch as its default is, else words, lists and mappings of these."""
    if isinstance(default, bool):
        return _entry(value, bool, (), source)
    if isinstance(default, (int, float)):
        return _number(value, type(default), source)
    if isinstance(default, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{source} must be a list, not {value!r}: write [a, b] in the recipe")
        return [_number(entry, int, f"entry {number} of {source}") for number, entry in enumerate(value, 1)]
    _require_plain(value, source)
    return value


def _require_plain(value: object, source: str) -> None:
    """Check that a value can be kept in a model's configuration: YAML has dates and sets, JSON has not."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            _require_plain(entry, source)
    elif isinstance(value, dict):
        for key, entry in value.items():
            _require_plain(entry, f"{key} of {source}")
    elif not isinstance(value, (str, int, float, type(None))) or str(value) in ("nan", "inf", "-inf"):
        raise InputError(f"{source} must be a number, a word, a list or a mapping, not {value!r}: correct the recipe")


def _value(item: Field[Any], value: object, source: str) -> Any:
    """Parse a value of the kind of its field's default; see the module docstring."""
    default, choices = item.default, tuple(item.metadata.get("choices", ()))
    if not isinstance(default, tuple):
        return _entry(value, type(default), choices, source)
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{source} must be a list, not {value!r}: write [a, b] in the recipe")
    kind = item.metadata.get("entries") or type(default[0])
    return tuple(_entry(entry, kind, choices, f"entry {number} of {source}") for number, entry in enumerate(value, 1))


def _entry(value: object, kind: type, choices: tuple[str, ...], source: str) -> Any:
    """Parse a number, a string, or true or false."""
    if kind is bool:
        if not isinstance(value, bool):
            raise InputError(f"{source} must be true or false, not {value!r}: correct the recipe")
        return value
    if kind is not str:
        return _number(value, kind, source)
    if choices and value not in choices:
        raise InputError(f"{source} must be one of {', '.join(choices)}, not {value!r}: correct the recipe")
    if not isinstance(value, str):
        raise InputError(f"{source} must be a word, not {value!r}: put it in quotes")
    return value


def _check_ranges(recipe: TrainingRecipe, source: str) -> None:
    """Check the ranges of values; messages name the key and the valid range."""
    optimizer = recipe.optimizer
    positive: dict[str, float] = {
        "minutes": recipe.minutes,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.gradient_clip": optimizer.gradient_clip,
    }
    positive |= {f"batch.{key}": value for key, value in asdict(recipe.batch).items()}
    positive |= {f"validation.{key}": value for key, value in asdict(recipe.validation).items()}
    positive |= recipe.positive_values()
    positive["optimizer.plateau_factor"] = optimizer.plateau_factor
    positive["optimizer.plateau_patience"] = optimizer.plateau_patience
    positive["length.warmup_first_length"] = recipe.length.warmup_first_length
    positive["checkpoints.keep_last"] = recipe.checkpoints.keep_last
    for key, value in positive.items():
        if value <= 0:
            raise InputError(f"{key} in {source} must be greater than 0, not {value}: correct the recipe")
    fractions = {
        "optimizer.beta1": optimizer.beta1,
        "optimizer.beta2": optimizer.beta2,
        "optimizer.warmup_fraction": optimizer.warmup_fraction,
        "optimizer.final_fraction": optimizer.final_fraction,
        "optimizer.plateau_factor": optimizer.plateau_factor,
        "optimizer.average_decay": optimizer.average_decay,
    }
    for key, value in fractions.items():
        if not 0 <= value < 1:
            raise InputError(f"{key} in {source} must be at least 0 and below 1, not {value}: correct the recipe")
    not_negative = {
        "optimizer.weight_decay": optimizer.weight_decay,
        "length.warmup_steps_per_stage": recipe.length.warmup_steps_per_stage,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise InputError(f"{key} in {source} must not be negative, but is {value}: correct the recipe")
    if recipe.checkpoints.keep_best not in (0, 1):
        raise InputError(f"checkpoints.keep_best in {source} must be 0 or 1: correct the recipe")
