"""Small training runs of a waveform model, and generation, as processes that can be killed or run out of disk."""

import resource
from pathlib import Path

import numpy as np
import torch

from audiomamba.data.writing import write_waveform
from mambapipelines.cli.audiomamba.main import main
from training_runs import save_every_step_and_report_to

RATE = 8000
CHANGES = (
    "optimizer.average_decay=0.8",
    "checkpoints.keep_last=2",
    "batch.clip_length=64",
    "batch.samples_per_step=128",
    "batch.samples_per_micro_batch=64",
    "drawn.clips=0",
)


def write_tones(folder: Path, count: int, samples: int = 100) -> Path:
    """Clips of tones of different pitch, named after their numbers."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(count):
        phase = 2 * np.pi * random.uniform(200, 900) * np.arange(samples) / RATE
        write_waveform(folder / f"tone-{number:02d}.wav", torch.from_numpy(0.4 * np.sin(phase)).float(), RATE)
    return folder


def training_command(clips: Path, output: Path, steps: int, *more: str) -> list[str]:
    """`audiomamba train` of the tiny recipe on the clips of `write_tones`, without what is not tested."""
    command = ["train", str(clips), "--output", str(output), "--recipe", "tiny", "--steps", str(steps)]
    return [*command, "--threads", "1", *(part for change in CHANGES for part in ("--set", change)), *more]


def run_in_process(command: list[str], errors: Path, largest_file: int | None = None) -> None:
    """The body of a process: the command line, which saves after every step; exits with its status.

    Args:
        command: arguments of `audiomamba`.
        errors: a file that standard error is added to.
        largest_file: bytes after which writing to a file fails, as it does on a full disk.
    """
    save_every_step_and_report_to(errors)
    if largest_file is not None:
        # Python ignores SIGXFSZ, so that write() fails with EFBIG in the middle of a file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    raise SystemExit(main(command))
