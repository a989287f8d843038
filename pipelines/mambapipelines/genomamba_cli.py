"""The command `genomamba`: train, classify, evaluate, demo.

Heavy modules are imported inside the commands, so that `genomamba --help` answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambapipelines import intervals_cli, report_cli, variants_cli
from mambapipelines.command_line import (
    EXIT_CODES,
    MinutesOption,
    PrintRecipeOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    StepsOption,
    ThreadsOption,
    command_group,
    entries,
    input_error,
    run_program,
    version_option,
    whole_number,
)

if TYPE_CHECKING:
    from genomamba.genomes import GenomeSpecification

application = command_group(
    "genomamba",
    "Which species is this piece of DNA from? Train a model on genomes, then classify contigs of any length.",
)
application.add_typer(intervals_cli.application)
application.add_typer(variants_cli.application)
application.add_typer(report_cli.application)

GenomeOption = Annotated[
    list[str],
    typer.Option(
        "--genome", metavar="NAME=PATH[,PATH...]", help="A class and its FASTA files, plain or gzipped; once per class."
    ),
]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder written by `genomamba train`, or hf://owner/name@revision.")
]


@application.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    show_version: Annotated[bool, version_option("genomamba")] = False,
) -> None:
    """Which species is this piece of DNA from? Train a model on genomes, then classify contigs of any length."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@application.command(epilog=EXIT_CODES)
