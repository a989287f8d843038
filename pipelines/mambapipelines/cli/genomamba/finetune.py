"""The command `genomamba finetune`: a model that predicts labels of sequences."""

from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeterministicOption,
    DeviceOption,
    IntervalReferenceOption,
    MinutesOption,
    PrecisionOption,
    PretrainedOption,
    PrintRecipeOption,
    RecordsOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    StepsOption,
    StrategyOption,
    ThreadsOption,
    entries,
)


def finetune(
    table: Annotated[
        str,
        typer.Option(
            metavar="FILE|DIR",
            help="TSV or CSV with a header, plain or compressed, or a folder train|test/CLASS/*.txt.",
        ),
    ],
    output: RunFolderOption,
    start_from: PretrainedOption = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME...]", help="Label columns.", show_default="all columns without another meaning"
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Kind of labels: classes (one column), labels (columns of 0 and 1), numbers, or auto (by content).",
        ),
    ] = "auto",
    fasta: RecordsOption = None,
    reference: IntervalReferenceOption = None,
    pooling: Annotated[str, typer.Option(metavar="mean|last", help="How to pool positions for the head.")] = "mean",
    both_strands: Annotated[
        bool,
        typer.Option(
            "--both-strands/--given-strand",
            help="Train on both strands and average their predictions, or use the given strand only.",
        ),
    ] = True,
    balanced: Annotated[bool, typer.Option("--balanced", help="Weight classes equally.")] = False,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the training rows, instead of --minutes or --steps.")
    ] = None,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="Recipe: tiny, small, or a YAML file.")] = "small",
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
    """Fine-tune a language model to predict labels of sequences, or train one from scratch.

    Sequences are in the table's column `sequence`, in --fasta (column `record`), or in --reference (columns `chrom`,
    `start`, `end` and optionally `strand`). The column `split` has train, valid or test; without it the rows are
    split at random. The checkpoint with the best validation score is kept. Metrics on the test rows go to standard
    output, for the model and for a k-mer regression fitted to the same training rows.

    **Examples**

    `genomamba finetune --table enhancers.tsv --label enhancer --from pretrained --output enhancer-model`

    `genomamba finetune --table genomic_benchmarks/human_nontata_promoters --from hf://owner/name --output promoters`

    `genomamba finetune --table peaks.tsv --reference hg38.fa --kind numbers --epochs 10 --output signal-model`
    """
    from mambapipelines.console import show  # noqa: PLC0415

    if print_recipe:
        from mambapipelines.finetuning.recipe import SequenceRecipe  # noqa: PLC0415
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415

        show(recipe_text(load_task_recipe(SequenceRecipe, recipe, changes or ())).rstrip("\n"))
        return
    from mambapipelines.finetuning.evaluate import METRICS_TABLE_NAME  # noqa: PLC0415
    from mambapipelines.finetuning.train import FinetuningOptions  # noqa: PLC0415
    from mambapipelines.finetuning.train import finetune as run_finetuning  # noqa: PLC0415

    run_finetuning(
        FinetuningOptions(
            table=table,
            output=output,
            labels=[name for option in label or () for name in entries(option, "--label")],
            kind=kind,
            fasta=fasta,
            reference=reference,
            start_from=start_from,
            pooling=pooling,
            both_strands=both_strands,
            balanced=balanced,
            epochs=epochs,
            minutes=minutes,
            steps=steps,
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
    metrics = output / METRICS_TABLE_NAME
    if metrics.is_file():
        show(metrics.read_text(encoding="utf-8").rstrip("\n"))
