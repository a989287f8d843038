"""The command `genomamba track`: the log-likelihood of every base of a genome."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    InferencePrecisionOption,
    LanguageModelArgument,
    ThreadsOption,
)


def track(
    model: LanguageModelArgument,
    reference: Annotated[str, typer.Option(metavar="FASTA", help="Genome, plain or compressed with bgzip.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Output file: bigWig if it ends in .bw, else bedGraph.",
            show_default="bedGraph to standard output",
        ),
    ] = None,
    region: Annotated[
        list[str] | None, typer.Option(metavar="CHR[:START[-[END]]]", help="Region, 1-based, end included. Repeatable.")
    ] = None,
    bed: Annotated[
        str | None, typer.Option(metavar="FILE", help="Regions as BED; overlapping ones are merged.")
    ] = None,
    both_strands: Annotated[
        bool, typer.Option("--both-strands/--one-strand", help="Average both strands, or read the forward strand only.")
    ] = True,
    igv_session: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Write a session that opens --output in IGV.")
    ] = None,
    context: Annotated[
        int, typer.Option(min=0, metavar="BP", help="Causal models: bases read before a region but not scored.")
    ] = 4096,
    window: Annotated[
        int, typer.Option(metavar="BP", help="Masked models: length of the window around each base.")
    ] = 1024,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Write the log-likelihood (in nats) of every base of a genome, or of regions of it.

    Letters other than A, C, G and T have no value. The perplexity of each contig goes to standard error; that of a
    uniform model is 4. Memory does not grow with the length of a contig.

    **Examples**

    `genomamba track model --reference genome.fa --output genome.bw`

    `genomamba track model --reference genome.fa --region chr20:1,000,001-1,100,000 > piece.bedgraph`
    """
    from mambapipelines.language.track import TrackOptions, run_track  # noqa: PLC0415

    run_track(
        TrackOptions(
            model=model,
            reference=reference,
            output=output,
            regions=region or [],
            bed=bed,
            both_strands=both_strands,
            context=context,
            igv_session=igv_session,
            window=window,
            threads=threads,
            device=device,
            precision=precision,
        )
    )
