"""The command `genomamba species-task`: the published species tasks on their pinned assemblies."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    BaselineOption,
    PretrainedOption,
    PrintRecipeOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    ThreadsOption,
    baseline_names,
    entries,
    integer,
)


def species_task(
    task: Annotated[str, typer.Argument(metavar="TASK", help="great-apes or hyena-species.")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with ASSEMBLY/FILE, as `genomamba fetch TASK` writes it.")
    ],
    length: Annotated[int, typer.Option(metavar="BP", help="Length of a training window in bases.")],
    output: RunFolderOption,
    start_from: PretrainedOption = None,
    scale: Annotated[
        float, typer.Option(metavar="SHARE", help="Take this share of the published steps; the table's note says so.")
    ] = 1.0,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="BP[,BP...]", help="Lengths of test windows.", show_default="the published ones up to --length"
        ),
    ] = None,
    per_class: Annotated[
        int, typer.Option(help="Test windows of each species and length, if there are so many.")
    ] = 200,
    baseline: BaselineOption = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Name or YAML file.", show_default="the task's")
    ] = None,
    changes: SetOption = None,
    print_recipe: PrintRecipeOption = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Train and test on a published species task, beside the controls.

    Training windows: uniform species, uniform chromosome, uniform start. Chromosomes 1, 3, 12 and 13 are for testing,
    5, 7, 9, 10 and 11 for validation; chromosome 2 of human and 2A and 2B of the other apes are on the same side. Test
    windows are fixed, whatever --seed. The schedule is the published one: 10 epochs of 1,024 steps of 64 windows at
    every length. A smaller run takes --scale, or --set protocol.windows_per_step=8, and says what it was.

    **Examples**

    `genomamba species-task great-apes --data assemblies --length 16384 --output apes`

    `genomamba species-task hyena-species --data assemblies --length 1024 --scale 0.05 --from pretrained --output five`
    """
    if print_recipe:
        from genomamba.data.assemblies import species_protocol  # noqa: PLC0415
        from mambapipelines.protocols.train import SpeciesProtocolRecipe  # noqa: PLC0415
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415

        name = recipe or species_protocol(task).name
        print(recipe_text(load_task_recipe(SpeciesProtocolRecipe, name, changes or ())), end="")
        return
    from mambapipelines.protocols.train import SpeciesProtocolOptions, run_species_task  # noqa: PLC0415

    text = run_species_task(
        SpeciesProtocolOptions(
            task=task,
            data=data,
            length=length,
            output=output,
            start_from=start_from,
            scale=scale,
            lengths=[integer(part, "--lengths") for part in entries(lengths, "--lengths")] if lengths else (),
            per_class=per_class,
            baselines=baseline_names(baseline),
            recipe=recipe,
            changes=changes or (),
            seed=seed,
            resume=resume,
            threads=threads,
        )
    )
    print(text, end="")
