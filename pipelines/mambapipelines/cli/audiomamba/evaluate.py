"""The commands `audiomamba train-classifier` and `audiomamba evaluate`: how good generated clips are."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    EXIT_CODES,
    MinutesOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    StepsOption,
    ThreadsOption,
    command_group,
    entries,
)

application = command_group("", "How good generated clips are.")

LabelPatternOption = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX", help="Its first group is the label in a file's name: '^([0-9])_'.", show_default="the folder"
    ),
]
ValidOption = Annotated[str | None, typer.Option(metavar="PATTERN", help="Clips for validation: '*_1[0-4].wav'.")]
TestOption = Annotated[
    str | None,
    typer.Option("--test", "--test-pattern", metavar="PATTERN", help="Clips to test on only: '*_[5-9].wav'."),
]
WordsOption = Annotated[
    str | None, typer.Option(metavar="WORD[,WORD...]", help="Only clips of these labels.", show_default="all")
]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Name files that cannot be read, and go on.")]


@application.command(name="train-classifier", epilog=EXIT_CODES)
def train_classifier(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder of labelled clips.")],
    output: RunFolderOption,
    size: Annotated[
        str,
        typer.Option("--size", metavar="NAME|FILE", help="small, paper (ResNeXt-29 8x64d), tiny, or a recipe file."),
    ] = "small",
    sample_rate: Annotated[int, typer.Option(metavar="HZ", help="What clips are resampled to.")] = 16_000,
    clip_seconds: Annotated[float, typer.Option(metavar="S", help="What clips are cut or padded to.")] = 1.0,
    label_pattern: LabelPatternOption = None,
    valid: ValidOption = None,
    test: TestOption = None,
    words: WordsOption = None,
    skip_bad: SkipBadOption = False,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    changes: SetOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Train the classifier whose opinions score generated clips (`audiomamba evaluate`).

    Labels are the names of the folders that clips lie in, or part of their own names. The lists of Speech Commands in
    DATA say which clips are for validation and for the test, or --valid and --test do. A run that was interrupted
    goes on with --resume to the same numbers.

    **Examples**

    `audiomamba train-classifier speech_commands_v0.02 --words zero,one,two,three --output classifier`

    `audiomamba train-classifier digits --label-pattern '^([0-9])_' --valid '*_1[0-4].wav' --test '*_[5-9].wav'
    --sample-rate 8000 --output classifier`
    """
    from mambapipelines.waveforms.train_classifier import ClassifierTrainingOptions, train_clip_classifier  # noqa: PLC0415

    train_clip_classifier(
        ClassifierTrainingOptions(
            data=data,
            output=output,
            recipe=size,
            changes=changes or (),
            sample_rate_hz=sample_rate,
            clip_seconds=clip_seconds,
            label_pattern=label_pattern,
            valid=valid,
            test=test,
            words=None if words is None else entries(words, "--words"),
            skip_bad=skip_bad,
            minutes=minutes,
            steps=steps,
            seed=seed,
            resume=resume,
            threads=threads,
        )
    )


@application.command(epilog=EXIT_CODES)
def evaluate(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Real clips, split as the models' were.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[[NAME=]MODEL]...", help="Folders of waveform models, or hf://owner/name@revision."),
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder written by `audiomamba train-classifier`.")
    ] = None,
    clips: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Generated clips, of any system; with the NAME of a MODEL they are its own. Repeatable.",
        ),
    ] = None,
    generate: Annotated[
        int | None, typer.Option(metavar="N", help="Generate so many clips with each MODEL without --clips.")
    ] = None,
    label_pattern: LabelPatternOption = None,
    valid: ValidOption = None,
    test: TestOption = None,
    words: WordsOption = None,
    skip_bad: SkipBadOption = False,
    inception_over_all: Annotated[
        bool, typer.Option("--inception-over-all", help="IS by the common definition, without a held-out half.")
    ] = False,
    resamples: Annotated[int, typer.Option(min=20, metavar="N", help="Random halves for each interval.")] = 200,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the tables and the plot.", show_default="none")
    ] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Score models' likelihoods of test clips, and generated clips beside real ones, in one table.

    With MODEL: negative log-likelihood of the test clips in bits and nats per sample. With --classifier: FID (against
    the train data), IS, modified IS and AM of the train and test data, of the generated clips, and of two controls,
    shuffled noise and silence. Low and high are 95 % intervals over clips.

    **Examples**

    `audiomamba evaluate model --data digits --valid '*_1[0-4].wav' --test '*_[5-9].wav'`

    `audiomamba evaluate real=model gru=gru-model --data digits --valid '*_1[0-4].wav' --test '*_[5-9].wav'
    --label-pattern '^([0-9])_' --classifier classifier --generate 500 --output scores`

    `audiomamba evaluate --data digits --valid '*_1[0-4].wav' --test '*_[5-9].wav' --label-pattern '^([0-9])_'
    --classifier classifier --clips one=generated --clips other=clips-of-another-system --output scores`
    """
    from mambapipelines.waveforms.evaluate import AudioEvaluationOptions, evaluate_audio  # noqa: PLC0415

    evaluate_audio(
        AudioEvaluationOptions(
            models=models or (),
            data=data,
            classifier=classifier,
            clips=clips or (),
            generate=generate,
            label_pattern=label_pattern,
            valid=valid,
            test=test,
            words=None if words is None else entries(words, "--words"),
            skip_bad=skip_bad,
            inception_over_all=inception_over_all,
            resamples=resamples,
            output=output,
            seed=seed,
            threads=threads,
        )
    )
