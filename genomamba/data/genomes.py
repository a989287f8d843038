"""The genomes of a species task: classes, their files, their sequences, and which of them are held out."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from genomamba.io.compression import STANDARD_INPUT, is_compressed, source_label
from genomamba.io.fasta import FastaHeader, read_events, read_records
from genomamba.io.reference import Reference
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError

_CHECKED_TAIL_BP: Final = 16
_COMPARED_BP: Final = 256
_COMPARED_RECORDS: Final = 16
_COMPARED_AT_A_TIME_BP: Final = 1 << 22
"""Number of first records whose last bases are compared to detect identical files."""
_MOST_NEAR_NAMES: Final = 5


@dataclass(frozen=True)
class GenomeSpecification:
    """A parsed `--genome NAME=PATH[,PATH...]`; the path "-" is standard input."""

    name: str
    paths: tuple[str, ...]


class SequenceStore(Protocol):
    """Access to the sequences of one file."""

    def fetch(self, name: str, start: int, end: int) -> Tokens:
        """Return the tokens of bases [start, end) of a record."""
        ...


class MemoryStore:
    """Sequences in memory, 1 byte per base."""

    def __init__(self, tokens_by_name: Mapping[str, Tokens]) -> None:
        self._tokens_by_name = dict(tokens_by_name)

    def fetch(self, name: str, start: int, end: int) -> Tokens:
        """A copy of the tokens of `name` in [start, end)."""
        return self._tokens_by_name[name][start:end].copy()


class IndexedStore:
    """Random access to a plain FASTA file through `genomamba.io.reference`: one index, one handle per process."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def fetch(self, name: str, start: int, end: int) -> Tokens:
        """The tokens of `name` in [start, end)."""
        return self.reference.tokens(name, start, end)


@dataclass(frozen=True)
class GenomeSequence:
    """One record of one genome file; `length` in bp."""

    class_name: str
    path: str
    name: str
    length: int
    store: SequenceStore = field(repr=False, compare=False)

    def tokens(self, start: int, end: int) -> Tokens:
        """Return a fresh array of the tokens of bases [start, end), 0-based and half-open, shape (end - start,).

        Raises:
            ValueError: if the interval does not lie within the sequence.
        """
        if not 0 <= start <= end <= self.length:
            raise ValueError(f"[{start}, {end}) does not lie within the {self.length} bp of {self.name}")
        return self.store.fetch(self.name, start, end)


