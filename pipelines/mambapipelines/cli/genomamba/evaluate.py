"""The command `genomamba evaluate`: accuracy by length on held-out sequences."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    BaselineOption,
    GenomeOption,
    ModelArgument,
    SeedOption,
    ThreadsOption,
    baseline_names,
    entries,
    genome_specifications,
    integer,
)


def evaluate(
    model: ModelArgument,
    genome: GenomeOption,
    lengths: Annotated[
        str, typer.Option(metavar="BP[,BP...]", help="Window lengths.")
    ] = "1024,4096,16384,65536,262144,1048576",
    per_class: Annotated[int, typer.Option(help="Windows of each class and length, if there are so many.")] = 200,
    baseline: BaselineOption = None,
    training_genome: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH[,PATH...]",
            help="Where the training genomes are now, for the baselines, if not where they were.",
        ),
    ] = None,
    outsider: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH[,PATH...]",
            help="Genomes of none of the classes: how many of their windows are detected as foreign? May be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE.tsv", help="Folder for table and plot, or the table.", show_default="standard output"
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Accuracy by length as a picture.")] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Measure accuracy by length on held-out sequences, beside baselines on the same windows.

    Test windows come from the sequences that training held out; a file without any of them that was not trained on is
    used whole. Baselines are fitted to the model's training sequences, with all choices made there. Intervals are
    Wilson's at 95 %, for as many trials as there are windows or, if fewer, windows that do not overlap; chromosomes of
    one name in several files of a class count once. No length has more than four windows for each of those. Windows
    have at most 1 % of unknown bases, or 5 % at lengths where a class has no others.

    For an --outsider the model's rows tell, at a rate of 5 % that was set on the windows the model was calibrated on,
    the share of its windows that are called unknown (detected) and of test windows of the classes (false_alarms); and
    the area under the receiver operating characteristic of the score of --unknown-rate (auroc), of the evidence alone
    (likelihood_auroc) and of the best class's probability (probability_auroc), a control.

    **Examples**

    `genomamba evaluate model --genome cow=cow.fa.gz --genome dog=dog.fa --output evaluation`

    `genomamba evaluate model --genome cow=cow.fa.gz --genome dog=dog.fa --lengths 1024,65536 --baseline kmer`

    `genomamba evaluate model --genome cow=cow.fa.gz --genome dog=dog.fa --outsider hen=hen.fa --output evaluation`
    """
    from mambapipelines.species.evaluate import (  # noqa: PLC0415
        EvaluationOptions,
        evaluate_species_classifier,
    )

    evaluate_species_classifier(
        EvaluationOptions(
            model_folder=model,
            genomes=genome_specifications(genome),
            lengths=[integer(length, "--lengths") for length in entries(lengths, "--lengths")],
            per_class=per_class,
            baselines=baseline_names(baseline),
            training_genomes=genome_specifications(training_genome or []),
            output=output,
            plot=plot,
            seed=seed,
            threads=threads,
            outsiders=genome_specifications(outsider or []),
        )
    )
