"""Damaged files for the commands: what a case is, and a child process in which cases run under limits.

A case is a function of (target, index): the same index gives the same files, so that a failure can be repeated with
`run_case(target, index)`.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HANG_SECONDS = 20.0
# A child imports everything and runs one case before the clock starts.
START_SECONDS = 900.0
MOST_MEMORY_BYTES = 1_500_000_000
# Beyond this an allocation fails in the child, before the machine runs out.
DATA_LIMIT_BYTES = 4_000_000_000

ODD_BYTES = (
    b"",
    b"\0",
    b"\n",
    b"\r",
    b"\t",
    b" ",
    b"\xff",
    b"\xef\xbb\xbf",
    b"-",
    b"99999999999999999999",
    b"nan",
    b"\x1b[31m",
)
ODD_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    10**9,
    10**30,
    0.5,
    float("1e308"),
    "",
    "x",
    "../../x",
    [],
    [1],
    {},
    {"name": "x"},
    [[]],
    "\u202e",
)

GENOMAMBA = "mambapipelines.cli.genomamba.main"
AUDIOMAMBA = "mambapipelines.cli.audiomamba.main"


@dataclass(frozen=True)
class Target:
    """A command with an input to damage.

    Attributes:
        name: of the target.
        wholes: undamaged contents of the input, of which cases are made.
        command: (path of the damaged input, folder of the case) -> arguments; it may move the input elsewhere.
        program: module whose `main` takes the arguments.
        words: pieces of the format that damages are made of.
        file_name: of the input.
        structured: the input is JSON, whose values are replaced.
        outputs: names that may not be there after a failure.
        found: inputs that failed once; they are the first cases.
    """

    name: str
    wholes: Sequence[bytes]
    command: Callable[[Path, Path], list[str]]
    program: str = GENOMAMBA
    words: Sequence[bytes] = ()
    file_name: str = "input"
    structured: bool = False
    outputs: Sequence[str] = ("out",)
    found: Sequence[bytes] = ()


def damaged(target: Target, index: int) -> bytes:
    """The input of a case: one that failed once, a whole one with edits, words in any order, or arbitrary bytes."""
    if index < len(target.found):
        return target.found[index]
    chance = random.Random(f"{target.name} {index}")
    kind = chance.random()
    words = (*target.words, *ODD_BYTES)
    if target.structured and kind < 0.6:
        return json.dumps(_with_odd_values(json.loads(chance.choice(target.wholes)), chance)).encode()
    if kind < 0.75:
        data = chance.choice(target.wholes)
        for _ in range(chance.randint(1, 4)):
            begin = chance.randint(0, len(data))
            end = begin + chance.choice((0, 0, 1, 2, 8, 64))
            data = (
                data[:begin]
                + chance.choice((chance.choice(words), chance.randbytes(chance.randint(1, 6))))
                + data[end:]
            )
        return data[: chance.randint(0, len(data))] if chance.random() < 0.3 else data
    if kind < 0.9:
        return b"".join(chance.choice(words) for _ in range(chance.randint(0, 40)))
    return chance.randbytes(chance.randint(0, 300))


def _with_odd_values(document: Any, chance: random.Random) -> Any:
    """The document with one to three values replaced, removed, or nested deeply."""
    for _ in range(chance.randint(1, 3)):
        places = list(_places(document))
        if not places:
            return chance.choice(ODD_VALUES)
        parent, key = chance.choice(places)
        action = chance.random()
        if action < 0.15 and isinstance(parent, dict):
            del parent[key]
        elif action < 0.2:
            parent[key] = [[[[[[[[parent[key]]]]]]]]]
        elif action < 0.3 and isinstance(parent, dict):
            parent[chance.choice(("x", "", "name", "layers"))] = chance.choice(ODD_VALUES)
        else:
            parent[key] = chance.choice(ODD_VALUES)
    return document


def _places(document: Any) -> Iterable[tuple[Any, Any]]:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(items):
        yield document, key
        yield from _places(value)


@dataclass(frozen=True)
class Failure:
    """A case that did not end as it must."""

    target: str
    index: int
    what: str

    def __str__(self) -> str:
        return f"{self.target}, case {self.index}: {self.what}"


def run_cases(
    module: str, material: Path, name: str, indices: Iterable[int], hang_seconds: float = HANG_SECONDS
) -> list[Failure]:
    """Run cases of a target one after the other in a child process; a new one is started after a failure.

    A case fails with an exception other than the program's own exit, with a status that is neither 0 nor 2, when output
    is left behind after a failure, after `hang_seconds`, and with more than `MOST_MEMORY_BYTES`.

    Args:
        module: has a function `targets(material)`, name -> `Target`.
        material: folder of models and whole files.
        name: of the target.
        indices: of the cases.
        hang_seconds: how long a case may take.
    """
    failures = []
    child: _Child | None = None
    try:
        for index in indices:
            child = child or _Child(module, material, name)
            what = child.try_case(index, hang_seconds)
            if what is not None:
                failures.append(Failure(name, index, what))
                child.end()
                child = None
    finally:
        if child is not None:
            child.end()
    return failures


class _Child:
    """A process that runs cases of a target when it is told to."""

    def __init__(self, module: str, material: Path, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, module, material, name), daemon=True)
        self._process.start()
        there.close()
        if not self._connection.poll(START_SECONDS):
            self.end()
            raise TimeoutError(f"{name}: a child was not ready within {START_SECONDS:g} seconds")
        self._connection.recv()

    def try_case(self, index: int, hang_seconds: float) -> str | None:
        """What went wrong, or `None`."""
        self._connection.send(index)
        used = before = self._used_seconds()
        while not self._connection.poll(hang_seconds):
            # On a busy machine a case waits for its turn: it hangs when it has had the time, or does nothing.
            now = self._used_seconds()
            if now - before >= hang_seconds or now - used < hang_seconds / 100:
                return f"more than {hang_seconds:g} seconds"
            used = now
        try:
            return str(answer) if (answer := self._connection.recv()) is not None else None
        except EOFError:
            self._process.join()
            return f"the process ended with {self._process.exitcode}"

    def _used_seconds(self) -> float:
        """Processor time of the child; 0 where that cannot be seen."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Any, module: str, material: Path, name: str) -> None:
    """The child: run the case of each index that comes, and answer with what went wrong, or `None`."""
    target = importlib.import_module(module).targets(material)[name]
    # What is imported and compiled once is not charged to the first case.
    run_case(target, -1)
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT_BYTES, DATA_LIMIT_BYTES))
    connection.send(None)
    while True:
        try:
            index = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send(run_case(target, index, held_bytes=0))


