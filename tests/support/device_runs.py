"""Training commands on the pretended device, in a process of their own: `python device_runs.py COMMAND FOLDER`.

For float32 and bfloat16, a command is run as a whole, and again cut after step 3 and resumed; then on the CPU in
float32. What came out is printed as JSON: the losses of each run, and whether the models' tensors are equal to the bit.
"""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import pretend_device
import pretend_process  # noqa: F401 - before modules that are patched
from genomamba.data.assemblies import GREAT_APES
from mambapipelines.training import sizes
from mambapipelines.training.metrics import read_metrics
from mambapipelines.training.progress import TrainingProgress
from tiny_assemblies import write_assemblies
from tiny_dna import yeast_like
from training_runs import CHANGES, write_genomes

STEPS = 5
CUT_AFTER = 3


def train(folder: Path) -> list[str]:
    """`genomamba train` with averaged weights, a length warm-up, calibration and the fit of the head."""
    genomes = [f"--genome={one.name}={one.paths[0]}" for one in write_genomes(folder)]
    changes = [part for change in CHANGES for part in ("--set", change)]
    return ["genomamba", "train", *genomes, "--holdout", "chr2", "--length", "128", "--recipe", "tiny", *changes]


def pretrain(folder: Path, *changes: str) -> list[str]:
    """`genomamba pretrain` of a causal model in pieces, interpolated with a Markov model."""
    changes = changes or ("pretraining.piece_length=64", "pretraining.counted_order=2")
    settings = [part for change in changes for part in ("--set", change)]
    genome = ["--reference", yeast_like(folder), "--valid-chromosomes", "chr4"]
    return ["genomamba", "pretrain", *genome, "--length", "256", "--recipe", "tiny", *settings]


def pretrain_masked(folder: Path) -> list[str]:
    """`genomamba pretrain` of a masked model."""
    return pretrain(folder, "objective=masked", "model.context_widths=[]", "model.tied_head=true")


def finetune(folder: Path) -> list[str]:
    """`genomamba finetune` on a table, a row of which is longer than a micro-batch."""
    lines = ["sequence\tlabel\tsplit"]
    for row in range(24):
        split = ("train", "valid", "test")[row % 3]
        lines.append(f"{'ACGT' * (5 + row)}{'GC' * (row % 2 * 8)}A\t{('x', 'y')[row % 2]}\t{split}")
    table = folder / "table.tsv"
    table.write_text("\n".join(lines) + "\n")
    return [
        "genomamba",
        "finetune",
        "--table",
        str(table),
        "--recipe",
        "tiny",
        "--set",
        "batch.bases_per_micro_batch=64",
    ]


def species_task(folder: Path) -> list[str]:
    """`genomamba species-task`; its schedule decides the number of steps."""
    write_assemblies(folder, GREAT_APES, chromosome_bp=600)
    small = ("protocol.windows_per_step=4", "protocol.epochs=5", "model.layers=1", "model.model_width=8")
    settings = [part for change in small for part in ("--set", change)]
    command = ["genomamba", "species-task", "great-apes", "--data", str(folder), "--length", "64", "--scale", "0.001"]
    return [*command, "--lengths", "32,64", "--per-class", "4", "--baseline", "composition", *settings]


def train_waveforms(folder: Path) -> list[str]:
    """`audiomamba train` with all kinds of layers of the tiny recipe, and samples at each validation."""
    from waveform_runs import write_tones  # noqa: PLC0415

    clips = write_tones(folder / "tones", 10, samples=600)
    changes = ("batch.clip_length=512", "batch.samples_per_step=1024", "batch.piece_length=256", "samples.seconds=0.01")
    return [
        "audiomamba",
        "train",
        str(clips),
        "--recipe",
        "tiny",
        *(p for change in changes for p in ("--set", change)),
    ]


def train_classifier(folder: Path) -> list[str]:
    """`audiomamba train-classifier` of two kinds of clips."""
    from waveform_runs import write_tones  # noqa: PLC0415

    clips = write_tones(folder / "tones", 12, samples=800)
    for number, path in enumerate(sorted(clips.iterdir())):
        path.rename(path.with_name(f"{number % 2}_{number}.wav"))
    labels = ["--label-pattern", "^([01])_", "--valid", "*_[89].wav", "--test", "*_1[01].wav"]
    small = ["--sample-rate", "8000", "--clip-seconds", "0.1", "--size", "tiny"]
    return ["audiomamba", "train-classifier", str(clips), *labels, *small]


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    each.__name__: each
    for each in (train, pretrain, pretrain_masked, finetune, species_task, train_waveforms, train_classifier)
}


def run(command: list[str], output: Path, *options: str, expected: int = 0) -> list[float]:
    """Run a command; the losses of its steps."""
    steps = [] if command[1] == "species-task" else ["--steps", str(STEPS)]
    sys.argv = ["", *command, *steps, "--threads", "1", "--output", str(output), *options]
    status = pretend_device.main()
    if status != expected:
        raise SystemExit(f"{command[:2]} {options} ended with {status}")
    return [float(row["loss"]) for row in read_metrics(output / "training" / "metrics.csv")]


def run_in_two_parts(command: list[str], output: Path, *options: str) -> list[float]:
    """Run a command that is interrupted after step `CUT_AFTER`, and resume it."""
    report = TrainingProgress.step

    def report_and_stop(self: TrainingProgress, step: int, *figures: float) -> None:
        report(self, step, *figures)
        if step == CUT_AFTER:
            signal.raise_signal(signal.SIGTERM)

    TrainingProgress.step = report_and_stop  # type: ignore[method-assign]
    try:
        run(command, output, *options, expected=128 + signal.SIGTERM)
    finally:
        TrainingProgress.step = report  # type: ignore[method-assign]
    return run(command, output, *options, "--resume")


def main() -> None:
    """Print what came out."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    command = COMMANDS[name](folder)
    torch.set_num_threads(1)
    sizes.POSITIONS_ON_A_DEVICE = 128  # so that there are micro-batches, and pieces of them
    found: dict[str, Any] = {"cpu": run(command, folder / "cpu", "--device", "cpu", "--precision", "float32")}
    for precision in ("float32", "bfloat16"):
        options = ("--device", "pretend", "--precision", precision)
        whole, parts = folder / precision, folder / f"{precision}-parts"
        found[precision] = run(command, whole, *options)
        found[f"{precision} in parts"] = run_in_two_parts(command, parts, *options)
        # Tensors, not files: the order of a file's metadata is another every time.
        one, other = (load_file(output / "model.safetensors") for output in (whole, parts))
        same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        found[f"{precision} same"] = same
    print(json.dumps(found))


if __name__ == "__main__":
    main()
