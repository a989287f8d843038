"""The commands `genomamba finetune` and `genomamba predict`: a model for the labels of a table, and its use."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    EXIT_CODES,
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
)

application = command_group("", "Fine-tune a model on a table of sequences, and let it predict.")

FastaOption = Annotated[
    str | None, typer.Option(metavar="FASTA", help="Where the records named in the table's column `record` are.")
]
ReferenceOption = Annotated[
    str | None, typer.Option(metavar="FASTA", help="Where the table's intervals chrom, start, end (0-based) lie.")
]


@application.command(epilog=EXIT_CODES)
def finetune(
    table: Annotated[
        str,
        typer.Option(metavar="FILE|DIR", help="TSV or CSV with a header, plain or gzipped; or train|test/CLASS/*.txt."),
    ],
    output: RunFolderOption,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="A pretrained language model: a folder or hf://owner/name@revision.",
            show_default="from scratch",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[,NAME...]", help="Columns of labels.", show_default="all without another meaning"),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="classes (one column), labels (columns of 0 and 1), numbers, or auto: by what the columns hold.",
        ),
    ] = "auto",
    fasta: FastaOption = None,
    reference: ReferenceOption = None,
    pooling: Annotated[str, typer.Option(metavar="mean|last", help="What the head reads of the positions.")] = "mean",
    both_strands: Annotated[
        bool,
        typer.Option(
            "--both-strands/--given-strand",
            help="Train on both strands and average their answers, or keep to the strand that is given.",
        ),
    ] = True,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Let rare classes count as much as frequent ones.")
    ] = False,
    epochs: Annotated[
        float | None, typer.Option(help="How often every training row is seen, instead of --minutes or --steps.")
    ] = None,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="tiny, small, or a YAML file.")] = "small",
    changes: SetOption = None,
    print_recipe: PrintRecipeOption = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
    strategy: StrategyOption = "single",
) -> None:
    """Train a model for the labels of sequences, from a pretrained language model or from scratch.

    Sequences are in the table's column `sequence`, or in --fasta (column `record`), or in --reference (columns `chrom`,
    `start`, `end` and perhaps `strand`). A column `split` says train, valid or test; without it the seed chooses. The
    best validation is kept. The table on standard output has the figures of the test rows, of the model and of a k-mer
    regression fitted to the same training rows.

    **Examples**

    `genomamba finetune --table enhancers.tsv --label enhancer --from pretrained --output enhancer-model`

    `genomamba finetune --table genomic_benchmarks/human_nontata_promoters --from hf://owner/name --output promoters`

    `genomamba finetune --table peaks.tsv --reference hg38.fa --kind numbers --epochs 10 --output signal-model`
    """
    if print_recipe:
        from mambapipelines.finetuning.recipe import SequenceRecipe  # noqa: PLC0415
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415

        print(recipe_text(load_task_recipe(SequenceRecipe, recipe, changes or ())), end="")
        return
    from mambapipelines.finetuning.train import METRICS_TABLE_NAME, FinetuningOptions  # noqa: PLC0415
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
            strategy=strategy,
        )
    )
    metrics = output / METRICS_TABLE_NAME
    if metrics.is_file():
        print(metrics.read_text(encoding="utf-8"), end="")


@application.command(epilog=EXIT_CODES)
def predict(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder written by `genomamba finetune`, or hf://owner/name@revision."),
    ],
    sources: Annotated[
        list[str], typer.Argument(metavar="FASTA|TABLE...", help="Sequences, plain or gzipped; - is standard input.")
    ],
    fasta: FastaOption = None,
    reference: ReferenceOption = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the table goes.", show_default="standard output")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Say what a fine-tuned model says of each sequence.

    The table has one row for each record in the order of the input: record, length, and for classes call, probability
    and p_CLASS for each; for labels p_COLUMN for each; for numbers their columns. A record without bases has NA.

    **Examples**

    `genomamba predict enhancer-model candidates.fa.gz > predictions.tsv`

    `genomamba predict signal-model peaks.tsv --reference hg38.fa --output predictions.tsv`
    """
    from mambapipelines.finetuning.predict import PredictionOptions, predict_files  # noqa: PLC0415

    predict_files(
        PredictionOptions(
            model_folder=model,
            sources=sources,
            fasta=fasta,
            reference=reference,
            output=output,
            threads=threads,
        )
    )
