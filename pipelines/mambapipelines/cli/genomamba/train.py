"""The command `genomamba train`: a species classifier from genomes."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeterministicOption,
    DeviceOption,
    GenomeListOption,
    GenomeOption,
    MinutesOption,
    PrecisionOption,
    PrintRecipeOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    StepsOption,
    StrategyOption,
    ThreadsOption,
    entries,
    required_genomes,
)


def train(
    length: Annotated[int, typer.Option(metavar="BP", help="Length of a training window in bases.")],
    output: RunFolderOption,
    genome: GenomeOption = None,
    genomes: GenomeListOption = None,
    holdout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="Sequences to hold out of training, for validation and calibration.",
        ),
    ] = None,
    holdout_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Hold out this share of every class; 0 holds nothing out.",
            show_default="0.1 without --holdout",
        ),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.tsv",
            help="Homology groups for --holdout-fraction: sequence name, tab, group.",
            show_default="sequences of the same name",
        ),
    ] = None,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Recipe: tiny, demo, small, or a YAML file.")
    ] = "small",
    changes: SetOption = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="MODEL", help="Start from a pretrained causal language model, whose architecture is kept."
        ),
    ] = None,
    print_recipe: PrintRecipeOption = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    strategy: StrategyOption = "single",
    deterministic: DeterministicOption = False,
) -> None:
    """Train a species classifier on genomes.

    Windows are sampled uniformly over classes, then start positions, from both strands. Continue an interrupted run
    with --resume; the result is the same as without the interruption.

    A share of every class is held out to calibrate the model, to weight its parts (the selective stack, interpolated
    Markov models, a gate on these, and k-mer regressions) and for `genomamba evaluate`. If the classes share sequence
    names, whole sequences with the same name are held out; otherwise stretches are, and their homologues in other
    classes are excluded from training.

    All settings other than the data come from a recipe: print it with --print-recipe, override values with --set.
    `model.mixer` chooses the sequence mixer of the layers.

    **Examples**

    `genomamba train --genome cow=cow.fa.gz --genome dog=dog.fa --holdout chr7 --length 8192 --output model`

    `genomamba train --genome cow=cow.fa.gz --genome dog=dog.fa --holdout chr7 --length 8192 --output model --resume`

    `genomamba train --genomes genomes.tsv --length 8192 -o model`

    `genomamba train --genome cow=cow.fa.gz --genome dog=dog.fa --length 8192 --output model --set model.layers=8
    --set model.mixer=s4d`
    """
    from mambapipelines.console import show  # noqa: PLC0415

    if print_recipe:
        from mambapipelines.species.recipe import SpeciesRecipe  # noqa: PLC0415
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415

        show(recipe_text(load_task_recipe(SpeciesRecipe, recipe, changes or ())).rstrip("\n"))
        return
    from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier  # noqa: PLC0415

    train_species_classifier(
        SpeciesTrainingOptions(
            genomes=required_genomes(genome, genomes),
            length=length,
            output=output,
            holdout=[name for option in holdout or () for name in entries(option, "--holdout")],
            holdout_fraction=holdout_fraction,
            groups=groups,
            minutes=minutes,
            steps=steps,
            recipe=recipe,
            changes=changes or (),
            seed=seed,
            resume=resume,
            threads=threads,
            device=device,
            precision=precision,
            start_from=start_from,
            strategy=strategy,
            deterministic=deterministic,
        )
    )
