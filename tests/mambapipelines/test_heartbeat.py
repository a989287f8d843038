"""A process that is stopped is named in one sentence, by those that would wait for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import distributed

from mambacore.errors import InputError
from mambapipelines.heartbeat import DEFAULT_TIMEOUT_SECONDS, TIMEOUT_VARIABLE, Heartbeat, rank_timeout_seconds
from tiny_species import bases, fasta, write_tiny_model
from training_runs import write_genomes

SENTENCE = "process {} of 2 has not answered for {} seconds"


@pytest.mark.parametrize("text", ["", "7.5", "0", "-1", "nan", "inf", "5 minutes"])
def test_the_timeout_is_a_positive_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, text)
    if text in ("", "7.5"):
        assert rank_timeout_seconds() == (7.5 if text else DEFAULT_TIMEOUT_SECONDS)
    else:
        with pytest.raises(InputError, match=TIMEOUT_VARIABLE):
            rank_timeout_seconds()


def test_silence_is_noticed_and_a_slow_or_finished_process_is_not_silent() -> None:
    store = distributed.HashStore()
    with Heartbeat(store, 0, 2, 1.0) as first:
        with Heartbeat(store, 1, 2, 1.0):
            time.sleep(2)
            first.check()
        time.sleep(2)
        first.check()
    with Heartbeat(distributed.HashStore(), 0, 2, 1.0) as alone:
        time.sleep(2)
        with pytest.raises(InputError, match=SENTENCE.format(2, 1)):
            alone.check()


def _torchrun(arguments: list[str], seconds: float, folder: Path) -> subprocess.Popen[bytes]:
    """Two processes of a command, in a session of their own."""
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = "import sys; from mambapipelines.cli.genomamba.main import main; sys.exit(main())"
    (folder / "main.py").write_text(module)
    environment = os.environ | {TIMEOUT_VARIABLE: str(seconds), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    with (folder / "errors").open("wb") as errors:
        return subprocess.Popen(
            [*started, str(folder / "main.py"), *arguments], stdout=errors, stderr=errors, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _ranks(launcher: int) -> dict[int, int]:
    """Rank -> process of the children of `torchrun`."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            settings = dict(
                entry.partition("=")[::2] for entry in (place / "environ").read_text(errors="replace").split("\0")
            )
        except (OSError, ValueError):
            continue
        if parent == launcher and "RANK" in settings:
            found[int(settings["RANK"])] = int(place.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("command", ["classify", "train"])
def test_torchrun_does_not_wait_for_a_stopped_rank(command: str, stopped: int, tmp_path: Path) -> None:
    seconds = 6
    if command == "classify":
        write_tiny_model(tmp_path / "model")
        (tmp_path / "in.fa").write_bytes(fasta({f"r{number}": bases(20_000, number) for number in range(2000)}))
        arguments = ["classify", str(tmp_path / "model"), str(tmp_path / "in.fa"), "--output", str(tmp_path / "out")]
    else:
        genomes = [part for one in write_genomes(tmp_path) for part in ("--genome", f"{one.name}={one.paths[0]}")]
        arguments = [
            *["train", *genomes, "--holdout", "chr2", "--length", "128", "--recipe", "tiny", "--steps", "100000"],
            *["--strategy", "ddp", "--output", str(tmp_path / "run"), "--threads", "1"],
        ]
    launcher = _torchrun(arguments, seconds, tmp_path)
    try:
        ready = "in.fa" if command == "classify" else "run/training/current.json"
        deadline = time.monotonic() + 120
        while len(_ranks(launcher.pid)) < 2 or not (tmp_path / ready).exists():
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "errors").read_text()
            time.sleep(0.2)
        if command == "classify":
            while not list((tmp_path / "tmp").glob("genomamba-*/*.unfinished")):
                assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "errors").read_text()
                time.sleep(0.1)
        os.kill(_ranks(launcher.pid)[stopped], signal.SIGSTOP)
        assert launcher.wait(150) != 0
        errors = (tmp_path / "errors").read_text()
        assert errors.count(SENTENCE.format(stopped + 1, seconds)) == 1, errors
        assert not (tmp_path / "out").exists()
    finally:
        for process in (*_ranks(launcher.pid).values(), launcher.pid):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        launcher.wait()
