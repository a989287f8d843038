"""The Snakemake workflow: two jobs at a time, killed, resumed; its tables are those of one process."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mambapipelines.cli.genomamba.main import main
from tiny_species import bases, fasta, write_tiny_model

WORKFLOW = Path(__file__).resolve().parents[2] / "pipelines" / "workflow"
SAMPLES = {"lake": ("lake.fa",), "soil": ("soil_1.fa", "soil_2.fa")}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for module in ("snakemake", "multiqc"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'genomamba[workflow]'")
    write_tiny_model(tmp_path / "model")
    rows = ["sample\tfiles"]
    for number, (sample, files) in enumerate(SAMPLES.items()):
        rows.append(f"{sample}\t{','.join(files)}")
        for name in files:
            records = {f"{name}_{k}": bases(50 + 40 * (k % 5), 100 * number + k) for k in range(60)}
            (tmp_path / name).write_bytes(fasta(records))
    (tmp_path / "samples.tsv").write_text("\n".join(rows) + "\n")
    # The program, wherever this Python finds it.
    program = tmp_path / "bin" / "genomamba"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mambapipelines.cli.genomamba.main "$@"\n')
    multiqc = tmp_path / "bin" / "multiqc"
    multiqc.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m multiqc "$@"\n')
    for path in (program, multiqc):
        path.chmod(0o755)
    return tmp_path


def command(place: Path, *more: str) -> list[str]:
    # The profile's `cores: all` is overridden: two jobs.
    return [
        sys.executable, "-m", "snakemake", "--snakefile", str(WORKFLOW / "Snakefile"), "--workflow-profile",
        str(WORKFLOW / "profiles" / "local"), "--cores", "2", "--jobs", "2", "--directory", str(place), *more,
        "--config", "model=model", "samples=samples.tsv", "output=results", "shards=2",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_jobs_killed_and_resumed_give_the_tables_of_one_process(place: Path) -> None:
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command(place), env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not list(place.glob("results/*/parts_2/of_2/*.part")) and time.monotonic() < deadline:
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (place / "results" / "multiqc_report.html").exists()
    unlocked = subprocess.run(command(place, "--unlock"), env=environment, check=False, capture_output=True, text=True)
    assert unlocked.returncode == 0, unlocked.stdout + unlocked.stderr[-3000:]
    done = subprocess.run(command(place), env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for sample, files in SAMPLES.items():
        inputs = [str(place / name) for name in files]
        expected = place / f"{sample}.tsv"
        assert main(["classify", str(place / "model"), *inputs, "-q", "-t", "1", "-o", str(expected)]) == 0
        assert (place / "results" / sample / "calls.tsv").read_bytes() == expected.read_bytes()
        assert (place / "results" / sample / "calls.kreport").is_file()
    assert "genomamba classify" in (place / "results" / "multiqc_report.html").read_text(encoding="utf-8")
    # Nothing is left to do.
    again = subprocess.run(command(place, "--dry-run"), env=environment, check=True, capture_output=True, text=True)
    assert "Nothing to be done" in again.stdout + again.stderr
