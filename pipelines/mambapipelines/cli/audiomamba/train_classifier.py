"""The command `audiomamba train-classifier`: the classifier that scores generated clips."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    LabelPatternOption,
    MinutesOption,
    PrecisionOption,
    ResumeOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    SkipBadOption,
    StepsOption,
    TestPatternOption,
    ThreadsOption,
    ValidPatternOption,
    WordsOption,
    entries,
)


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
    valid: ValidPatternOption = None,
    test: TestPatternOption = None,
    words: WordsOption = None,
    skip_bad: SkipBadOption = False,
    minutes: MinutesOption = None,
    steps: StepsOption = None,
    changes: SetOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
) -> None:
    """Train the classifier whose opinions score generated clips (`audiomamba evaluate`).

    Labels are the names of the folders that clips lie in, or part of their own names. The lists of Speech Commands in
    DATA say which clips are for validation and for the test, or --valid and --test do. An interrupted run
    continues with --resume to the same numbers.

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
            device=device,
            precision=precision,
        )
    )
