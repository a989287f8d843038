"""The command `genomamba classify`: the species of each record."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import ModelArgument, ThreadsOption


def classify(
    model: ModelArgument,
    fasta: Annotated[
        list[str],
        typer.Argument(
            metavar="FASTA...", help="FASTA or FASTQ files, told apart by content, plain or gzipped; - is stdin."
        ),
    ],
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
    unknown_rate: Annotated[
        float,
        typer.Option(
            metavar="R",
            help="Records that fewer than this share of held-out windows are as unlikely as are called unknown.",
        ),
    ] = 0.0,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Add evidence up over groups of records: a TSV file of record and group, a regular expression with "
            "one group in brackets, or a separator after the group's name.",
        ),
    ] = None,
    groups_output: Annotated[Path | None, typer.Option(metavar="FILE", help="Table of the groups.")] = None,
    multiqc: Annotated[
        Path | None, typer.Option(metavar="FILE_mqc.tsv", help="Write a summary that MultiQC shows.")
    ] = None,
    classified_out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|PATTERN", help="Copy records to DIR/CLASS.fa, or to PATTERN with {call}; .gz is compressed."
        ),
    ] = None,
    unclassified_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Copy records called unknown or unclassified.")
    ] = None,
    processes: Annotated[
        int, typer.Option(metavar="N", help="Processes that share the work, each with --threads threads.")
    ] = 1,
) -> None:
    """Say which species each record of FASTA or FASTQ files is from.

    The table has one row per record in the order of the input, tab-separated: record, length, call, probability (of
    the call's class), then p_NAME for every class. Both strands are averaged, so a record and its reverse complement
    get the same answer. Records may be of any length; memory does not grow with it. An empty record, and one shorter
    than --min-length, is called unclassified and has NA for probabilities. Qualities of FASTQ are not used.

    --unknown-rate calls records unknown that are foretold worse than held-out windows of the classes, and adds the
    column typicality. The table is the same for any number of --processes, and under torchrun.

    **Examples**

    `genomamba classify model contigs.fa > calls.tsv`

    `zcat contigs.fa.gz | genomamba classify model - --min-length 1000 --unknown-below 0.9 --report calls.html`

    `genomamba classify model reads.fastq.gz --processes 4 --threads 1 --classified-out by_class --unclassified-out
    others.fa.gz --multiqc calls_mqc.tsv`

    `genomamba classify model bins.fa --group-by '^(bin[0-9]+)_' --groups-output bins.tsv --output contigs.tsv`
    """
    from mambapipelines.species.classify import ClassificationOptions, classify_files  # noqa: PLC0415

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
            unknown_rate=unknown_rate,
            group_by=group_by,
            groups_output=groups_output,
            multiqc=multiqc,
            classified_output=classified_out,
            unclassified_output=unclassified_out,
            processes=processes,
        )
    )
