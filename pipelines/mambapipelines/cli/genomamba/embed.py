"""The command `genomamba embed`: vectors of records, regions or windows."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import LanguageModelArgument, ThreadsOption


def embed(
    model: LanguageModelArgument,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Ends in .parquet, .npz or .h5ad (AnnData).")],
    fasta: Annotated[
        list[str] | None, typer.Argument(metavar="[FASTA]...", help="FASTA, plain or gzipped; - is stdin.")
    ] = None,
    bed: Annotated[
        str | None, typer.Option(metavar="FILE", help="Regions instead; those of strand - are turned round.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="FASTA", help="The genome of --bed, plain or compressed with bgzip.")
    ] = None,
    pooling: Annotated[str, typer.Option(metavar="mean|last|max", help="How positions become one vector.")] = "mean",
    layer: Annotated[
        int | None, typer.Option(help="After how many layers, from 1.", show_default="the last one")
    ] = None,
    both_strands: Annotated[
        bool,
        typer.Option("--both-strands/--one-strand", help="Average with the vector of the reverse complement."),
    ] = False,
    window: Annotated[
        int | None, typer.Option(metavar="BP", help="A vector per window.", show_default="per record or region")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="BP", help="From one window's start to the next.", show_default="--window")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Turn records, regions or windows into vectors.

    A vector depends on its own sequence alone, not on what else is in the file. Rows are in the order of the input and
    have the columns name, start and end (0-based, end exclusive) beside the vector.

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
        )
    )
