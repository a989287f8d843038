"""The command `audiomamba train`: a model of waveforms from recordings."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
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
        Path | None, typer.Argument(metavar="DATA", help="A folder of clips of any layout, or one long recording.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A recipe of the package (an unknown name lists them) or a file.")
    ] = "sc09",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the model and the state of the run."),
    ] = None,
    valid: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Clips for validation, such as '*_1[0-4].wav'.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Clips that are left out, to test on later.")
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(metavar="WORD[,WORD...]", help="Only clips in folders of these names.", show_default="all"),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=REGEX|TABLE",
            help="Condition on labels: the REGEX's first group in each file's name, or a TSV of paths and labels. "
            "Repeatable; 'none' for none.",
            show_default="the words of Speech Commands",
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, metavar="SAMPLES", help="Of an example, instead of the recipe's.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Name files that cannot be read, and go on.")] = False,
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
) -> None:
    """Train a waveform model, which predicts every sample from those before it.

    The loss is in bits per sample. A recording is cut by time (88 % to train on, 6 % to validate on). In a folder,
    --valid and --test choose by pattern; else `validation_list.txt` and `testing_list.txt` in it do, as in Speech
    Commands, of which the ten digits (SC09) are used unless --words says otherwise; else one file in twenty is for
    validation. Any rate and format is brought to the recipe's rate.

    Clips that the model generates on the way are in DIR/training/samples. An interrupted run continues with
    --resume to the same numbers.

    **Examples**

    `audiomamba train digits --recipe digits-real --valid '*_1[0-4].wav' --test '*_[5-9].wav' --output model`

    `audiomamba train speech_commands_v0.02 --recipe sc09 --steps 200000 --output sc09`

    `audiomamba train piano.flac --recipe mamba-youtubemix --length 958464 --steps 1000 --output piano`
    """
    changes = [*(changes or ()), *([] if length is None else [f"batch.clip_length={length}"])]
    if print_recipe:
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415
        from mambapipelines.waveforms.recipe import WaveformTrainingRecipe  # noqa: PLC0415

        print(recipe_text(load_task_recipe(WaveformTrainingRecipe, recipe, changes)), end="")
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
            skip_bad=skip_bad,
            minutes=minutes,
            steps=steps,
            seed=seed,
            resume=resume,
            threads=threads,
            device=device,
            precision=precision,
            strategy=strategy,
        )
    )
