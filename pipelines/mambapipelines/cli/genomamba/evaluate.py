"""The command `genomamba evaluate`: accuracy by length on held-out sequences."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    BaselineOption,
    DeviceOption,
    GenomeListOption,
    InferencePrecisionOption,
    ModelArgument,
    SeedOption,
    ThreadsOption,
    baseline_names,
    entries,
    genome_specifications,
    integer,
    required_genomes,
)


def evaluate(
    model: ModelArgument,
    genome: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH[,PATH...]",
            help="Test genomes: a class and its FASTA files, once per class.",
            show_default="held-out parts of the training genomes",
        ),
    ] = None,
    genomes: GenomeListOption = None,
    lengths: Annotated[
        str, typer.Option(metavar="BP[,BP...]", help="Window lengths.")
    ] = "1024,4096,16384,65536,262144,1048576",
    per_class: Annotated[int, typer.Option(help="Maximum number of windows per class and length.")] = 200,
    baseline: BaselineOption = None,
    training_genome: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH[,PATH...]",
            help="Current location of the training genomes, for the baselines, if they have moved. Repeatable.",
        ),
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            "--ood",
            metavar="NAME=PATH[,PATH...]",
            help="Measure OOD detection on a genome of none of the classes. Repeatable.",
        ),
    ] = None,
    # The option's former name.
    outsider: Annotated[list[str] | None, typer.Option("--outsider", hidden=True)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR|FILE.tsv",
            help="Folder for the table and the plot, or a file for the table.",
            show_default="standard output",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Plot accuracy by length.")] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Measure accuracy by length on held-out sequences, compared with baselines on the same windows.

    Without --genome the model is evaluated on the held-out parts of its training genomes. Test windows are sampled from
    sequence held out in training; files that were not used in training at all are used in full. Rows named part:NAME
    are the parts of the model alone, which show what the selective stack contributes at each length. Baselines are
    fitted, and their hyperparameters chosen, on the model's training sequences. Intervals are Wilson's at 95 %; the
    number of trials is limited to the number of non-overlapping windows, and chromosomes with the same name in several
    files of a class count once. There are at most four windows per non-overlapping one. Windows have at most 1 % of
    unknown bases, or 5 % at lengths where a class has no others.

    With --ood the model's rows report out-of-distribution (OOD) detection at a rate of 5 % on the windows the model was
    calibrated on: the share of OOD windows called unknown (detected) and of test windows of the classes
    (false_alarms), and the AUROC of the score of --unknown-rate (auroc), of the likelihood alone (likelihood_auroc) and
    of the best class's probability (probability_auroc, a baseline).

    **Examples**

    `genomamba evaluate model`

    `genomamba evaluate model --genome cow=cow.fa.gz --genome dog=dog.fa --output evaluation`

    `genomamba evaluate model --genome cow=cow.fa.gz --genome dog=dog.fa --lengths 1024,65536 --baseline kmer`

    `genomamba evaluate model --genome cow=cow.fa.gz --genome dog=dog.fa --ood hen=hen.fa --output evaluation`
    """
    from mambapipelines.species.evaluate import (  # noqa: PLC0415
        EvaluationOptions,
        evaluate_species_classifier,
    )

    evaluate_species_classifier(
        EvaluationOptions(
            model_folder=model,
            genomes=required_genomes(genome, genomes) if genome or genomes else [],
            lengths=[integer(length, "--lengths") for length in entries(lengths, "--lengths")],
            per_class=per_class,
            baselines=baseline_names(baseline),
            training_genomes=genome_specifications(training_genome or []),
            output=output,
            plot=plot,
            seed=seed,
            threads=threads,
            device=device,
            precision=precision,
            ood_genomes=genome_specifications([*(ood or ()), *(outsider or ())]),
        )
    )
