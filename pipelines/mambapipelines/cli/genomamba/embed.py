"""The command `genomamba embed`: vectors of records, regions or windows."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    InferencePrecisionOption,
    LanguageModelArgument,
    ThreadsOption,
)


def embed(
    model: LanguageModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Output file: .parquet, .npz or .h5ad (AnnData).")
    ],
    fasta: Annotated[
        list[str] | None, typer.Argument(metavar="[FASTA]...", help="FASTA or FASTQ, plain or compressed; - is stdin.")
    ] = None,
    bed: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Embed these regions of --reference; those on strand - are reverse-complemented."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="FASTA", help="Genome of --bed, plain or compressed with bgzip.")
    ] = None,
    pooling: Annotated[
        str, typer.Option(metavar="mean|last|max", help="How to pool positions into one vector.")
    ] = "mean",
    layer: Annotated[
        int | None, typer.Option(help="Layer whose output is pooled, from 1.", show_default="the last")
    ] = None,
    both_strands: Annotated[
        bool,
        typer.Option("--both-strands/--one-strand", help="Average with the embedding of the reverse complement."),
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(metavar="BP", help="Embed windows of this length.", show_default="whole records or regions"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="BP", help="Distance between the starts of consecutive windows.", show_default="--window"),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Embed records, regions or windows as vectors.

    An embedding depends only on its own sequence, not on the rest of the file. Rows are in input order, with the
    columns name, start and end (0-based, half-open) and the vector.

    **Examples**

    `genomamba embed model contigs.fa.gz --output contigs.parquet`

    `genomamba embed model genome.fa --window 4096 --stride 2048 --both-strands --output windows.h5ad`

    `genomamba embed model --bed genes.bed --reference genome.fa --layer 4 --pooling max --output genes.npz`
    """
    from mambapipelines.language.embed import EmbeddingOptions, run_embedding  # noqa: PLC0415

    run_embedding(
        EmbeddingOptions(
            model=model,
            fasta=fasta or [],
            bed=bed,
            reference=reference,
            output=output,
            pooling=pooling,
            layer=layer,
            both_strands=both_strands,
            window=window,
            stride=stride,
            threads=threads,
            device=device,
            precision=precision,
        )
    )