def run_case(target: Target, index: int, held_bytes: int | None = None) -> str | None:
    """Run a case in this process; what went wrong, or `None`.

    Args:
        target: what is tried.
        index: of the case; -1 is the undamaged input.
        held_bytes: memory that does not count; what the process has taken at its highest so far when `None`, because a
            process that ran other tests before may have taken more than any case may.
    """
    held_bytes = _peak_bytes() if held_bytes is None else held_bytes
    main = importlib.import_module(target.program).main
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        path = place / target.file_name
        path.write_bytes(target.wholes[0] if index < 0 else damaged(target, index))
        errors = io.StringIO()
        try:
            with contextlib.redirect_stdout(_Discarded()), contextlib.redirect_stderr(errors):
                status = main(target.command(path, place))
        except BaseException:
            return traceback.format_exc(limit=-6)
        if status not in (0, 2):
            return f"status {status}"
        if "Traceback" in errors.getvalue():
            return errors.getvalue()[-2000:]
        left = [name for name in target.outputs if (place / name).exists()]
        if status == 2 and left:
            return f"{left} left behind after: {errors.getvalue()[-300:]}"
        taken = _peak_bytes() - held_bytes
        return f"{taken / 1e9:.2f} GB of memory" if taken > MOST_MEMORY_BYTES else None
    finally:
        shutil.rmtree(place, ignore_errors=True)


class _Discarded(io.TextIOWrapper):
    """Standard output that goes nowhere, text or bytes."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")


def _peak_bytes() -> int:
    """The largest resident memory since the process began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
