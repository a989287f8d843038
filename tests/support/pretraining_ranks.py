"""Small pretraining runs of a causal model in float64, alone or as the processes of torchrun."""

import json
from pathlib import Path

from genomamba.models.language_model import CoreModel
from mambapipelines.language.recipe import PretrainingRecipe
from mambapipelines.language.train import PretrainingOptions, pretrain
from mambapipelines.training.progress import TrainingProgress
from tiny_dna import predictable_dna, write_genome
from training_runs import save_every_step_and_report_to

# 250 bases are no multiple of 4 ranks. Two micro-batches of two windows; one of the first stages has short windows.
LENGTH = 250
CHANGES = (
    "model.layers=2",
    "model.output_context_widths=[2, 3]",
    "batch.bases_per_step=1000",
    "batch.bases_per_micro_batch=500",
    "pretraining.piece_length=100",
    "length.warmup_first_length=125",
    "length.warmup_steps_per_stage=2",
    "optimizer.average_decay=0.8",
    "checkpoints.keep_last=9",
)


def write_reference(folder: Path) -> str:
    """A genome with stretches of N, so that ranks have different numbers of bases to predict."""
    letters = bytearray(predictable_dna(6000, seed=1))
    for start in range(0, 6000, 300):
        letters[start : start + 130] = b"N" * 130
    return write_genome(folder / "genome.fa", {"chr1": bytes(letters), "chr2": predictable_dna(1500, seed=2)})


def pretraining_options(folder: Path, output: str, steps: int, changes: tuple[str, ...] = ()) -> PretrainingOptions:
    """Options of a run on the genome of `write_reference(folder)`."""
    return PretrainingOptions(
        references=[str(folder / "genome.fa")], length=LENGTH, output=folder / output, valid_chromosomes=["chr2"],
        steps=steps, recipe="tiny", changes=(*CHANGES, *changes), threads=1, resume=True,
    )  # fmt: skip


def pretrain_in_float64(options: PretrainingOptions) -> None:
    """The body of a process: pretrain; the first rank's losses, all their digits, go beside the output folder."""
    save_every_step_and_report_to(options.output.with_suffix(".err"))
    build, report, losses = PretrainingRecipe.build_model, TrainingProgress.step, []

    def build_in_float64(recipe: PretrainingRecipe) -> CoreModel:
        return build(recipe).double()

    def report_and_keep(self: TrainingProgress, step: int, loss: float, units_per_second: float) -> None:
        report(self, step, loss, units_per_second)
        losses.append(loss)

    PretrainingRecipe.build_model, TrainingProgress.step = build_in_float64, report_and_keep
    pretrain(options)
    options.output.with_suffix(".json").write_text(json.dumps(losses))
