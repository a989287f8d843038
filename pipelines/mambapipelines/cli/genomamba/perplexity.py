"""The command `genomamba perplexity`: a language model beside Markov models."""

from pathlib import Path
from typing import Annotated, cast

import typer

from mambapipelines.cli.options import (
    GenomesOption,
    IntervalsOption,
    TestChromosomesOption,
    ThreadsOption,
    ValidChromosomesOption,
    entries,
    input_error,
    integer,
    names,
)


def perplexity(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a language model, or hf://owner/name@revision.")
    ],
    reference: GenomesOption,
    lengths: Annotated[
        str, typer.Option(metavar="BP[,BP...]", help="Window lengths: how much a base is foretold from.")
    ] = "1024,8192,65536",
    intervals: IntervalsOption = None,
    rule: Annotated[
        str | None, typer.Option(metavar="NAME", help="How rows become windows.", show_default="the model's")
    ] = None,
    valid_chromosomes: ValidChromosomesOption = None,
    test_chromosomes: TestChromosomesOption = None,
    exclude_chromosomes: Annotated[
        list[str] | None, typer.Option(metavar="CHR[,CHR...]", help="Chromosomes not to use at all.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="train|valid|test", help="What is measured on.")] = "test",
    bases: Annotated[
        int, typer.Option(metavar="BP", help="At most so many of each length, spread over the split.")
    ] = 4_000_000,
    markov: Annotated[bool, typer.Option("--markov/--no-markov", help="Markov models beside the model.")] = True,
    markov_order: Annotated[int, typer.Option(metavar="K", help="Order of the longest, up to 12.")] = 12,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.tsv", help="Where the table goes.", show_default="standard output")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure the perplexity per base of a language model, beside Markov models of all orders.

    Markov models are trained on all training bases of the references, on both strands; how strongly their orders are
    interpolated, and which order is called the best, is chosen on the validation split. All are scored on the same
    bases: A, C, G and T of each window after its first. Intervals are at 95 %, over blocks of up to 65,536 bp;
    `ratio` is a scorer's perplexity divided by the model's. Splits are those of the model's training unless they are
    given.

    **Examples**

    `genomamba perplexity yeast-model --reference S288C.fa --reference CBS432.fa --lengths 1024,8192,65536`

    `genomamba perplexity caduceus --reference hg38.fa --intervals human-sequences.bed --lengths 1024 --no-markov`
    """
    from genomamba.data.intervals import SPLITS, Split  # noqa: PLC0415
    from mambapipelines.language.evaluate import PerplexityOptions, measure_perplexity  # noqa: PLC0415

    if split not in SPLITS:
        raise input_error(f"--split is '{split}': use train, valid or test.")
    measure_perplexity(
        PerplexityOptions(
            model=model,
            references=reference,
            lengths=[integer(length, "--lengths") for length in entries(lengths, "--lengths")],
            intervals=intervals,
            rule=rule,
            valid_chromosomes=names(valid_chromosomes, "--valid-chromosomes"),
            test_chromosomes=names(test_chromosomes, "--test-chromosomes"),
            exclude_chromosomes=names(exclude_chromosomes, "--exclude-chromosomes"),
            split=cast(Split, split),
            bases=bases,
            markov_order=markov_order if markov else None,
            output=output,
            threads=threads,
        )
    )
