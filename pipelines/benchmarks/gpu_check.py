"""Everything that a quarter of an hour on a machine with a GPU should tell, in one go, into one folder.

    python pipelines/benchmarks/gpu_check.py --output gpu-check --wheels wheels --data yeasts
    python pipelines/benchmarks/gpu_check.py --output rehearsal --rehearse

In turn: what the machine is; the tests that need a device; the short tables of the kernels; a training step of the 7M
DNA model on 2^20 bases and of the 6M audio model; two minutes of `genomamba train`. Each has a time limit and a log, a
step that fails does not stop those after it, and `summary.tsv` grows line by line, so that nothing is lost when the
machine is taken away. With `--wheels` everything runs in an environment that is installed from that folder without a
network. `--rehearse` does the same on a CPU: the kernels in Triton's interpreter, the commands with tiny settings.
"""

import argparse
import os
import random
import subprocess
import sys
import time
import wave
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "kernels" / "benchmarks"
LONG_BP = 1 << 20
RATE_HZ = 16_000
# A rehearsal shares its machine and has no deadline.
REHEARSAL_PATIENCE = 10


class Step(NamedTuple):
    """One thing to do: its name, the command, and the seconds after which it is stopped."""

    name: str
    command: list[str]
    seconds: int


def write_genome(path: Path, contigs: dict[str, int], seed: int, gc: float = 0.4) -> Path:
    """A FASTA file of random letters."""
    source, weights = random.Random(seed), [1 - gc, gc, gc, 1 - gc]
    with path.open("w", encoding="ascii") as stream:
        for name, length in contigs.items():
            letters = "".join(source.choices("ACGT", weights, k=length))
            lines = (letters[begin : begin + 80] for begin in range(0, length, 80))
            stream.write(f">{name}\n" + "\n".join(lines) + "\n")
    return path


def write_clips(folder: Path, count: int, samples: int) -> Path:
    """Clips of noise."""
    folder.mkdir(exist_ok=True)
    source = random.Random(0)
    for number in range(count):
        with wave.open(str(folder / f"{number:02d}.wav"), "wb") as clip:
            clip.setparams((1, 2, RATE_HZ, 0, "NONE", "not compressed"))
            clip.writeframes(array("h", [source.randrange(-9000, 9000) for _ in range(samples)]).tobytes())
    return folder


def genomes_of(data: Path | None, place: Path, length: int) -> list[str]:
    """`--genome` options: the FASTA files of a folder, or random ones."""
    files = sorted(path for path in data.iterdir() if path.name.endswith((".fa", ".fa.gz", ".fna"))) if data else []
    if not files:
        files = [
            write_genome(place / f"{name}.fa", {"chr1": length, "chr2": length}, seed, 0.35 + 0.1 * seed)
            for seed, name in enumerate(("first", "second"))
        ]
    return [f"--genome={path.name.split('.')[0]}={path}" for path in files]


def steps(python: str, output: Path, data: Path | None, rehearse: bool) -> Iterator[Step]:
    """What is done, in the order of what matters most if the machine is taken away."""
    here = output / "data"
    here.mkdir(exist_ok=True)
    genomamba = [python, "-m", "mambapipelines.cli.genomamba.main"]
    audiomamba = [python, "-m", "mambapipelines.cli.audiomamba.main"]
    device = ["--device", "cpu" if rehearse else "cuda"]
    pytest = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    if not rehearse:
        yield Step("machine", ["nvidia-smi"], 20)
    yield Step("versions", [*genomamba, "doctor"], 60)
    interpreted = ["tests/mambacore/test_triton_interpreter.py", "-k", "half_precision or empty"]
    yield Step("tests", [*pytest, *(interpreted if rehearse else ["-m", "gpu"])], 240)
    tables = (("gpu_scan", 90), ("gpu_block", 45), ("gpu_generation", 45))
    for name, seconds in tables:
        command = [python, str(KERNELS / f"{name}.py"), "--output", str(output), "--budget-seconds", str(seconds)]
        yield Step(name, command, seconds + 60)
    genome = write_genome(here / "genome.fa", {"chr1": 8000 if rehearse else 3 * LONG_BP, "chr2": 2000}, 3)
    small = ["--recipe", "tiny", "--length", "256"]
    # The schedule would begin with short windows; a step is one window of the full length.
    large = ["--recipe", "mamba-7m", "--length", str(LONG_BP), "--set", f"batch.bases_per_step={LONG_BP}",
             "--set", "length.warmup_steps_per_stage=0"]  # fmt: skip
    yield Step(
        "pretrain",
        [*genomamba, "pretrain", "--reference", str(genome), *(small if rehearse else large), "--steps", "3", *device,
         "--valid-chromosomes", "chr2", "--output", str(output / "pretrain")],
        120,
    )  # fmt: skip
    clips = write_clips(here / "clips", 20, 800 if rehearse else RATE_HZ)
    small = ["--recipe", "tiny", "--set", "samples.clips=0"]
    large = ["--recipe", "sc09", "--set", "samples.clips=0"]
    yield Step(
        "audio",
        [*audiomamba, "train", str(clips), *(small if rehearse else large), "--steps", "3", *device,
         "--output", str(output / "audio")],
        120,
    )  # fmt: skip
    genomes = genomes_of(None if rehearse else data, here, 6000 if rehearse else 1_000_000)
    small = ["--recipe", "tiny", "--length", "128", "--steps", "3"]
    large = ["--length", "8192", "--minutes", "2"]
    yield Step(
        "train",
        [*genomamba, "train", *genomes, *(small if rehearse else large), *device, "--output", str(output / "train")],
        200,
    )


def environment(output: Path, wheels: Path | None) -> str:
    """The Python to use: this one, or that of an environment made from wheels."""
    if wheels is None:
        return sys.executable
    place = output / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = str(place / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    subprocess.run([*install, "genomamba[audio,test-tools]"], check=True)
    return python


def main() -> int:
    """Do everything; the number of steps that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder for everything")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of this project and all that it needs")
    parser.add_argument("--data", type=Path, help="folder of FASTA files, one per class, for the last step")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny settings")
    arguments = parser.parse_args()
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    python = environment(output, arguments.wheels)
    variables = os.environ | ({"TRITON_INTERPRET": "1"} if arguments.rehearse else {})
    failed = 0
    with (output / "summary.tsv").open("w", encoding="utf-8") as summary:
        summary.write("step\tstatus\tseconds\tcommand\n")
        for step in steps(python, output, arguments.data, arguments.rehearse):
            print(f"{step.name} ...", end=" ", flush=True)
            begin = time.monotonic()
            with (output / f"{step.name}.log").open("w", encoding="utf-8") as log:
                patience = REHEARSAL_PATIENCE if arguments.rehearse else 1
                status = run(step, step.seconds * patience, log.fileno(), variables)
            seconds = time.monotonic() - begin
            # The tables need a device: without one they say so and end with 2.
            fine = status == "0" or (arguments.rehearse and step.name.startswith("gpu_") and status == "2")
            failed += not fine
            print(f"{status} after {seconds:.0f} s", flush=True)
            summary.write(f"{step.name}\t{status}\t{seconds:.1f}\t{' '.join(step.command)}\n")
            summary.flush()
    return failed


def run(step: Step, seconds: int, log: int, variables: dict[str, str]) -> str:
    """How a step ended within some seconds: its exit code, `late`, or why it did not start."""
    try:
        done = subprocess.run(
            step.command, cwd=REPOSITORY, stdout=log, stderr=log, env=variables, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return "late"
    except OSError as error:
        return str(error.strerror)
    return str(done.returncode)


if __name__ == "__main__":
    sys.exit(main())
