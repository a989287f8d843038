"""The command `genomamba species-task`: published species tasks on pinned assemblies."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    BaselineOption,
    DeterministicOption,
    DeviceOption,
    PrecisionOption,
    PretrainedOption,
    PrintRecipeOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    StrategyOption,
    ThreadsOption,
    baseline_names,
    entries,
    integer,
)


def species_task(
    task: Annotated[str, typer.Argument(metavar="TASK", help="great-apes or hyena-species.")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with ASSEMBLY/FILE, as written by `genomamba fetch TASK`.")
    ],
    length: Annotated[int, typer.Option(metavar="BP", help="Length of a training window in bases.")],
    output: RunFolderOption,
    start_from: PretrainedOption = None,
    scale: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the published number of steps; recorded in the table.")
    ] = 1.0,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="BP[,BP...]", help="Lengths of the test windows.", show_default="the published ones up to --length"
        ),
    ] = None,
    per_class: Annotated[int, typer.Option(help="Maximum number of test windows per species and length.")] = 200,
    baseline: BaselineOption = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Recipe: a name or a YAML file.", show_default="the task's")
    ] = None,
    changes: SetOption = None,
    print_recipe: PrintRecipeOption = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    strategy: StrategyOption = "single",
    deterministic: DeterministicOption = False,
) -> None:
    """Train and test on a published species task, compared with baselines.

    Training windows are sampled uniformly over species, then chromosomes, then start positions. Chromosomes 1, 3, 12
    and 13 are for testing, 5, 7, 9, 10 and 11 for validation; human chromosome 2 and chromosomes 2A and 2B of the other
    apes are in the same split. Test windows do not depend on --seed. The schedule is the published one: 10 epochs of
    1,024 steps of 64 windows at every length. Shorten a run with --scale or --set protocol.windows_per_step=8; the
    results record it.

    **Examples**

    `genomamba species-task great-apes --data assemblies --length 16384 --output apes`

    `genomamba species-task hyena-species --data assemblies --length 1024 --scale 0.05 --from pretrained --output five`
    """
    from mambapipelines.console import show  # noqa: PLC0415

    if print_recipe:
        from genomamba.data.assemblies import species_protocol  # noqa: PLC0415
        from mambapipelines.protocols.recipe import SpeciesProtocolRecipe  # noqa: PLC0415
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415

        name = recipe or species_protocol(task).name
        show(recipe_text(load_task_recipe(SpeciesProtocolRecipe, name, changes or ())).rstrip("\n"))
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
            device=device,
            precision=precision,
            strategy=strategy,
            deterministic=deterministic,
        )
    )
    show(text.rstrip("\n"))
