"""The command `genomamba classify`: which species is each record from?"""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.command_line import (
    EXIT_CODES,
    ModelArgument,
    ThreadsOption,
    command_group,
)

application = command_group("", "Which species is each record from?")


@application.command(epilog=EXIT_CODES)
def classify(
    model: ModelArgument,
    fasta: Annotated[list[str], typer.Argument(metavar="FASTA...", help="FASTA files, plain or gzipped; - is stdin.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the table goes.", show_default="standard output")
    ] = None,
    threads: ThreadsOption = None,
    min_length: Annotated[int, typer.Option(metavar="BP", help="Shorter records are called unclassified.")] = 1,
    unknown_below: Annotated[
        float, typer.Option(metavar="P", help="Records whose best class is less probable are called unknown.")
    ] = 0.0,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with plots.")] = None,
    piece_length: Annotated[
        int,
        typer.Option(metavar="BP", help="Bases that go through the model at once; the result does not depend on it."),
    ] = 16_384,
) -> None:
    """Say which species each record of FASTA files is from.

    The table has one row per record in the order of the input, tab-separated: record, length, call, probability (of
    the call's class), then p_NAME for every class. Both strands are averaged, so a record and its reverse complement
    get the same answer. Records may be of any length; memory does not grow with it. An empty record, and one shorter
    than --min-length, is called unclassified and has NA for probabilities.

    **Examples**

    `genomamba classify model contigs.fa > calls.tsv`

    `zcat contigs.fa.gz | genomamba classify model - --min-length 1000 --unknown-below 0.9 --report calls.html`
    """
    from mambapipelines.species_classification import ClassificationOptions, classify_files  # noqa: PLC0415

    classify_files(
        ClassificationOptions(
            model_folder=model,
            sources=fasta,
            output=output,
            threads=threads,
            minimum_length=min_length,
            unknown_below=unknown_below,
            report=report,
            piece_length=piece_length,
        )
    )