@dataclass(frozen=True)
class GenomeCollection:
    """The sequences of every class; a label is a position in `class_names`, in the order of the options.

    `notes` tell the user how names were changed.
    """

    class_names: tuple[str, ...]
    sequences: tuple[GenomeSequence, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def from_tokens(cls, tokens_by_class: Mapping[str, Mapping[str, Tokens]]) -> "GenomeCollection":
        """Return a collection of sequences that exist only in memory: class name -> record name -> tokens."""
        sequences = [
            GenomeSequence(class_name, "memory", name, len(tokens), store)
            for class_name, tokens_by_name in tokens_by_class.items()
            for store in [MemoryStore(tokens_by_name)]
            for name, tokens in tokens_by_name.items()
        ]
        return cls(tuple(tokens_by_class), tuple(sequences))

    def sequences_of(self, class_name: str) -> list[GenomeSequence]:
        """Return the sequences of one class in file order."""
        return [sequence for sequence in self.sequences if sequence.class_name == class_name]

    def split(self, holdout_names: Sequence[str]) -> tuple["GenomeCollection", "GenomeCollection"]:
        """Return (training, held out): the records of every class whose name is in `holdout_names` are held out.

        Both parts keep all class names, so labels are the same. Without names the second part has no sequences.

        Raises:
            InputError: if no record has a given name, or a class would be left without training or, if names are
                given, held-out sequences.
        """
        known = {sequence.name for sequence in self.sequences}
        for name in holdout_names:
            if name not in known:
                raise InputError(f"no training sequence is named '{name}' (--holdout): {_suggest(name, known)}.")
        chosen = set(holdout_names)
        training = [sequence for sequence in self.sequences if sequence.name not in chosen]
        held_out = [sequence for sequence in self.sequences if sequence.name in chosen]
        for class_name in self.class_names:
            if all(sequence.class_name != class_name for sequence in training):
                raise InputError(
                    f"class '{class_name}' has no sequences left to train on when {_join(holdout_names)} are held out: "
                    "hold out fewer or give it more."
                )
            if chosen and all(sequence.class_name != class_name for sequence in held_out):
                raise InputError(
                    f"class '{class_name}' has no sequence named {_join(holdout_names, 'or')} to hold out: "
                    "name one of its sequences in --holdout too."
                )
        return GenomeCollection(self.class_names, tuple(training)), GenomeCollection(self.class_names, tuple(held_out))

    def manifest(self) -> list[dict[str, Any]]:
        """Return a description of the genomes for a model folder: one JSON object per file and class."""
        entries: dict[tuple[str, str], dict[str, Any]] = {}
        for sequence in self.sequences:
            entry = entries.setdefault(
                (sequence.class_name, sequence.path),
                {"class": sequence.class_name, "path": sequence.path, "sequences": []},
            )
            entry["sequences"].append({"name": sequence.name, "length": sequence.length})
        return list(entries.values())


def load_genomes(specifications: Iterable[GenomeSpecification]) -> GenomeCollection:
    """Read and check the genomes of every class.

    Plain files stay on disk behind an index; gzipped ones, standard input and files whose lines are too uneven for an
    index are held in memory, 1 byte per base. Repeated record names in a file are numbered: NAME.2, NAME.3.

    Raises:
        InputError: if a class is given twice, or as `genomamba.io.fasta`.
    """
    class_names: list[str] = []
    sequences: list[GenomeSequence] = []
    notes: list[str] = []
    for specification in specifications:
        if specification.name in class_names:
            raise InputError(
                f"--genome names the class '{specification.name}' twice: write its files as one option, "
                f"{specification.name}=PATH,PATH."
            )
        class_names.append(specification.name)
        for path in specification.paths:
            numbering = _Numbering()
            sequences.extend(_load_file(specification.name, path, numbering))
            if numbering.repeated:
                notes.append(
                    f"{source_label(path)} has several records with the same name, which are numbered: "
                    + ", ".join(f"{name}, {name}.2" for name in sorted(numbering.repeated)[:_MOST_NEAR_NAMES])
                    + (", ..." if len(numbering.repeated) > _MOST_NEAR_NAMES else "")
                )
    notes += _shared_files(sequences)
    return GenomeCollection(tuple(class_names), tuple(sequences), tuple(notes))


def require_training_classes(collection: GenomeCollection) -> None:
    """Check that a collection has at least two classes.

    Raises:
        InputError: if there is one class, or none.
    """
    if len(collection.class_names) < 2:
        given = f"only '{collection.class_names[0]}'" if collection.class_names else "none"
        raise InputError(f"training needs at least two classes, {given} is given: give --genome NAME=PATH for each.")


class _Numbering:
    """Unique names for the records of a file: repeated names are numbered."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}
        self.repeated: set[str] = set()

    def name_of(self, name: str) -> str:
        """Return a unique name for the next record, which is called `name` in the file."""
        if name not in self._taken:
            self._taken[name] = 1
            return name
        self.repeated.add(name)
        while True:
            self._taken[name] += 1
            numbered = f"{name}.{self._taken[name]}"
            if numbered not in self._taken:
                self._taken[numbered] = 1
                return numbered


def _load_file(class_name: str, path: str, numbering: _Numbering) -> list[GenomeSequence]:
    if path != STANDARD_INPUT and not is_compressed(path) and Path(path).is_file():
        lengths, tails = _scan_file(path, numbering)
        store: SequenceStore | None = _index_file(path, lengths, tails)
        if store is None:
            again = _Numbering()
            store = MemoryStore({again.name_of(record.name): record.tokens for record in read_records(path)})
    else:
        tokens_by_name: dict[str, Tokens] = {}
        for record in read_records(path):
            tokens_by_name[numbering.name_of(record.name)] = record.tokens
        lengths = {name: len(tokens) for name, tokens in tokens_by_name.items()}
        store = MemoryStore(tokens_by_name)
    return [GenomeSequence(class_name, path, name, length, store) for name, length in lengths.items()]


def _scan_file(path: str, numbering: _Numbering) -> tuple[dict[str, int], dict[str, Tokens]]:
    """Scan a file once, keeping only the length and the last bases of each record."""
    lengths: dict[str, int] = {}
    tails: dict[str, Tokens] = {}
    name = ""
    for event in read_events(path):
        if isinstance(event, FastaHeader):
            name = numbering.name_of(event.name)
            lengths[name], tails[name] = 0, np.empty(0, dtype=np.uint8)
            continue
        lengths[name] += len(event)
        tails[name] = np.concatenate([tails[name], event[-_CHECKED_TAIL_BP:]])[-_CHECKED_TAIL_BP:]
    return lengths, tails


def _shared_files(sequences: Sequence[GenomeSequence]) -> Iterator[str]:
    """Yield a message for each pair of classes whose files hold the same sequences, even under different names."""
    by_file: dict[tuple[str, str], list[GenomeSequence]] = {}
    for sequence in sequences:
        by_file.setdefault((sequence.class_name, sequence.path), []).append(sequence)
    seen: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for (class_name, path), inside in by_file.items():
        signature = tuple(
            (sequence.length, sequence.tokens(max(0, sequence.length - _COMPARED_BP), sequence.length).tobytes())
            for sequence in inside[:_COMPARED_RECORDS]
        )
        alike = seen.setdefault((len(inside), signature), [])
        for other_class, other_path in alike:
            # Two strains may agree in length and at the end, so every base of these records is compared.
            if other_class != class_name and _are_equal(inside, by_file[other_class, other_path]):
                yield (
                    f"{other_path} (class '{other_class}') and {path} (class '{class_name}') hold the same sequences: "
                    "give each class its own"
                )
                break
        alike.append((class_name, path))


def _are_equal(sequences: Sequence[GenomeSequence], others: Sequence[GenomeSequence]) -> bool:
    """Whether the first `_COMPARED_RECORDS` of the sequences, of the same lengths, have the same bases."""
    return all(
        np.array_equal(sequence.tokens(start, end), other.tokens(start, end))
        for sequence, other in list(zip(sequences, others, strict=True))[:_COMPARED_RECORDS]
        for start in range(0, sequence.length, _COMPARED_AT_A_TIME_BP)
        for end in [min(sequence.length, start + _COMPARED_AT_A_TIME_BP)]
    )


def _index_file(path: str, lengths: Mapping[str, int], tails: Mapping[str, Tokens]) -> IndexedStore | None:
    """Return access to a plain file through its index, or None if it cannot be indexed.

    The index must give the same records, lengths and last bases as a scan of the file: spaces within lines, which an
    index does not detect, shift the end.
    """
    try:
        reference = Reference(path)
        agrees = dict(reference.lengths) == dict(lengths) and all(
            np.array_equal(reference.tokens(name, lengths[name] - len(tail), lengths[name]), tail)
            for name, tail in tails.items()
        )
    except InputError:
        return None
    return IndexedStore(reference) if agrees else None


def _suggest(name: str, known: Iterable[str]) -> str:
    ordered = sorted(known)
    near = difflib.get_close_matches(name, ordered, n=_MOST_NEAR_NAMES, cutoff=0.5)
    if near:
        return f"did you mean {_join(near, 'or')}"
    shown = ", ".join(ordered[:_MOST_NEAR_NAMES]) + (", ..." if len(ordered) > _MOST_NEAR_NAMES else "")
    return f"the names are {shown}"


def _join(names: Sequence[str], conjunction: str = "and") -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {conjunction} {quoted[-1]}"
