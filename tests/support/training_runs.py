"""Small training runs of the species classifier with every option on, as processes that can be killed."""

import os
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genomamba.data.genomes import GenomeSpecification
from mambacore.errors import InputError
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier
from mambapipelines.training import recorder

CHANGES = (
    "optimizer.schedule=plateau",
    "optimizer.plateau_patience=1",
    "optimizer.average_decay=0.8",
    "length.warmup_first_length=32",
    "length.warmup_steps_per_stage=10",
    "checkpoints.keep_last=2",
    "checkpoints.keep_best=1",
    "batch.bases_per_step=512",
    "batch.bases_per_micro_batch=256",
)


def write_genomes(folder: Path) -> list[GenomeSpecification]:
    """Two classes of different composition, each with a chromosome to train on and one to hold out."""
    random = np.random.default_rng(5)
    specifications = []
    for number, probabilities in enumerate([[0.3, 0.2, 0.2, 0.3], [0.2, 0.3, 0.3, 0.2]]):
        letters = ["".join(random.choice(list("ACGT"), 3000, p=probabilities)) for _ in range(2)]
        path = folder / f"{number}.fa"
        path.write_text("".join(f">chr{name}\n{text}\n" for name, text in zip("12", letters, strict=True)))
        specifications.append(GenomeSpecification(f"class{number}", (str(path),)))
    return specifications


def run_options(folder: Path, output: Path, steps: int, changes: tuple[str, ...] = CHANGES) -> SpeciesTrainingOptions:
    """Options of a run on the genomes of `write_genomes(folder)`, which goes on where one is."""
    specifications = [GenomeSpecification(f"class{number}", (str(folder / f"{number}.fa"),)) for number in range(2)]
    return SpeciesTrainingOptions(
        genomes=specifications, length=128, output=output, holdout=["chr2"], steps=steps, recipe="tiny",
        changes=changes, threads=1, resume=True,
    )  # fmt: skip


def save_every_step_and_report_to(errors: Path) -> None:
    """What every process of a test run begins with: one thread, a state per step, standard error in a file."""
    torch.set_num_threads(1)
    recorder.SECONDS_BETWEEN_SAVES = 0.0
    # A process that is killed loses nothing that it has written; flushing is against a power cut, which no test brings,
    # and takes most of the time on a busy disk.
    os.fsync = lambda descriptor: None
    os.environ["TERM"] = "dumb"
    with errors.open("a") as file:
        os.dup2(file.fileno(), 2)


def train_in_process(options: SpeciesTrainingOptions, largest_file: int | None = None) -> None:
    """The body of a process: train, saving after every step; exits with 2 and the sentence on standard error.

    Args:
        options: of the run.
        largest_file: bytes after which writing to a file fails, as it does on a full disk.
    """
    save_every_step_and_report_to(options.output.with_suffix(".err"))
    if largest_file is not None:
        # Python ignores SIGXFSZ, so that write() fails with EFBIG in the middle of a file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    try:
        train_species_classifier(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def work_as_rank(work: Callable[..., object], options: Any, rank: int, count: int, port: int) -> None:
    """The body of one of the processes that torchrun starts."""
    os.environ.update(
        TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count), GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    work(options)


def start_ranks(context: Any, work: Callable[..., object], options: Any, count: int) -> list[Any]:
    """Processes of a multiprocessing context that train together, as torchrun would start them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = [context.Process(target=work_as_rank, args=(work, options, rank, count, port)) for rank in range(count)]
    for process in started:
        process.start()
    return started


def exit_codes(started: list[Any], seconds: float = 200) -> list[int | None]:
    """Wait for processes; those that are still there then are killed and have no code."""
    for process in started:
        process.join(seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes
