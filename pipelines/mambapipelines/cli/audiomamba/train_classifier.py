"""The command `audiomamba train-classifier`: a classifier for scoring generated clips."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeterministicOption,
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
    StrategyOption,
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
        typer.Option(
            "--size", metavar="NAME|FILE", help="Size: small, paper (ResNeXt-29 8x64d), tiny, or a recipe file."
        ),
    ] = "small",
    sample_rate: Annotated[int, typer.Option(metavar="HZ", help="Sampling rate that clips are resampled to.")] = 16_000,
    clip_seconds: Annotated[float, typer.Option(metavar="S", help="Duration that clips are cut or padded to.")] = 1.0,
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
    strategy: StrategyOption = "single",
    deterministic: DeterministicOption = False,
) -> None:
    """Train a clip classifier, with which `audiomamba evaluate` scores generated clips.

    Labels are the names of the clips' folders, or part of their file names. Clips are split by --valid and --test, or
    by the lists of Speech Commands in DATA. Continue an interrupted run with --resume; the result is the same as
    without the interruption.

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
            strategy=strategy,
            deterministic=deterministic,
        )
    )
