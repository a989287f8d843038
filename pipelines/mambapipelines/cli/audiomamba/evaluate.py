"""The command `audiomamba evaluate`: likelihoods of test clips, and scores of generated and real clips."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    SUGGESTED,
    DeviceOption,
    InferencePrecisionOption,
    LabelPatternOption,
    SeedOption,
    SkipBadOption,
    TestPatternOption,
    ThreadsOption,
    ValidPatternOption,
    WordsOption,
    entries,
)


def evaluate(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Real clips, split as in training.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[NAME=]MODEL]...",
            help="Waveform models: folders, names of shipped ones, or hf://owner/name@revision.",
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Folder written by `audiomamba train-classifier`, or name of a shipped classifier."
        ),
    ] = None,
    clips: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Generated clips of any system; NAME may be that of the MODEL they are from. Repeatable.",
        ),
    ] = None,
    generate: Annotated[
        int | None, typer.Option(metavar="N", help="Generate N clips with each MODEL that has no --clips.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="G", help="Guidance of labelled clips, see `generate`.", show_default=SUGGESTED),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature, see `generate`.", show_default=SUGGESTED)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling, see `generate`.", show_default=SUGGESTED)
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Clips to choose each labelled clip from, see `generate`.", show_default=SUGGESTED
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|likelihood",
            help="What chooses among them, see `generate`; one like --classifier makes only the second accuracy fair.",
            show_default="what the model suggests, else likelihood",
        ),
    ] = None,
    label_pattern: LabelPatternOption = None,
    valid: ValidPatternOption = None,
    test: TestPatternOption = None,
    words: WordsOption = None,
    skip_bad: SkipBadOption = False,
    inception_over_all: Annotated[
        bool, typer.Option("--inception-over-all", help="Compute IS over all clips, without a held-out half.")
    ] = False,
    resamples: Annotated[
        int, typer.Option(min=20, metavar="N", help="Number of random halves for each interval.")
    ] = 200,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the tables and the plot.", show_default="none"),
    ] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Score models by the likelihood of test clips, and generated clips against real ones.

    With MODEL, the table has the negative log-likelihood of the test clips in bits and nats per sample. With
    --classifier, it has FID (against the training data), IS, modified IS and AM for the training and test data, for the
    generated clips, and for two negative controls, noise and silence. Low and high are 95 % intervals over clips.

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
            guidance=guidance,
            temperature=temperature,
            top_p=top_p,
            candidates=candidates,
            judge=judge,
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
            device=device,
            precision=precision,
        )
    )
