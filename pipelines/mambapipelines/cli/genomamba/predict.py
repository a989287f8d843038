"""The command `genomamba predict`: labels of sequences from a fine-tuned model."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import IntervalReferenceOption, RecordsOption, ThreadsOption


def predict(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder written by `genomamba finetune`, or hf://owner/name@revision."),
    ],
    sources: Annotated[
        list[str], typer.Argument(metavar="FASTA|TABLE...", help="Sequences, plain or gzipped; - is standard input.")
    ],
    fasta: RecordsOption = None,
    reference: IntervalReferenceOption = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the table goes.", show_default="standard output")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Say what a fine-tuned model says of each sequence.

    The table has one row for each record in the order of the input: record, length, and for classes call, probability
    and p_CLASS for each; for labels p_COLUMN for each; for numbers their columns. A record without bases has NA.

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
        )
    )
