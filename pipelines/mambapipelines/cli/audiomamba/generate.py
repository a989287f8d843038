"""The command `audiomamba generate`: new clips, or the continuation of one."""

from pathlib import Path
from typing import Annotated

import typer

from mambapipelines.cli.options import (
    DeviceOption,
    SeedOption,
    ThreadsOption,
)


def generate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder written by `audiomamba train`, name of a shipped model, or hf://owner/name@revision.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="New folder for the clips, their table and their page."),
    ],
    clips: Annotated[int, typer.Option(metavar="N", help="How many.")] = 16,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Length of each, without the clip that it continues.")
    ] = 1.0,
    seed: SeedOption = 0,
    temperature: Annotated[float, typer.Option(help="Below 1 is safer, 0 takes the likeliest sample.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest values that add up to this probability.")
    ] = 1.0,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="NAME=VALUE",
            help="Ask for a label, such as digit=7; 'each' takes all values in turn. Repeatable.",
            show_default="any",
        ),
    ] = None,
    guidance: Annotated[
        float, typer.Option(metavar="G", help="Exaggerate what the labels say: above 1, at twice the work.")
    ] = 1.0,
    continued: Annotated[
        Path | None, typer.Option("--continue", metavar="CLIP", help="Continue this clip, at the model's rate.")
    ] = None,
    undo_gain: Annotated[
        bool, typer.Option("--undo-gain", help="Make clips as loud as recordings or --continue, not as in training.")
    ] = False,
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
    device: DeviceOption = "auto",
) -> None:
    """Generate clips, or continue one.

    DIR gets the sound files, `clips.tsv` with bits per sample and flaws (silent, clipped, shifted, runaway) of every
    clip, and `clips.html`, a page with players, waveforms and spectrograms that opens offline. A clip is a function of
    the model, its labels, the seed and its number alone.

    **Examples**

    `audiomamba generate model --clips 16 --seconds 1 --seed 0 --output clips`

    `audiomamba generate digits --label digit=7 --label speaker=jackson --guidance 2 --output sevens`

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
            labels=labels or (),
            guidance=guidance,
            continued=continued,
            undo_gain=undo_gain,
            batch=batch,
            audio_format=audio_format,
            reject=reject,
            real=real,
            threads=threads,
            device=device,
        )
    )
