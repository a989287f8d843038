"""The commands that use a language model of DNA: embed, generate and track."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import EXIT_CODES, SeedOption, ThreadsOption, command_group

# Without a name the commands stand among those of the program.
application = command_group("", "What a language model of DNA says of sequences.")

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a language model, or hf://owner/name@revision.")
]


@application.command(epilog=EXIT_CODES)
def embed(
    model: ModelArgument,
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


@application.command(epilog=EXIT_CODES)
def generate(
    model: ModelArgument,
    length: Annotated[int, typer.Option(metavar="BP", help="New bases per record.")],
    records: Annotated[int, typer.Option(help="How many; with prompts, of each.")] = 1,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="FASTA|LETTERS", help="What to continue: each record of a file (- is stdin), or letters of DNA."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Below 1 likelier bases, above 1 rarer; 0 the likeliest.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Choose among so many of the likeliest bases, 1 to 4.")] = 4,
    top_p: Annotated[float, typer.Option(help="Choose among the fewest bases with this much probability.")] = 1.0,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where FASTA goes.", show_default="standard output")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Sample DNA from a causal language model, as FASTA.

    Headers say the log-likelihood (natural) of the new bases under the model itself, whatever the temperature. A prompt
    is read and not repeated in the output. Record number i depends on the seed and on i alone.

    **Examples**

    `genomamba generate model --records 10 --length 2000 --seed 1 --output new.fa`

    `genomamba generate model --prompt TATAAAAGGC --length 500 --temperature 0.8 --top-p 0.95`
    """
    from genomamba.scoring.generation import Sampling  # noqa: PLC0415
    from mambapipelines.language.generate import GenerationOptions, run_generation  # noqa: PLC0415

    run_generation(
        GenerationOptions(
            model=model,
            records=records,
            length=length,
            prompt=prompt,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            output=output,
            threads=threads,
        )
    )


@application.command(epilog=EXIT_CODES)
def track(
    model: ModelArgument,
    reference: Annotated[str, typer.Option(metavar="FASTA", help="The genome, plain or compressed with bgzip.")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="bigWig when it ends in .bw, else bedGraph.",
            show_default="bedGraph to standard output",
        ),
    ] = None,
    region: Annotated[
        list[str] | None, typer.Option(metavar="CHR[:START-END]", help="Where, 1-based, end included. Repeatable.")
    ] = None,
    bed: Annotated[str | None, typer.Option(metavar="FILE", help="Where, as BED; what overlaps is read once.")] = None,
    both_strands: Annotated[
        bool, typer.Option("--both-strands/--one-strand", help="Average both strands, or read the given one only.")
    ] = True,
    context: Annotated[
        int, typer.Option(min=0, metavar="BP", help="Causal models: bases read in front of a region, not scored.")
    ] = 4096,
    window: Annotated[int, typer.Option(metavar="BP", help="Masked models: bases seen around each.")] = 1024,
    threads: ThreadsOption = None,
) -> None:
    """Write the log-likelihood (natural) of every base of a genome, or of regions of it.

    Bases that are not A, C, G or T have no value. A table of the perplexity of each contig goes to standard error; a
    model that knows nothing has 4. Memory does not grow with the length of a contig.

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
            window=window,
            threads=threads,
        )
    )