def train(
    genome: GenomeOption,
    length: Annotated[int, typer.Option(metavar="BP", help="Length of a training window in bases.")],
    output: RunFolderOption,
    holdout: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[,NAME...]", help="Sequences never trained on, for accuracy and calibration."),
    ] = None,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="tiny, demo, small, or a YAML file.")] = "small",
    changes: SetOption = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="MODEL", help="A pretrained causal language model to start from; it decides the shape."
        ),
    ] = None,
    print_recipe: PrintRecipeOption = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Train a model to tell species apart.

    Windows are drawn uniformly over classes, then sequences, then starts, from both strands. A run that was
    interrupted, by Ctrl-C or otherwise, goes on with --resume to the same numbers.

    What is not data comes from a recipe: --print-recipe shows it, --set changes it, `model.mixer` chooses what the
    layers mix with.

    **Examples**

    `genomamba train --genome cow=cow.fa.gz --genome dog=dog.fa --holdout chr7 --length 8192 --output model`

    `genomamba train --genome cow=cow.fa.gz --genome dog=dog.fa --holdout chr7 --length 8192 --output model --resume`

    `genomamba train --genome cow=cow.fa.gz --genome dog=dog.fa --length 8192 --output model --set model.layers=8
    --set model.mixer=s4d`
    """
    if print_recipe:
        from mambapipelines.recipes import load_recipe, recipe_text  # noqa: PLC0415

        print(recipe_text(load_recipe(recipe, changes or ())), end="")
        return
    from mambapipelines.species_training import TrainingOptions, train_species_classifier  # noqa: PLC0415

    train_species_classifier(
        TrainingOptions(
            genomes=_genomes(genome),
            length=length,
            output=output,
            holdout=[name for option in holdout or () for name in entries(option, "--holdout")],
            minutes=minutes,
            steps=steps,
            recipe=recipe,
            changes=changes or (),
            seed=seed,
            resume=resume,
            threads=threads,
            start_from=start_from,
        )
    )


@application.command(epilog=EXIT_CODES)
def classify(
    model: ModelArgument,
    fasta: Annotated[list[str], typer.Argument(metavar="FASTA...", help="FASTA files, plain or gzipped; - is stdin.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the table goes.", show_default="standard output")
    ] = None,
    threads: ThreadsOption = None,
    min_length: Annotated[int, typer.Option(metavar="BP", help="Shorter records are called unclassified.")] = 1,
    unknown_below: Annotated[
        float, typer.Option(metavar="P", help="Records whose best class is less probable are called unknown.")
    ] = 0.0,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with plots.")] = None,
    piece_length: Annotated[
        int,
        typer.Option(metavar="BP", help="Bases that go through the model at once; the result does not depend on it."),
    ] = 16_384,
) -> None:
    """Say which species each record of FASTA files is from.

    The table has one row per record in the order of the input, tab-separated: record, length, call, probability (of
    the call's class), then p_NAME for every class. Both strands are averaged, so a record and its reverse complement
    get the same answer. Records may be of any length; memory does not grow with it. An empty record, and one shorter
    than --min-length, is called unclassified and has NA for probabilities.

    **Examples**

    `genomamba classify model contigs.fa > calls.tsv`

    `zcat contigs.fa.gz | genomamba classify model - --min-length 1000 --unknown-below 0.9 --report calls.html`
    """
    from mambapipelines.species_classification import ClassificationOptions, classify_files  # noqa: PLC0415

    classify_files(
        ClassificationOptions(
            model_folder=model,
            sources=fasta,
            output=output,
            threads=threads,
            minimum_length=min_length,
            unknown_below=unknown_below,
            report=report,
            piece_length=piece_length,
        )
    )


@application.command(epilog=EXIT_CODES)
def evaluate(
    model: ModelArgument,
    genome: GenomeOption,
    lengths: Annotated[
        str, typer.Option(metavar="BP[,BP...]", help="Window lengths.")
    ] = "1024,4096,16384,65536,262144,1048576",
    per_class: Annotated[int, typer.Option(help="Windows of each class and length, if there are so many.")] = 200,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="kmer (canonical k-mers and logistic regression), markov (likelihoods), composition (a control that "
            "sees only GC and N counts) or none; may be repeated.",
            show_default="all three",
        ),
    ] = None,
    training_genome: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH[,PATH...]",
            help="Where the training genomes are now, for the baselines, if not where they were.",
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

    **Examples**

    `genomamba evaluate model --genome cow=cow.fa.gz --genome dog=dog.fa --output evaluation`

    `genomamba evaluate model --genome cow=cow.fa.gz --genome dog=dog.fa --lengths 1024,65536 --baseline kmer`
    """
    from genomamba.baselines import BASELINE_NAMES  # noqa: PLC0415
    from mambapipelines.species_evaluation import (  # noqa: PLC0415
        NO_BASELINE,
        EvaluationOptions,
        evaluate_species_classifier,
    )

    names = list(dict.fromkeys(baseline)) if baseline else list(BASELINE_NAMES)
    if NO_BASELINE in names and len(names) > 1:
        raise input_error("--baseline none is given beside other baselines: leave one of them out.")
    evaluate_species_classifier(
        EvaluationOptions(
            model_folder=model,
            genomes=_genomes(genome),
            lengths=[whole_number(length, "--lengths") for length in entries(lengths, "--lengths")],
            per_class=per_class,
            baselines=[name for name in names if name != NO_BASELINE],
            training_genomes=_genomes(training_genome or []),
            output=output,
            plot=plot,
            seed=seed,
            threads=threads,
        )
    )


@application.command(epilog=EXIT_CODES)
def demo(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for everything; an earlier demo there is replaced.")
    ] = Path("genomamba-demo"),
    minutes: Annotated[float, typer.Option(help="Time for training, at most.")] = 3.0,
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="tiny, demo, small, or a YAML file.")] = "demo",
    changes: SetOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Show everything on simulated genomes of five species; no data needed.

    Simulates a clade, trains a model on it, measures accuracy by length beside the baselines and the best accuracy
    that is possible, classifies contigs and writes report.html.

    **Example**

    `genomamba demo --output my-demo`
    """
    from mambapipelines.species_demo import DemoOptions, run_demo  # noqa: PLC0415

    run_demo(
        DemoOptions(output=output, minutes=minutes, recipe=recipe, changes=changes or (), seed=seed, threads=threads)
    )


@application.command(epilog=EXIT_CODES)
def share(
    model: ModelArgument,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Where the model goes on the Hugging Face Hub.")
    ],
    push: Annotated[bool, typer.Option("--push", help="Upload; without it, only say what would be uploaded.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="A repository that is made can be seen by everybody.")
    ] = False,
) -> None:
    """Put a model on the Hugging Face Hub, where any MODEL argument finds it as hf://OWNER/NAME.

    **Examples**

    `genomamba share model me/yeasts`

    `genomamba share model me/yeasts --push`

    `genomamba classify hf://me/yeasts@main contigs.fa`
    """
    from genomamba.models import load_classifier  # noqa: PLC0415
    from mambacore.hub import MODEL_FILES, push_model_folder  # noqa: PLC0415

    load_classifier(model)
    if push:
        print(push_model_folder(model, repository, private=not public))
        return
    for name in MODEL_FILES:
        print(f"{model / name}\t{(model / name).stat().st_size} bytes\thf://{repository}/{name}")
    print("nothing was uploaded: add --push", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: without the program's name; `None` takes those of the process.
    """
    return run_program(application, "genomamba", arguments)


def _genomes(options: Sequence[str]) -> "list[GenomeSpecification]":
    from genomamba.genomes import parse_genome_option  # noqa: PLC0415

    return [parse_genome_option(option) for option in options]


if __name__ == "__main__":
    sys.exit(main())
