"""The command `genomamba score-variants`: scores for the variants of a VCF file."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    InferencePrecisionOption,
    ThreadsOption,
)


def score_variants(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder of a language model, name of a shipped one, or hf://owner/name@revision."
        ),
    ],
    variants: Annotated[str, typer.Argument(metavar="VCF", help="VCF or BCF, plain or compressed; - is stdin.")],
    reference: Annotated[
        str,
        typer.Option(metavar="FASTA", help="Genome the variants were called against, plain or compressed with bgzip."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Output file: a table, or the annotated VCF if it ends in .vcf or .vcf.gz.",
            show_default="standard output",
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option("--format", metavar="tsv|vcf", help="Output format, overriding the ending of --output."),
    ] = None,
    window: Annotated[
        int, typer.Option(metavar="BP", help="Length of the two compared windows, equal for indels too.")
    ] = 1024,
    span: Annotated[
        int,
        typer.Option(min=0, metavar="BP", help="Masked models: bases scored on both sides of an indel."),
    ] = 5,
    both_strands: Annotated[
        bool, typer.Option("--both-strands/--one-strand", help="Average both strands, or read the forward strand only.")
    ] = True,
    chromosome_map: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Two columns: contig name in the VCF, contig name in the FASTA."),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Score variants by the likelihood ratio of alternative and reference allele, in windows of equal length.

    A positive log_likelihood_ratio means that the model prefers the alternative allele. Every alternative allele has a
    row, in file order; the column status says why an allele was not scored: REF differs from the reference, a symbolic
    allele, or an unknown contig.

    **Examples**

    `genomamba score-variants model variants.vcf.gz --reference ref.fa --output scores.tsv`

    `genomamba score-variants model variants.vcf.gz --reference ref.fa --output annotated.vcf.gz --window 4096`

    `bcftools view -r chr20 all.vcf.gz | genomamba score-variants model - --reference ref.fa --format vcf`
    """
    from mambapipelines.language.score_variants import VariantScoringOptions, run_variant_scoring  # noqa: PLC0415

    run_variant_scoring(
        VariantScoringOptions(
            model=model,
            variants=variants,
            reference=reference,
            output=output,
            output_format=output_format,
            window=window,
            span=span,
            both_strands=both_strands,
            chromosome_map=chromosome_map,
            threads=threads,
            device=device,
            precision=precision,
        )
    )
