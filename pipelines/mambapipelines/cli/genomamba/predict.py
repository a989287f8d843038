"""The command `genomamba predict`: labels of sequences from a fine-tuned model."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    InferencePrecisionOption,
    IntervalReferenceOption,
    RecordsOption,
    ThreadsOption,
)


def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder written by `genomamba finetune`, name of a shipped model, or hf://owner/name@revision.",
        ),
    ],
    sources: Annotated[
        list[str], typer.Argument(metavar="FASTA|TABLE...", help="Sequences, plain or compressed; - is standard input.")
    ],
    fasta: RecordsOption = None,
    reference: IntervalReferenceOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File for the table.", show_default="standard output"),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Predict labels for sequences with a fine-tuned model.

    The table has one row per record, in input order: record and length, then for classes call, probability and p_CLASS
    of each class, for labels p_COLUMN of each column, for numbers the predicted columns. A record without bases has NA.

    **Examples**

    `genomamba predict enhancer-model candidates.fa.gz > predictions.tsv`

    `genomamba predict signal-model peaks.tsv --reference hg38.fa --output predictions.tsv`
    """
    from mambapipelines.finetuning.predict import PredictionOptions, predict_files  # noqa: PLC0415

    predict_files(
        PredictionOptions(
            model_folder=model,
            sources=sources,
            fasta=fasta,
            reference=reference,
            output=output,
            threads=threads,
            device=device,
            precision=precision,
        )
    )
