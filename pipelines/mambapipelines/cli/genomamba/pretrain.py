"""The command `genomamba pretrain`: a language model for one or several genomes."""

from typing import Annotated

import typer

from mambapipelines.cli.options import (
    ContextRanksOption,
    DeterministicOption,
    DeviceOption,
    GenomesOption,
    IntervalsOption,
    MinutesOption,
    PrecisionOption,
    PretrainedOption,
    PrintRecipeOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    StepsOption,
    StrategyOption,
    TestChromosomesOption,
    ThreadsOption,
    ValidChromosomesOption,
    input_error,
    names,
)


def pretrain(
    reference: GenomesOption,
    length: Annotated[int, typer.Option(metavar="BP", help="Length of a training window in bases.")],
    output: RunFolderOption,
    intervals: IntervalsOption = None,
    valid_chromosomes: ValidChromosomesOption = None,
    test_chromosomes: TestChromosomesOption = None,
    exclude_chromosomes: Annotated[
        list[str] | None, typer.Option(metavar="CHR[,CHR...]", help="Chromosomes to exclude.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="causal|masked",
            help="Predict the next base (causal), or masked bases from both sides (masked).",
            show_default="the recipe's",
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How rows of --intervals become windows: hyenadna, mamba or caduceus.",
            show_default="the recipe's",
        ),
    ] = None,
    letters: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Treatment of lower case, N and IUPAC codes: bases, hyenadna or caduceus.",
            show_default="the recipe's",
        ),
    ] = None,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    start_from: PretrainedOption = None,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="Recipe: tiny, small, mamba-1.4m, mamba-7m, caduceus-ps, caduceus-ph, hyenadna-split, or a YAML file.",
        ),
    ] = "small",
    changes: SetOption = None,
    print_recipe: PrintRecipeOption = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    strategy: StrategyOption = "single",
    deterministic: DeterministicOption = False,
    context_ranks: ContextRanksOption = 1,
) -> None:
    """Pretrain a language model on one or several genomes.

    Genomes are split into train, valid and test by an interval file, or by chromosome. Windows are read on either
    strand; N and other ambiguity codes are not prediction targets unless --letters selects such a policy. The
    perplexity shown is that of validation windows. Continue an interrupted run with --resume; the numbers are the same.

    **Examples**

    `genomamba pretrain --reference S288C.fa --reference CBS432.fa --valid-chromosomes chrX --test-chromosomes
    chrVII,chrXI --length 8192 --output yeast-model`

    `genomamba pretrain --reference hg38.fa --intervals human-sequences.bed --recipe caduceus-ps --length 1024
    --output caduceus`

    `genomamba pretrain --reference hg38.fa --intervals human-sequences.bed --recipe mamba-1.4m --length 1048576
    --set length.warmup_steps_per_stage=500 --output long`

    `torchrun --nproc-per-node 4 --no-python genomamba pretrain --reference hg38.fa --intervals human-sequences.bed
    --length 1048576 --strategy ddp --context-ranks 4 --output long`
    """
    from mambapipelines.console import show  # noqa: PLC0415

    named = {"objective": objective, "pretraining.rule": rule, "pretraining.letters": letters}
    replaced = [f"{key}={value}" for key, value in named.items() if value is not None] + list(changes or ())
    if print_recipe:
        from mambapipelines.language.recipe import PretrainingRecipe  # noqa: PLC0415
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415

        show(recipe_text(load_task_recipe(PretrainingRecipe, recipe, replaced)).rstrip("\n"))
        return
    if rule is not None and intervals is None:
        raise input_error(f"--rule {rule} needs --intervals; without them whole chromosomes are tiled: remove it.")
    from mambapipelines.language.train import PretrainingOptions  # noqa: PLC0415
    from mambapipelines.language.train import pretrain as run_pretraining  # noqa: PLC0415

    run_pretraining(
        PretrainingOptions(
            references=reference,
            length=length,
            output=output,
            intervals=intervals,
            valid_chromosomes=names(valid_chromosomes, "--valid-chromosomes"),
            test_chromosomes=names(test_chromosomes, "--test-chromosomes"),
            exclude_chromosomes=names(exclude_chromosomes, "--exclude-chromosomes"),
            minutes=minutes,
            steps=steps,
            start_from=start_from,
            recipe=recipe,
            changes=replaced,
            seed=seed,
            resume=resume,
            threads=threads,
            device=device,
            precision=precision,
            strategy=strategy,
            deterministic=deterministic,
            context_ranks=context_ranks,
        )
    )
