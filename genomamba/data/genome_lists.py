"""Genomes given by options, lists and folders: classes and their FASTA files."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from genomamba.class_names import check_class_name
from genomamba.data.genomes import GenomeSpecification
from genomamba.io.compression import STANDARD_INPUT
from mambacore.errors import InputError

SEQUENCE_ENDINGS: Final = (".fa", ".fna", ".fasta", ".fas", ".ffn", ".frn")
COMPRESSION_ENDINGS: Final = (".gz", ".bgz", ".bz2", ".xz", ".zst")
_HEADERS: Final = (("name", "path"), ("class", "path"), ("species", "path"), ("genome", "path"))


def parse_genome_option(option: str) -> GenomeSpecification:
    """Parse the value of one `--genome` option, `NAME=PATH[,PATH...]`; a path may be a folder or a pattern.

    Raises:
        InputError: if it has another form, the class name is invalid (`genomamba.class_names`), a folder has no
            sequence files, or a pattern has no matches.
    """
    place = f"--genome '{option}'"
    name, equals_sign, paths = option.partition("=")
    if not equals_sign:
        raise InputError(f"{place} has no '=': write NAME=PATH[,PATH...].")
    check_class_name(name, place)
    return GenomeSpecification(name, expand_paths(paths, place))


def read_genome_list(path: str) -> list[GenomeSpecification]:
    """Read the classes of a list or a folder.

    Args:
        path: a text file with a class name, a tab and paths on each line, paths relative to the file, with or without
            a header `name<TAB>path`; a class may have several lines. Or a folder, in which each subfolder with
            sequence files is a class, or, without such subfolders, each sequence file is one.

    Raises:
        InputError: if it cannot be read, or a line has another form.
    """
    if os.path.isdir(path):
        return _classes_of_folder(Path(path))
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"--genomes {path} cannot be read ({error.strerror}): give a list or a folder.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--genomes {path} is not UTF-8 text: give a list of class name, tab, path.") from error
    found: dict[str, GenomeSpecification] = {}
    for number, line in enumerate(lines, start=1):
        place = f"--genomes {path} line {number}"
        cells = [cell.strip() for cell in line.rstrip("\t").split("\t")]
        if not line.strip() or line.startswith("#") or (not found and tuple(map(str.lower, cells)) in _HEADERS):
            continue
        if len(cells) != 2 or not all(cells):
            raise InputError(f"{place} is not a class name, a tab and a path: write these two columns.")
        name = check_class_name(cells[0], place)
        paths = expand_paths(cells[1], place, os.path.dirname(path))
        earlier = found.get(name, GenomeSpecification(name, ()))
        found[name] = replace(earlier, paths=earlier.paths + paths)
    if not found:
        raise InputError(f"--genomes {path} has no genomes: write class name, tab, path on each line.")
    return list(found.values())


def expand_paths(text: str, place: str, folder: str = "") -> tuple[str, ...]:
    """Expand comma-separated paths; folders and patterns become the files that they contain or match.

    A comma may also be part of an existing file's name.

    Args:
        text: the paths.
        place: where they were given, for error messages.
        folder: folder that relative paths refer to.

    Raises:
        InputError: if a path is empty, a folder has no sequence files, or a pattern has no matches.
    """
    parts = text.split(",")
    paths: list[str] = []
    while parts:
        counts = range(len(parts), 1, -1)
        taken = next((count for count in counts if os.path.exists(os.path.join(folder, ",".join(parts[:count])))), 1)
        path, parts = ",".join(parts[:taken]), parts[taken:]
        if not path.strip() or "\0" in path:
            raise InputError(f"{place} has an empty path: write paths with single commas between them.")
        paths += [path] if path == STANDARD_INPUT else _files_of(os.path.join(folder, path), place)
    return tuple(dict.fromkeys(paths))


def is_sequence_file(path: Path) -> bool:
    """Whether a file is not hidden and has the ending of a sequence file, compressed or not."""
    name = path.name.lower()
    for ending in COMPRESSION_ENDINGS:
        name = name.removesuffix(ending)
    return not path.name.startswith(".") and name.endswith(SEQUENCE_ENDINGS) and path.is_file()


def refuse_shared_files(specifications: Iterable[GenomeSpecification]) -> None:
    """Check that no file is given for two classes.

    Raises:
        InputError: if one is; the message names the file and the classes.
    """
    owners: dict[str, str] = {}
    for specification in specifications:
        for path in specification.paths:
            if path == STANDARD_INPUT:
                continue
            owner = owners.setdefault(os.path.realpath(path), specification.name)
            if owner != specification.name:
                raise InputError(
                    f"{path} is given for two classes, '{owner}' and '{specification.name}': give each class its own."
                )


def _files_of(path: str, place: str) -> list[str]:
    if os.path.isdir(path):
        files = sorted(str(each) for each in Path(path).iterdir() if is_sequence_file(each))
        if not files:
            raise InputError(f"{place}: the folder {path} has no sequence files ({', '.join(SEQUENCE_ENDINGS)}).")
        return files
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    files = sorted(found for found in glob.glob(path) if os.path.isfile(found))
    if not files:
        raise InputError(f"{place}: no file matches {path}.")
    return files


def _classes_of_folder(folder: Path) -> list[GenomeSpecification]:
    place = f"--genomes {folder}"
    entries = sorted(folder.iterdir())
    by_class = {each.name: _sequence_files(each) for each in entries if each.is_dir() and not each.name.startswith(".")}
    by_class = {name: files for name, files in by_class.items() if files}
    if not by_class:
        by_class = {_stem(each): [str(each)] for each in entries if is_sequence_file(each)}
    if not by_class:
        raise InputError(f"{place} has no sequence files ({', '.join(SEQUENCE_ENDINGS)}), nor folders with any.")
    return [GenomeSpecification(check_class_name(name, place), tuple(files)) for name, files in by_class.items()]


def _sequence_files(folder: Path) -> Sequence[str]:
    return sorted(str(each) for each in folder.iterdir() if is_sequence_file(each))


def _stem(path: Path) -> str:
    name = path.name
    for ending in (*COMPRESSION_ENDINGS, *SEQUENCE_ENDINGS):
        if name.lower().endswith(ending):
            name = name[: -len(ending)]
    return name
