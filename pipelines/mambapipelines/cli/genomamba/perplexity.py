"""The command `genomamba perplexity`: a language model compared with Markov models."""

from pathlib import Path
from typing import Annotated, cast

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    GenomesOption,
    InferencePrecisionOption,
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
        str,
        typer.Argument(
            metavar="MODEL", help="Folder of a language model, name of a shipped one, or hf://owner/name@revision."
        ),
    ],
    reference: GenomesOption,
    lengths: Annotated[
        str, typer.Option(metavar="BP[,BP...]", help="Window lengths, that is, the longest context of a base.")
    ] = "1024,8192,65536",
    intervals: IntervalsOption = None,
    rule: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How rows of --intervals become windows.", show_default="the model's"),
    ] = None,
    valid_chromosomes: ValidChromosomesOption = None,
    test_chromosomes: TestChromosomesOption = None,
    exclude_chromosomes: Annotated[
        list[str] | None, typer.Option(metavar="CHR[,CHR...]", help="Chromosomes to exclude.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="train|valid|test", help="Split to score.")] = "test",
    bases: Annotated[
        int, typer.Option(metavar="BP", help="Maximum number of bases per length, spread over the split.")
    ] = 4_000_000,
    markov: Annotated[bool, typer.Option("--markov/--no-markov", help="Fit Markov models for comparison.")] = True,
    markov_order: Annotated[int, typer.Option(metavar="K", help="Highest order of the Markov models, up to 12.")] = 12,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.tsv", help="File for the table.", show_default="standard output"),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Measure the perplexity per base of a language model, compared with Markov models of all orders.

    Markov models are fitted to all training bases of the references, on both strands; their interpolation weights and
    the best order are chosen on the validation split. All are scored on the same bases: A, C, G and T of each window
    after its first position. Intervals are at 95 %, over blocks of up to 65,536 bp; `ratio` is a model's perplexity
    divided by that of MODEL. Splits are those of the model's training unless they are given.

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
            device=device,
            precision=precision,
        )
    )
