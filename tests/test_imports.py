"""The layers of the house: imports point downward, and neither files nor rooms import each other in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = {
    "mambacore": REPOSITORY / "kernels" / "mambacore",
    "genomamba": REPOSITORY / "genomamba",
    "audiomamba": REPOSITORY / "audiomamba",
    "mambapipelines": REPOSITORY / "pipelines" / "mambapipelines",
}
# What a package may import, besides itself.
BELOW = {
    "mambacore": set(),
    "genomamba": {"mambacore"},
    "audiomamba": {"mambacore"},
    "mambapipelines": {"mambacore", "genomamba", "audiomamba"},
}
BENCHMARKS = {
    REPOSITORY / "kernels" / "benchmarks": {"mambacore"},
    REPOSITORY / "pipelines" / "benchmarks": {"mambacore", "genomamba", "audiomamba", "mambapipelines"},
}
# Rooms of mambapipelines from the ground up: a room imports rooms of lower floors only.
FLOORS = (
    {"files", "console", "heartbeat", "processes"},
    {"device"},
    {"datasets", "pages"},
    {"training"},
    {"species", "language", "finetuning", "waveforms"},
    {"protocols"},
    {"apps"},
    {"cli"},
)


class Import(NamedTuple):
    """One imported module, and where it is imported."""

    path: Path
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPOSITORY)}:{self.line} imports {self.module}"


def module_name(path: Path, root: Path, package: str) -> str:
    """The dotted name of a file of a package."""
    parts = [package, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def all_modules() -> dict[str, Path]:
    """Every module of the four packages, by dotted name."""
    return {
        module_name(path, root, package): path
        for package, root in PACKAGES.items()
        for path in sorted(root.rglob("*.py"))
    }


def imports_of(path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """The project's modules that a file imports anywhere, inside functions and for type checking too."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(path, node.lineno, inner if inner in modules else node.module)
        elif isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name) for alias in node.names)


def project_imports() -> dict[str, list[Import]]:
    """What every module imports of the project, itself left out."""
    modules = all_modules()
    return {
        name: [found for found in imports_of(path, modules) if found.module in modules and found.module != name]
        for name, path in modules.items()
    }


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other (Tarjan 1972), each of two or more."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for following in sorted(arrows.get(node, ())):
            if following not in order:
                visit(following)
                lowest[node] = min(lowest[node], lowest[following])
            elif following in stack:
                lowest[node] = min(lowest[node], order[following])
        if lowest[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(arrows):
        if node not in order:
            visit(node)
    return found


def room_of(module: str) -> str | None:
    """The room of mambapipelines in which a module lies."""
    parts = module.split(".")
    return parts[1] if parts[0] == "mambapipelines" and len(parts) > 1 else None


def floor_of(room: str) -> int:
    """How high a room lies."""
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def upward(found: Import, module: str) -> bool:
    """Does this import point from `module` to a layer or a floor above it, or to a neighbour?"""
    package, other = module.split(".", maxsplit=1)[0], found.module.split(".")[0]
    if package != other:
        return other not in BELOW[package]
    here, there = room_of(module), room_of(found.module)
    return here is not None and there is not None and here != there and floor_of(there) >= floor_of(here)


def test_every_room_has_a_floor():
    rooms = {room for name in all_modules() if (room := room_of(name))}
    assert rooms == set().union(*FLOORS)


def test_no_import_points_upward():
    offending = [
        str(found) for name, found_in in project_imports().items() for found in found_in if upward(found, name)
    ]
    assert not offending, "\n".join(offending)


def test_benchmarks_import_only_what_they_measure():
    modules = all_modules()
    offending = [
        str(found)
        for folder, allowed in BENCHMARKS.items()
        for path in sorted(folder.glob("*.py"))
        for found in imports_of(path, modules)
        if found.module in modules and found.module.split(".")[0] not in allowed
    ]
    assert not offending, "\n".join(offending)


def test_no_files_import_each_other_in_a_circle():
    imports = project_imports()
    found = circles({name: {each.module for each in inside} for name, inside in imports.items()})
    lines = [str(each) for group in found for name in group for each in imports[name] if each.module in group]
    assert not found, "\n".join(lines)


def reached_from(start: str) -> set[str]:
    """The modules that a module imports, directly or not, inside functions too."""
    imports = project_imports()
    reached, waiting = {start}, [start]
    while waiting:
        found = {each.module for each in imports[waiting.pop()]} - reached
        reached |= found
        waiting += found
    return reached


def test_dna_commands_import_nothing_of_the_extra_audio():
    modules = all_modules()
    offending = [
        str(found)
        for name in sorted(reached_from("mambapipelines.cli.genomamba.main"))
        for found in imports_of(modules[name], modules)
        if found.module.split(".")[0] in {"audiomamba", "torchaudio", "soundfile"}
    ]
    assert not offending, "\n".join(offending)


def test_folders_of_tests_mirror_the_packages():
    for package, root in PACKAGES.items():
        folder = REPOSITORY / "tests" / package
        rooms = {path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}
        there = {path.name for path in root.iterdir() if path.is_dir()}
        assert rooms <= there, f"tests/{package} has folders that the package lacks: {sorted(rooms - there)}"


@pytest.mark.parametrize(
    ("module", "imported", "expected"),
    [
        ("mambacore.scan.operator", "genomamba.alphabet", True),
        ("genomamba.io.fasta", "audiomamba.data.clips", True),
        ("mambapipelines.training.state", "mambapipelines.species.train", True),
        ("mambapipelines.species.train", "mambapipelines.language.train", True),
        ("mambapipelines.species.train", "mambapipelines.training.state", False),
        ("mambapipelines.cli.genomamba.train", "genomamba.io.fasta", False),
    ],
)
def test_an_upward_import_is_recognised(module: str, imported: str, expected: bool):
    assert upward(Import(REPOSITORY / "x.py", 1, imported), module) is expected


def test_a_circle_is_recognised():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
