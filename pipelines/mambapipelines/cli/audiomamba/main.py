"""The command `audiomamba`: models of raw waveforms.

Heavy modules are imported inside the commands, so that `audiomamba --help` answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli import app, fetch, report
from mambapipelines.cli.audiomamba import evaluate
from mambapipelines.cli.options import (
    EXIT_CODES,
    MinutesOption,
    PrintRecipeOption,
    ResumeOption,
    SeedOption,
    SetOption,
    StepsOption,
    StrategyOption,
    ThreadsOption,
    command_group,
    entries,
    input_error,
    run_program,
    version_option,
)

application = command_group(
    "audiomamba", "Raw waveforms: train a model on recordings, then generate new ones or continue a clip."
)
application.add_typer(fetch.audio_application)
application.add_typer(app.audio_application)
application.add_typer(report.application)
application.add_typer(evaluate.application)


@application.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    show_version: Annotated[bool, version_option("audiomamba")] = False,
) -> None:
    """Raw waveforms: train a model on recordings, then generate new ones or continue a clip."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@application.command(epilog=EXIT_CODES)
def train(
    data: Annotated[
        Path | None, typer.Argument(metavar="DATA", help="A folder of clips of any layout, or one long recording.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A recipe of the package (an unknown name lists them) or a file.")
    ] = "mamba-sc09-6m",
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the model and the state of the run.")
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
    strategy: StrategyOption = "single",
) -> None:
    """Train a model of waveforms, which foretells every sample from those before it.

    The loss is in bits per sample. A recording is cut by time (88 % to train on, 6 % to validate on). In a folder,
    --valid and --test choose by pattern; else `validation_list.txt` and `testing_list.txt` in it do, as in Speech
    Commands, of which the ten digits (SC09) are used unless --words says otherwise; else one file in twenty is for
    validation. Any rate and format is brought to the recipe's rate.

    Clips that the model generates on the way are in DIR/training/drawn. A run that was interrupted goes on with
    --resume to the same numbers.

    **Examples**

    `audiomamba train digits --recipe digits-real --valid '*_1[0-4].wav' --test '*_[5-9].wav' --output model`

    `audiomamba train speech_commands_v0.02 --recipe mamba-sc09-6m --steps 200000 --output sc09`

    `audiomamba train piano.flac --recipe mamba-youtubemix --length 958464 --steps 1000 --output piano`
    """
    changes = [*(changes or ()), *([] if length is None else [f"batch.clip_length={length}"])]
    if print_recipe:
        from mambapipelines.training.recipe import load_task_recipe, recipe_text  # noqa: PLC0415
        from mambapipelines.waveforms.recipe import AudioRecipe  # noqa: PLC0415

        print(recipe_text(load_task_recipe(AudioRecipe, recipe, changes)), end="")
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
            skip_bad=skip_bad,
            minutes=minutes,
            steps=steps,
            seed=seed,
            resume=resume,
            threads=threads,
            strategy=strategy,
        )
    )


@application.command(epilog=EXIT_CODES)
def generate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder written by `audiomamba train`, or hf://owner/name@revision.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the clips, their table and their page.")],
    clips: Annotated[int, typer.Option(metavar="N", help="How many.")] = 16,
    seconds: Annotated[float, typer.Option(metavar="S", help="Length of each, without what it goes on from.")] = 1.0,
    seed: SeedOption = 0,
    temperature: Annotated[float, typer.Option(help="Below 1 is safer, 0 takes the likeliest sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest values of this probability in all.")] = 1.0,
    continued: Annotated[
        Path | None, typer.Option("--continue", metavar="CLIP", help="Go on with this clip, at the model's rate.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Clips side by side; no clip depends on it.")] = 16,
    audio_format: Annotated[str, typer.Option("--format", help="wav, flac, ogg or mp3.")] = "wav",
    reject: Annotated[
        str | None,
        typer.Option(
            metavar="paper|search",
            help="Leave clips out by likelihood: the lowest 40 % and highest 5 %, or what is unlike --real.",
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Real clips, not trained on, for --reject search.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Generate clips, or go on with one.

    DIR gets the sound files, `clips.tsv` with bits per sample and flaws (silent, clipped, shifted, runaway) of every
    clip, and `clips.html`, a page with players, waveforms and spectrograms that opens offline. A clip is a function of
    the model, the seed and its number alone.

    **Examples**

    `audiomamba generate model --clips 16 --seconds 1 --seed 0 --output clips`

    `audiomamba generate model --continue beginning.wav --clips 4 --seconds 2 --temperature 0.95 --output continued`

    `audiomamba generate model --clips 1000 --reject search --real held-out --output chosen`
    """
    from mambapipelines.waveforms.generate import WaveformGenerationOptions, generate_clips  # noqa: PLC0415

    generate_clips(
        WaveformGenerationOptions(
            model=model,
            output=output,
            clips=clips,
            seconds=seconds,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            continued=continued,
            batch=batch,
            audio_format=audio_format,
            reject=reject,
            real=real,
            threads=threads,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: without the program's name; `None` takes those of the process.
    """
    return run_program(application, "audiomamba", arguments)


if __name__ == "__main__":
    sys.exit(main())
