"""The commands `genomamba pretrain` and `genomamba perplexity`: language models of DNA, and how good they are."""

from pathlib import Path
from typing import Annotated, cast

import typer

from mambapipelines.cli.options import (
    EXIT_CODES,
    ContextRanksOption,
    MinutesOption,
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
    input_error,
    whole_number,
)

application = command_group("", "Language models of DNA: pretrain them, measure their perplexity.")

ReferenceOption = Annotated[
    list[str],
    typer.Option(
        "--reference", metavar="FASTA", help="A genome, plain or compressed with bgzip; indexed once. Repeatable."
    ),
]
IntervalsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Rows of chromosome, start, end, split, no header; - is stdin."),
]
ValidOption = Annotated[
    list[str] | None,
    typer.Option(metavar="CHR[,CHR...]", help="Without --intervals: chromosomes, of every reference, to validate on."),
]
TestOption = Annotated[
    list[str] | None, typer.Option(metavar="CHR[,CHR...]", help="Chromosomes to leave for the test.")
]


@application.command(epilog=EXIT_CODES)
def pretrain(
    reference: ReferenceOption,
    length: Annotated[int, typer.Option(metavar="BP", help="Length of a training window in bases.")],
    output: RunFolderOption,
    intervals: IntervalsOption = None,
    valid_chromosomes: ValidOption = None,
    test_chromosomes: TestOption = None,
    exclude_chromosomes: Annotated[
        list[str] | None, typer.Option(metavar="CHR[,CHR...]", help="Chromosomes not to use at all.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="causal|masked",
            help="Foretell the next base, or hidden bases from both sides.",
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
            help="What lower case, N and IUPAC codes are: bases, hyenadna or caduceus.",
            show_default="the recipe's",
        ),
    ] = None,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="tiny, small, mamba-1.4m, mamba-7m, caduceus-ps, caduceus-ph, hyenadna-split, or a YAML file.",
        ),
    ] = "small",
    changes: SetOption = None,
    print_recipe: PrintRecipeOption = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
    strategy: StrategyOption = "single",
    context_ranks: ContextRanksOption = 1,
) -> None:
    """Pretrain a language model on the bases of one or several genomes.

    Bases are split into train, valid and test by a file of intervals, or by chromosome. Windows are read on either
    strand; N and other letters that are no base are never foretold unless --letters says so. The perplexity shown is
    that of held-out windows. A run that was interrupted goes on with --resume to the same numbers.

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
    named = {"objective": objective, "pretraining.rule": rule, "pretraining.letters": letters}
    replaced = [f"{key}={value}" for key, value in named.items() if value is not None] + list(changes or ())
    if print_recipe:
        from mambapipelines.language.recipe import PretrainingRecipe  # noqa: PLC0415
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415

        print(recipe_text(load_task_recipe(PretrainingRecipe, recipe, replaced)), end="")
        return
    if rule is not None and intervals is None:
        raise input_error(f"--rule {rule} is for --intervals, and whole chromosomes are cut into tiles: leave it out.")
    from mambapipelines.language.train import PretrainingOptions  # noqa: PLC0415
    from mambapipelines.language.train import pretrain as run_pretraining  # noqa: PLC0415

    run_pretraining(
        PretrainingOptions(
            references=reference,
            length=length,
            output=output,
            intervals=intervals,
            valid_chromosomes=_names(valid_chromosomes, "--valid-chromosomes"),
            test_chromosomes=_names(test_chromosomes, "--test-chromosomes"),
            exclude_chromosomes=_names(exclude_chromosomes, "--exclude-chromosomes"),
            minutes=minutes,
            steps=steps,
            recipe=recipe,
            changes=replaced,
            seed=seed,
            resume=resume,
            threads=threads,
            strategy=strategy,
            context_ranks=context_ranks,
        )
    )


@application.command(epilog=EXIT_CODES)
def perplexity(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a language model, or hf://owner/name@revision.")
    ],
    reference: ReferenceOption,
    lengths: Annotated[
        str, typer.Option(metavar="BP[,BP...]", help="Window lengths: how much a base is foretold from.")
    ] = "1024,8192,65536",
    intervals: IntervalsOption = None,
    rule: Annotated[
        str | None, typer.Option(metavar="NAME", help="How rows become windows.", show_default="the model's")
    ] = None,
    valid_chromosomes: ValidOption = None,
    test_chromosomes: TestOption = None,
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
            lengths=[whole_number(length, "--lengths") for length in entries(lengths, "--lengths")],
            intervals=intervals,
            rule=rule,
            valid_chromosomes=_names(valid_chromosomes, "--valid-chromosomes"),
            test_chromosomes=_names(test_chromosomes, "--test-chromosomes"),
            exclude_chromosomes=_names(exclude_chromosomes, "--exclude-chromosomes"),
            split=cast(Split, split),
            bases=bases,
            markov_order=markov_order if markov else None,
            output=output,
            threads=threads,
        )
    )


def _names(options: list[str] | None, option: str) -> list[str]:
    return list(dict.fromkeys(name for value in options or () for name in entries(value, option)))
