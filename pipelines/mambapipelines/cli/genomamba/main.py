"""The command `genomamba`: train, classify, evaluate, demo.

Heavy modules are imported inside the commands, so that `genomamba --help` answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli import app, fetch, report
from mambapipelines.cli.genomamba import (
    classify,
    embed,
    evaluate,
    finetune,
    intervals,
    pretrain,
    score_variants,
    species_task,
)
from mambapipelines.cli.options import (
    EXIT_CODES,
    GenomeOption,
    MinutesOption,
    ModelArgument,
    PrintRecipeOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    StepsOption,
    StrategyOption,
    ThreadsOption,
    command_group,
    entries,
    genome_specifications,
    run_program,
    version_option,
)

application = command_group(
    "genomamba",
    "Which species is this piece of DNA from? Train a model on genomes, then classify contigs of any length.",
)
application.add_typer(classify.application)
application.add_typer(evaluate.application)
application.add_typer(intervals.application)
application.add_typer(finetune.application)
application.add_typer(species_task.application)
application.add_typer(score_variants.application)
application.add_typer(embed.application)
application.add_typer(fetch.dna_application)
application.add_typer(report.application)
application.add_typer(app.dna_application)
application.add_typer(pretrain.application)


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
    strategy: StrategyOption = "single",
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
        from mambapipelines.training.recipe import load_recipe, recipe_text  # noqa: PLC0415

        print(recipe_text(load_recipe(recipe, changes or ())), end="")
        return
    from mambapipelines.species.train import TrainingOptions, train_species_classifier  # noqa: PLC0415

    train_species_classifier(
        TrainingOptions(
            genomes=genome_specifications(genome),
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
            strategy=strategy,
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
    from mambapipelines.species.demo import DemoOptions, run_demo  # noqa: PLC0415

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
    from genomamba.models.species_classifier import load_classifier  # noqa: PLC0415
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


if __name__ == "__main__":
    sys.exit(main())
