"""Several assemblies as one reference, with unique contig names, and splits by chromosome over all."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

from genomamba.data.intervals import SPLITS, Interval, Split
from genomamba.io.reference import Reference, suggest_names
from mambacore.errors import InputError

SEPARATOR: Final = "|"
_ENDINGS: Final = (".gz", ".bgz", ".fa", ".fasta", ".fna")


class ReferenceSet:
    """The contigs of one or several FASTA files, read on demand (`genomamba.io.reference.Reference`).

    Contigs of a single file keep their names. With several files, contig chrX of `strain.fa` is called `strain|chrX`.

    `lengths` maps the name of each contig, in the order of the files, to its length in bp; `path` names the files in
    messages.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Open the files.

        Raises:
            InputError: if there are no files, or two with the same name, or as `Reference`.
        """
        if not paths:
            raise InputError("no reference is given: name at least one FASTA file.")
        self.paths = tuple(os.fspath(path) for path in paths)
        labels = [_label(path) for path in self.paths]
        for number, label in enumerate(labels):
            if label in labels[:number]:
                raise InputError(
                    f"two references are called '{label}' ({self.paths[labels.index(label)]} and "
                    f"{self.paths[number]}): give each file once, and rename files with equal names."
                )
        self._references = [Reference(path) for path in self.paths]
        self._places = {
            name if len(labels) == 1 else f"{label}{SEPARATOR}{name}": (reference, name)
            for label, reference in zip(labels, self._references, strict=True)
            for name in reference.lengths
        }
        self.path = ", ".join(self.paths)
        self.lengths: Mapping[str, int] = MappingProxyType(
            {contig: reference.lengths[name] for contig, (reference, name) in self._places.items()}
        )

    def letters(self, contig: str, start: int, end: int, pad: bool = False) -> bytes:
        """As `Reference.letters`.

        Raises:
            InputError: as `Reference.letters`.
        """
        if contig not in self._places:
            raise InputError(f"there is no contig named '{contig}': {suggest_names(contig, self.lengths)}.")
        reference, name = self._places[contig]
        return reference.letters(name, start, end, pad)

    def chromosome(self, contig: str) -> str:
        """Return a contig's name in its file, which homologous chromosomes of consistently named assemblies share."""
        return self._places[contig][1]

    def file(self, contig: str) -> str:
        """Path of the file that a contig is in."""
        return self._places[contig][0].path

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "lengths": dict(self.lengths)}

    def __setstate__(self, state: dict[str, object]) -> None:
        lengths = cast(dict[str, int], state["lengths"])
        self.__dict__.update(state, lengths=MappingProxyType(lengths))


def rows_by_chromosome(
    references: ReferenceSet,
    shortest: int,
    valid: Iterable[str],
    test: Iterable[str],
    exclude: Iterable[str] = (),
) -> tuple[list[Interval], list[str]]:
    """Return whole contigs as rows, split by chromosome in all files; unnamed chromosomes are for training.

    Contigs shorter than `shortest` bp are skipped; their names are returned second.

    Raises:
        InputError: if no file has a chromosome, or it is assigned to two splits.
    """
    purposes: dict[str, str] = {}
    known = list(dict.fromkeys(references.chromosome(contig) for contig in references.lengths))
    for purpose, names in (("valid", valid), ("test", test), ("exclude", exclude)):
        for name in names:
            if name not in known:
                raise InputError(
                    f"{references.path} has no chromosome '{name}' (--{purpose}-chromosomes): "
                    f"{suggest_names(name, known)}."
                )
            if purposes.setdefault(name, purpose) != purpose:
                raise InputError(
                    f"chromosome '{name}' is given to --{purposes[name]}-chromosomes and to --{purpose}-chromosomes: "
                    "give it to one of them."
                )
    rows, short = [], []
    for contig, length in references.lengths.items():
        split = purposes.get(references.chromosome(contig), "train")
        if split not in SPLITS:
            continue
        if length < shortest:
            short.append(contig)
        else:
            rows.append(Interval(contig, 0, length, cast(Split, split)))
    return rows, short


def _label(path: str) -> str:
    """Return the file name without its FASTA ending."""
    name = Path(path).name
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name or Path(path).name
