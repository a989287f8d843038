"""However a command ends, its children end too, and nothing temporary is left for longer than until the next one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mambacore.files import replaced_when_whole, temporary_folder, temporary_name
from tiny_language_models import model_folder, random_letters, write_fasta
from tiny_species import bases, fasta, write_tiny_model

MAIN = "import sys; from mambapipelines.cli.genomamba.main import main; sys.exit(main())"
SECONDS = 240


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_tiny_model(folder / "species")
    model_folder(folder / "language", "causal")
    write_fasta(folder / "genome.fa", {"chr1": random_letters(300, 1)})
    # Enough for two processes to be at work for seconds.
    (folder / "long.fa").write_bytes(fasta({f"r{number}": bases(20_000, number % 10) for number in range(600)}))
    (folder / "pairs.fa").write_bytes(fasta({"r": bases(100)}))
    return folder


@contextmanager
def _running(arguments: list[str], temporary: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, whose standard input stays open."""
    temporary.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        if process is not None and process.poll() is not None:
            pytest.fail(f"the command has ended: {process.stderr.read().decode()}")  # type: ignore[union-attr]
        time.sleep(0.05)


def _session_has_ended(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


def test_processes_start_where_the_path_of_the_temporary_folder_is_long(material: Path, tmp_path: Path):
    temporary = tmp_path / ("long" * 30)
    table = tmp_path / "table.tsv"
    arguments = [
        "classify",
        str(material / "species"),
        str(material / "pairs.fa"),
        "--processes",
        "2",
        "-o",
        str(table),
    ]
    with _running(arguments, temporary) as process:
        assert process.wait(timeout=SECONDS) == 0, process.stderr.read().decode()  # type: ignore[union-attr]
    assert table.read_text().startswith("record\t")


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        (signal.SIGTERM, ["classify", "{m}/species", "-", "--processes", "2", "--output", "{out}"]),
        (signal.SIGHUP, ["classify", "{m}/species", "{m}/pairs.fa", "/dev/stdin", "--paired", "--output", "{out}"]),
        (
            signal.SIGTERM,
            ["score-variants", "{m}/language", "-", "--reference", "{m}/genome.fa", "--output", "{out}"],
        ),
    ],
)
def test_a_signal_leaves_nothing(number: signal.Signals, arguments: list[str], material: Path, tmp_path: Path) -> None:
    """Each waits for the rest of its standard input, with a temporary copy of what has come."""
    given = [part.format(m=material, out=tmp_path / "out") for part in arguments]
    with _running(given, tmp_path / "tmp") as process:
        _wait_until(lambda: list((tmp_path / "tmp").iterdir()), process)
        process.send_signal(number)
        assert process.wait(SECONDS) == 128 + number
        assert process.stderr.read() == b""  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_their_parent(number: signal.Signals, material: Path, tmp_path: Path) -> None:
    arguments = ["classify", str(material / "species"), str(material / "long.fa"), "--processes", "2"]
    with _running([*arguments, "--output", str(tmp_path / "out")], tmp_path / "tmp") as process:
        _wait_until(lambda: len(list((tmp_path / "tmp").glob("*/*.unfinished"))) == 2, process)
        process.send_signal(number)
        process.wait(SECONDS)
        _wait_until(lambda: _session_has_ended(process.pid))
    assert not list((tmp_path / "tmp").glob("genomamba-*"))
    assert not (tmp_path / "out").exists()


def _write_and_stay(output: Path, place: Path) -> None:
    """The body of a process that is killed while it writes a file and has a temporary folder."""
    program = (
        "import sys, time, tempfile; from pathlib import Path; from mambacore.files import *\n"
        "with temporary_folder(), replaced_when_whole(Path(sys.argv[1])) as stream:\n"
        "    print('ready', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(output)], stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(place)}
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.kill()
    process.communicate()


def test_what_killed_processes_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    output, other = tmp_path / "out.tsv", tmp_path / ".out.tsv.notes.part"
    other.write_text("of somebody else")
    _write_and_stay(output, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    # What is being written, here or elsewhere, is not what a killed process left.
    with temporary_folder() as mine, replaced_when_whole(output) as stream:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [mine.name, temporary_name(output).name, other.name]
        )
        with temporary_folder() as another:
            assert mine.is_dir() and another.is_dir()
        stream.write(b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, output.name]
