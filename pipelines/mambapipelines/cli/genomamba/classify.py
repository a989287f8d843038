"""The command `genomamba classify`: the species of each record."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    InferencePrecisionOption,
    ModelArgument,
    ThreadsOption,
)


def classify(
    model: ModelArgument,
    fasta: Annotated[
        list[str],
        typer.Argument(
            metavar="FASTA...", help="FASTA or FASTQ files, recognised by content, plain or compressed; - is stdin."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File for the table.", show_default="standard output"),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
    min_length: Annotated[int, typer.Option(metavar="BP", help="Leave shorter records unclassified.")] = 1,
    unknown_below: Annotated[
        float, typer.Option(metavar="P", help="Call a record unknown if its best class has a probability below P.")
    ] = 0.0,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write an HTML report with plots.")] = None,
    piece_length: Annotated[
        int,
        typer.Option(metavar="BP", help="Bases processed at once; the result does not depend on it."),
    ] = 16_384,
    unknown_rate: Annotated[
        float,
        typer.Option(
            metavar="R",
            help="Call a record unknown if its p-value against held-out windows is below R.",
        ),
    ] = 0.0,
    unknown_shared: Annotated[
        float,
        typer.Option(
            metavar="S",
            help="Call a record unknown if no class has this share of its words of 21 bases (0 to 1).",
        ),
    ] = 0.0,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Sum evidence over groups of records: a TSV file of record and group, a regular expression with "
            "one capturing group, or a separator that ends the group's name.",
        ),
    ] = None,
    groups_output: Annotated[Path | None, typer.Option(metavar="FILE", help="File for the table of groups.")] = None,
    multiqc: Annotated[Path | None, typer.Option(metavar="FILE_mqc.tsv", help="Write a summary for MultiQC.")] = None,
    classified_out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|PATTERN", help="Copy records to DIR/CLASS.fa, or to PATTERN with {call}; .gz compresses."
        ),
    ] = None,
    unclassified_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Copy unknown and unclassified records to this file.")
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", "-p", metavar="N", help="Processes, each with --threads threads.")
    ] = 1,
    kraken_report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the calls as a Kraken report (Krona, Pavian, Bracken)."),
    ] = None,
    biom: Annotated[
        Path | None, typer.Option(metavar="FILE.biom", help="Write the records of each input by call as a BIOM table.")
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of this input's shards: --shard writes one; otherwise all are merged."
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="K/N", help="Classify the K-th of N shards into --parts, as one of N jobs.")
    ] = None,
    paired: Annotated[
        bool,
        typer.Option(
            "--paired", help="Call two mates (r/1, r/2) as one: interleaved in one file, or in pairs of files."
        ),
    ] = False,
) -> None:
    """Classify each record of FASTA or FASTQ files by species.

    The tab-separated table has one row per record, in input order: record, length, call, probability (of the best
    class), then p_NAME for every class. Both strands are averaged, so a record and its reverse complement get the same
    call. Records may have any length; memory does not grow with it. A record that is shorter than --min-length, or has
    no known base, is unclassified and has NA for probabilities. FASTQ qualities are not used.

    --unknown-rate detects out-of-distribution records, which are predicted worse than held-out windows of the classes,
    and adds the column p_value. --unknown-shared detects relatives of the classes, and loci that the training genomes
    do not have, and adds the column shared. The table is the same for any number of --processes, and under torchrun.

    **Examples**

    `genomamba classify model contigs.fa > calls.tsv`

    `zcat contigs.fa.gz | genomamba classify model - --min-length 1000 --unknown-below 0.9 --report calls.html`

    `genomamba classify model reads.fastq.gz --processes 4 --threads 1 --classified-out by_class --unclassified-out
    others.fa.gz --multiqc calls_mqc.tsv`

    `genomamba classify model reads_R1.fq.gz reads_R2.fq.gz --paired -t 4 -o calls.tsv`

    `genomamba classify model bins.fa --group-by '^(bin[0-9]+)_' --groups-output bins.tsv --output contigs.tsv`
    """
    from mambapipelines.species.classify import ClassificationOptions, classify_files  # noqa: PLC0415

    classify_files(
        ClassificationOptions(
            model_folder=model,
            sources=fasta,
            output=output,
            threads=threads,
            device=device,
            precision=precision,
            minimum_length=min_length,
            unknown_below=unknown_below,
            report=report,
            piece_length=piece_length,
            unknown_rate=unknown_rate,
            unknown_shared=unknown_shared,
            group_by=group_by,
            groups_output=groups_output,
            multiqc=multiqc,
            classified_output=classified_out,
            unclassified_output=unclassified_out,
            processes=processes,
            paired=paired,
            kraken_report=kraken_report,
            biom=biom,
            parts=parts,
            shard=shard,
        )
    )
