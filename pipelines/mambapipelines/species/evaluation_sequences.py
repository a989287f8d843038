"""Selection of test sequences for a model, and of training sequences for its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genomamba.classification.holdouts import OffsetStore, cut
from genomamba.data.genomes import GenomeCollection, GenomeSequence, GenomeSpecification, load_genomes
from mambacore.errors import InputError
from mambapipelines.console import counted, note


def in_class_order(genomes: GenomeCollection, class_names: Sequence[str]) -> GenomeCollection:
    """The same genomes with the model's labels.

    Raises:
        InputError: if the genomes and the model do not have the same classes.
    """
    unknown = [name for name in genomes.class_names if name not in class_names]
    absent = [name for name in class_names if name not in genomes.class_names]
    if unknown:
        raise InputError(f"the model has no class '{unknown[0]}': its classes are {', '.join(class_names)}.")
    if absent:
        raise InputError(f"no genome is given for the model's class '{absent[0]}': add --genome {absent[0]}=PATH.")
    return GenomeCollection(tuple(class_names), genomes.sequences)


def select_test_sequences(genomes: GenomeCollection, details: Mapping[str, Any]) -> GenomeCollection:
    """Select the sequences that a model may be tested on: held out from its training, or new to it.

    Raises:
        InputError: if a class has none.
    """
    holdout = set(details.get("holdout", ()))
    stretches = _stretches(details, "held_out")
    seen = {key for key in _manifest_sequences(details) if key[1] not in holdout}
    test: list[GenomeSequence] = []
    for path in dict.fromkeys((sequence.class_name, sequence.path) for sequence in genomes.sequences):
        sequences = [sequence for sequence in genomes.sequences if (sequence.class_name, sequence.path) == path]
        held_out = [sequence for sequence in sequences if sequence.name in holdout]
        held_out += [part for sequence in sequences for part in _parts(sequence, stretches)]
        if held_out:
            test += held_out
        elif not any(_key(sequence) in seen for sequence in sequences):
            note(f"{path[1]} has no held-out sequence and was not trained on: all of it is used for testing")
            test += sequences
    for class_name in genomes.class_names:
        if all(sequence.class_name != class_name for sequence in test):
            raise InputError(
                f"the model was trained on all sequences given for class '{class_name}': give --genome {class_name}="
                + (f"PATH with {' or '.join(sorted(holdout))}" if holdout else "PATH of a genome it has not seen")
                + "."
            )
    return GenomeCollection(genomes.class_names, tuple(test))


def find_training_sequences(
    genomes: GenomeCollection, training_genomes: Sequence[GenomeSpecification], details: Mapping[str, Any]
) -> GenomeCollection:
    """Find the sequences that the model was trained on.

    They are searched for in `training_genomes`, then in `genomes`, then at the paths in the model folder, and
    recognised by class, name and length.

    Raises:
        InputError: if some are missing.
    """
    holdout = set(details.get("holdout", ()))
    wanted = [key for key in _manifest_sequences(details) if key[1] not in holdout]
    if not wanted:
        raise InputError(
            "the model folder does not list its training sequences, which the baselines need: use --baseline none."
        )
    given = load_genomes(training_genomes)
    found: dict[tuple[str, str, int], list[GenomeSequence]] = {}
    for sequence in (*given.sequences, *genomes.sequences):
        found.setdefault(_key(sequence), []).append(sequence)
    missing = _missing(wanted, found)
    for entry in details["manifest"]:
        keys = {(entry["class"], record["name"], record["length"]) for record in entry["sequences"]}
        if keys & missing and Path(entry["path"]).is_file():
            for sequence in load_genomes([GenomeSpecification(entry["class"], (entry["path"],))]).sequences:
                found.setdefault(_key(sequence), []).append(sequence)
    missing = _missing(wanted, found)
    if missing:
        class_name, name, _ = min(missing)
        path = next(
            entry["path"]
            for entry in details["manifest"]
            if entry["class"] == class_name and any(record["name"] == name for record in entry["sequences"])
        )
        raise InputError(
            f"training sequence '{name}' of class '{class_name}', which the baselines need, is neither in {path} "
            f"nor in the files given: add --training-genome {class_name}=PATH[,PATH...], or use --baseline none."
        )
    taken: list[GenomeSequence] = []
    for key in wanted:
        # Two files may hold records of one name and length; each stands for one entry of the manifest.
        taken.append(found[key].pop(0) if len(found[key]) > 1 else found[key][0])
    stretches = _stretches(details, "training")
    if stretches:
        taken = [part for sequence in taken for part in _parts(sequence, stretches)]
    return GenomeCollection(genomes.class_names, tuple(taken))


def genomes_of_model(details: Mapping[str, Any]) -> list[GenomeSpecification]:
    """Return the genomes that a model was trained on, at their original paths.

    Raises:
        InputError: if a file no longer exists, or nothing was held out.
    """
    paths: dict[str, list[str]] = {}
    for entry in details.get("manifest", ()):
        paths.setdefault(entry["class"], []).append(entry["path"])
    if not details.get("holdout") and not _stretches(details, "held_out"):
        raise InputError(
            "the model has no held-out sequence to be evaluated on: give --genome NAME=PATH for each class."
        )
    for name, of_class in paths.items():
        for path in of_class:
            if not Path(path).is_file():
                raise InputError(
                    f"{path}, which class '{name}' was trained on, no longer exists: give --genome NAME=PATH for "
                    "each class."
                )
    return [GenomeSpecification(name, tuple(of_class)) for name, of_class in paths.items()]


def original_name(sequence: GenomeSequence) -> str:
    """Return the name of the sequence that this one is a part of."""
    return sequence.store.name if isinstance(sequence.store, OffsetStore) else sequence.name


def check_lengths(test: GenomeCollection, lengths: Sequence[int]) -> None:
    """Check that every class has test sequences of some length.

    Raises:
        InputError: if the test sequences of a class are all shorter than the shortest length.
    """
    for class_name in test.class_names:
        longest = max(sequence.length for sequence in test.sequences_of(class_name))
        if longest < min(lengths):
            raise InputError(
                f"the longest test sequence of class '{class_name}' has {longest} bp: give --lengths of {longest} or "
                "less."
            )


def describe_sequences(collection: GenomeCollection) -> str:
    """Numbers of sequences and bases, in words."""
    bases = sum(sequence.length for sequence in collection.sequences)
    return f"{counted(len(collection.sequences), 'sequence')} of {bases:,} bp"


def _manifest_sequences(details: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(class, name, length in bp) of every sequence given to the training."""
    return [
        (entry["class"], record["name"], record["length"])
        for entry in details.get("manifest", ())
        for record in entry["sequences"]
    ]


def _stretches(details: Mapping[str, Any], kind: str) -> dict[tuple[str, str, int], list[tuple[int, int]]]:
    """By class, name and length of a sequence: the stretches of it that are `training` or `held_out`."""
    found: dict[tuple[str, str, int], list[tuple[int, int]]] = {}
    for class_name, _, name, length, start, end in (details.get("stretches") or {}).get(kind, ()):
        found.setdefault((class_name, name, length), []).append((start, end))
    return {key: list(dict.fromkeys(intervals)) for key, intervals in found.items()}


def _parts(
    sequence: GenomeSequence, stretches: Mapping[tuple[str, str, int], list[tuple[int, int]]]
) -> list[GenomeSequence]:
    return [cut(sequence, start, end) for start, end in stretches.get(_key(sequence), ())]


def _key(sequence: GenomeSequence) -> tuple[str, str, int]:
    return sequence.class_name, sequence.name, sequence.length


def _missing(
    wanted: Sequence[tuple[str, str, int]], found: Mapping[tuple[str, str, int], object]
) -> set[tuple[str, str, int]]:
    return {key for key in wanted if key not in found}
