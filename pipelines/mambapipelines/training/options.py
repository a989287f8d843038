"""What a training run is asked to do, which mistakes in that are refused, and what a resumed run must share with it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from genomamba.data.genomes import GenomeCollection, GenomeSequence, GenomeSpecification
from mambacore.errors import InputError
from mambacore.model_folder import CONFIG_NAME
from mambapipelines.training.ranks import check_strategy
from mambapipelines.training.recipe import Recipe, TrainingRecipe
from mambapipelines.training.state import RunFolder

RUN_FOLDER_NAME = "training"
# Sequences of the same name and length but other bases are told apart by the checksum of both ends.
CHECKSUM_BASES = 4096


class RunOptions(Protocol):
    """What every training run is asked, whatever it learns; `TrainingOptions` says what each means."""

    @property
    def length(self) -> int: ...
    @property
    def output(self) -> Path: ...
    @property
    def minutes(self) -> float | None: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def resume(self) -> bool: ...
    @property
    def threads(self) -> int | None: ...


@dataclass(frozen=True)
class TrainingOptions:
    """What `genomamba train` is asked to do.

    Attributes:
        genomes: one specification (class name and FASTA paths) per class, at least two.
        length: length of a training window in bases.
        output: the folder that becomes the model folder; its subfolder `training` holds the state of the run.
        holdout: names of sequences that are never trained on; held-out accuracy and calibration come from them.
        minutes: wall time of the whole run in minutes; `None` takes the recipe's unless `steps` is given.
        steps: number of optimiser steps instead of a wall time.
        recipe: name of a recipe of the package, or path of a YAML file.
        changes: values that replace the recipe's, each written `section.key=value`.
        seed: everything random is a function of this seed and an index.
        resume: continue the run recorded in `output`; where there is none, one is started.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        start_from: a pretrained causal language model (folder or `hf://...`) whose shape and weights the classifier
            takes; `None` starts from random weights of the recipe's shape.
        strategy: how several processes share the work, one of `mambapipelines.training.ranks.STRATEGIES`.
    """

    genomes: Sequence[GenomeSpecification]
    length: int
    output: Path
    holdout: Sequence[str] = ()
    minutes: float | None = None
    steps: int | None = None
    recipe: str = "small"
    changes: Sequence[str] = ()
    seed: int = 0
    resume: bool = False
    threads: int | None = None
    start_from: str | None = None
    strategy: str = "single"


def check_options(options: RunOptions, unit: str = "bases") -> None:
    """Refuse numbers that make no sense before any file is read; `unit` is what a length is counted in."""
    if options.length < 1:
        raise InputError(f"--length is {options.length} {unit}: use 1 or more.")
    if options.minutes is not None and options.steps is not None:
        raise InputError("--minutes and --steps are both given: leave one of them out.")
    if options.minutes is not None and not (options.minutes > 0 and math.isfinite(options.minutes)):
        raise InputError(f"--minutes is {options.minutes}: use a number greater than 0.")
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps is {options.steps}: use a number of 1 or more.")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads is {options.threads}: use a number of 1 or more.")
    check_strategy(*strategy_of(options))


def strategy_of(options: RunOptions) -> tuple[str, int]:
    """How processes share the run, and how many share each sequence: one process where a command does not ask."""
    return getattr(options, "strategy", "single"), getattr(options, "context_ranks", 1)


def check_output(options: RunOptions, run: RunFolder) -> None:
    """Refuse an output folder with something in it that is not the run to resume."""
    output = options.output
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file: give a folder as --output.")
    if run.holds_a_run():
        if not options.resume:
            raise InputError(f"{output} holds a training run already: add --resume or choose another --output.")
        return
    if (output / CONFIG_NAME).exists():
        raise InputError(f"{output} holds a model and no training run to resume: choose another --output.")
    # A run that was stopped before its first state leaves the folder `training` and nothing to resume.
    if output.is_dir() and any(entry.name != RUN_FOLDER_NAME for entry in output.iterdir()):
        raise InputError(f"the output folder {output} is not empty: choose another --output.")


def run_fingerprint(options: TrainingOptions, recipe: Recipe, genomes: GenomeCollection) -> dict[str, Any]:
    """What the numbers of a run depend on, JSON-able; the keys are what the user would call them."""
    sequences: dict[str, list[list[Any]]] = {name: [] for name in genomes.class_names}
    for sequence in genomes.sequences:
        sequences[sequence.class_name].append(sequence_identity(sequence))
    content = {
        "--length": options.length,
        "--holdout": sorted(set(options.holdout)),
        "--seed": options.seed,
        "--steps": options.steps,
        "--minutes": planned_minutes(options, recipe),
        "classes": list(genomes.class_names),
        "sequences": sequences,
        "recipe": recipe.to_dict(),
    }
    return json.loads(json.dumps(content))


def sequence_identity(sequence: GenomeSequence) -> list[Any]:
    """What tells a sequence from another: name, length, and the checksum of both ends."""
    head = sequence.tokens(0, min(CHECKSUM_BASES, sequence.length))
    tail = sequence.tokens(max(0, sequence.length - CHECKSUM_BASES), sequence.length)
    return [sequence.name, sequence.length, zlib.crc32(tail.tobytes(), zlib.crc32(head.tobytes()))]


def planned_minutes(options: RunOptions, recipe: TrainingRecipe) -> float | None:
    """Wall time that a run is planned for; `None` when its number of steps is given."""
    if options.steps is not None:
        return None
    return options.minutes if options.minutes is not None else recipe.minutes


def refuse_other_run(recorded: dict[str, Any], given: dict[str, Any], output: Path) -> None:
    """Raise `InputError` that names the first difference between two fingerprints."""
    difference = _first_difference(recorded, given)
    if difference is not None:
        raise InputError(
            f"cannot resume the run in {output}: {difference}; give the same as before or choose another --output."
        )


def _first_difference(recorded: dict[str, Any], given: dict[str, Any], prefix: str = "") -> str | None:
    for key in {**recorded, **given}:
        before, now = recorded.get(key), given.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _first_difference(before, now, f"{prefix}{key}.")
        if prefix == "sequences.":
            return f"the sequences of class '{key}' are not the ones it was started with"
        if prefix == "" and key == "reference":
            return "the sequences of --reference are not the ones it was started with"
        return f"{prefix}{key} was {_shown(before)} and is now {_shown(now)}"
    return None


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    return "not given" if value is None else str(value)
