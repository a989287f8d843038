"""The command `audiomamba train`: a waveform model from recordings."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeterministicOption,
    DeviceOption,
    MinutesOption,
    PrecisionOption,
    PrintRecipeOption,
    ResumeOption,
    SeedOption,
    SetOption,
    StepsOption,
    StrategyOption,
    ThreadsOption,
    entries,
    input_error,
)


def train(
    data: Annotated[
        Path | None, typer.Argument(metavar="DATA", help="A folder of clips in any layout, or one long recording.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Recipe: a name (an unknown one lists them) or a YAML file.")
    ] = "sc09",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the model and the state of the run."),
    ] = None,
    valid: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Validation clips, such as '*_1[0-4].wav'.")
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="PATTERN", help="Test clips, not used in training.")] = None,
    words: Annotated[
        str | None,
        typer.Option(metavar="WORD[,WORD...]", help="Use only clips in folders with these names.", show_default="all"),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=REGEX|TABLE",
            help="Condition on labels: the first group of REGEX in each file name, or a TSV of paths and labels. "
            "Repeatable; 'none' disables labels.",
            show_default="the words of Speech Commands",
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Start from the weights of a model of the same architecture and labels; layers and a clock can be "
            "added.",
            show_default="from scratch",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, metavar="SAMPLES", help="Length of a training example, instead of the recipe's."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Report files that cannot be read, and continue.")
    ] = False,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
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
    """Train a waveform model, which predicts each sample from the preceding ones.

    The loss is in bits per sample. A single recording is split by time (88 % training, 6 % validation, 6 % test). The
    files of a folder are split by --valid and --test if given, else by its lists `validation_list.txt` and
    `testing_list.txt`, as in Speech Commands, whose ten digits (SC09) are used unless --words is given; else one file
    in twenty is used for validation. Clips in any format are resampled to the recipe's rate.

    Clips generated during training are in DIR/training/samples. Continue an interrupted run with --resume; the result
    is the same as without the interruption.

    **Examples**

    `audiomamba train digits --recipe digits-real --valid '*_1[0-4].wav' --test '*_[5-9].wav' --output model`

    `audiomamba train speech_commands_v0.02 --recipe sc09 --steps 200000 --output sc09`

    `audiomamba train piano.flac --recipe mamba-youtubemix --length 958464 --steps 1000 --output piano`
    """
    from mambapipelines.console import show  # noqa: PLC0415

    changes = [*(changes or ()), *([] if length is None else [f"batch.clip_length={length}"])]
    if print_recipe:
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415
        from mambapipelines.waveforms.recipe import WaveformTrainingRecipe  # noqa: PLC0415

        show(recipe_text(load_task_recipe(WaveformTrainingRecipe, recipe, changes)).rstrip("\n"))
        return
    if data is None or output is None:
        missing = "DATA" if data is None else "--output"
        raise input_error(f"{missing} is missing: write audiomamba train DATA --recipe NAME --output DIR")
    from mambapipelines.waveforms.train import WaveformTrainingOptions, train_waveform_model  # noqa: PLC0415

    train_waveform_model(
        WaveformTrainingOptions(
            data=data,
            output=output,
            recipe=recipe,
            changes=changes,
            valid=valid,
            test=test,
            words=None if words is None else entries(words, "--words"),
            labels=labels or (),
            start_from=start_from,
            skip_bad=skip_bad,
            minutes=minutes,
            steps=steps,
            seed=seed,
            resume=resume,
            threads=threads,
            device=device,
            precision=precision,
            strategy=strategy,
            deterministic=deterministic,
        )
    )
