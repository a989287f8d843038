"""The command `genomamba score-variants`: the variants of a VCF file."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import ThreadsOption


def score_variants(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a language model, or hf://owner/name@revision.")
    ],
    variants: Annotated[str, typer.Argument(metavar="VCF", help="VCF or BCF, plain or compressed; - is stdin.")],
    reference: Annotated[
        str,
        typer.Option(metavar="FASTA", help="What the variants were called against, plain or compressed with bgzip."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A table, or the VCF annotated when the name ends in .vcf, .vcf.gz.",
            show_default="standard output",
        ),
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", metavar="tsv|vcf", help="Whatever the name of --output says.")
    ] = None,
    window: Annotated[
        int, typer.Option(metavar="BP", help="Length of the two windows that are compared, equal for indels too.")
    ] = 1024,
    span: Annotated[
        int,
        typer.Option(
            min=0, metavar="BP", help="Masked models: bases on both sides of an indel that are scored along with it."
        ),
    ] = 5,
    both_strands: Annotated[
        bool, typer.Option("--both-strands/--one-strand", help="Average both strands, or read the given one only.")
    ] = True,
    chromosome_map: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lines of a name in the VCF and the name of the same contig in the FASTA."),
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Compare the likelihood of each alternative allele with that of the reference, in windows of equal length.

    A positive log_likelihood_ratio means that the model finds the alternative likelier than the reference, a negative
    one the opposite. Every record has a row for each of its alleles, in the order of the file; what cannot be scored
    says why in the column status: letters of REF that are not those of the reference, a symbolic allele, a contig that
    is not there.

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
        )
    )
