"""The command `audiomamba generate`: new clips, or continuations of a clip."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mambapipelines.cli.options import SUGGESTED, DeviceOption, InferencePrecisionOption, SeedOption, ThreadsOption


def generate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder written by `audiomamba train`, name of a shipped model, or hf://owner/name@revision.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="New folder for the clips, a table and a page of players; with --stream a new file or a named pipe.",
            show_default="standard output with --stream, else required",
        ),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(metavar="N", help="Number of clips.", show_default="16, or 1 with --stream or --play")
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Duration of each clip, without the clip it continues.")
    ] = 1.0,
    seed: SeedOption = 0,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; 0 takes the most probable value.", show_default=SUGGESTED),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample among the fewest values whose probabilities add up to P (nucleus sampling).",
            show_default=SUGGESTED,
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="NAME=VALUE",
            help="Condition on a label, such as digit=7; 'each' cycles through all values. Repeatable.",
            show_default="any",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="Strength of classifier-free guidance by the labels; values other than 1 double the cost.",
            show_default=SUGGESTED,
        ),
    ] = None,
    clock: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Pace the sound to last S seconds from the beginning of a clip or of --continue; 0 for no clock. For "
            "models that were trained with one.",
            show_default="a duration of training clips with these labels, or the whole with --continue",
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Generate N clips for each and keep the one that fits its labels best, see --judge.",
            show_default=f"{SUGGESTED}; 1 with --stream or --play",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|likelihood",
            help="Choose among candidates by this clip classifier, or by the model's own likelihoods.",
            show_default="what the model suggests, else likelihood",
        ),
    ] = None,
    continued: Annotated[
        Path | None, typer.Option("--continue", metavar="CLIP", help="Continue this clip, at the model's rate.")
    ] = None,
    undo_gain: Annotated[
        bool,
        typer.Option(
            "--undo-gain", help="Restore the loudness of the recordings (or of --continue) before normalisation."
        ),
    ] = False,
    batch: Annotated[int, typer.Option(metavar="N", help="Clips generated at once; they do not depend on it.")] = 16,
    audio_format: Annotated[str, typer.Option("--format", help="wav, flac, ogg or mp3.")] = "wav",
    reject: Annotated[
        str | None,
        typer.Option(
            metavar="paper|search",
            help="Reject clips by likelihood: the lowest 40 % and highest 5 %, or those outside the range of --real.",
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Real clips, not used in training, for --reject search.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write raw PCM (16 bits, mono) as samples are generated, clip after clip.")
    ] = False,
    play: Annotated[
        bool, typer.Option("--play", help="Play the clips as they are generated; needs the package sounddevice.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bfloat16|int8|mixed",
            help="Round the weights of linear layers to this format: fewer bytes to read per sample. mixed: int8 below "
            "a pooling, else bfloat16.",
            show_default="the model's own",
        ),
    ] = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    precision: InferencePrecisionOption = "float32",
) -> None:
    """Generate clips, or continue one.

    DIR contains the sound files, `clips.tsv` with bits per sample and defects (silent, clipped, shifted, runaway) of
    every clip, and `clips.html`, an offline page with players, waveforms and spectrograms. A clip depends only on the
    model, its labels, the seed and its number.

    With --stream or --play samples are sent as they are generated, clip after clip, and the latency of the first one is
    printed. They are the samples that the files in DIR would contain with --candidates 1.

    **Examples**

    `audiomamba generate model --clips 16 --seconds 1 --seed 0 --output clips`

    `audiomamba generate digits --label digit=7 --label speaker=jackson --output sevens`

    `audiomamba generate digits --label digit=each --clock 0.5 --candidates 8 --output best-of-eight`

    `audiomamba generate model --continue beginning.wav --clips 4 --seconds 2 --temperature 0.95 --output continued`

    `audiomamba generate digits --label digit=each --clips 10 --stream | ffplay -f s16le -ar 8000 -i -`

    `audiomamba generate model --clips 1000 --reject search --real held-out --output chosen`
    """
    from mambacore.errors import InputError  # noqa: PLC0415
    from mambapipelines.waveforms.generate import WaveformGenerationOptions, generate_clips  # noqa: PLC0415
    from mambapipelines.waveforms.stream import WaveformStreamOptions, stream_clips  # noqa: PLC0415

    streams = stream or play
    request: dict[str, Any] = {
        "model": model,
        "clips": clips if clips is not None else 1 if streams else 16,
        "seconds": seconds,
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "labels": labels or (),
        "guidance": guidance,
        "clock": clock,
        "continued": continued,
        "undo_gain": undo_gain,
        "weights": weights,
        "threads": threads,
        "device": device,
        "precision": precision,
    }
    if streams:
        whole = {"--candidates": candidates != 1 and candidates, "--judge": judge, "--reject": reject, "--real": real}
        asked = [name for name, value in whole.items() if value] + ["--format"] * (audio_format != "wav")
        if asked:
            raise InputError(
                f"leave out {' and '.join(asked)} with --stream or --play: these options are for whole clips"
            )
        stream_clips(WaveformStreamOptions(**request, output=output, play=play))
        return
    if output is None:
        raise InputError("--output is missing: name a new folder for the clips, or use --stream or --play")
    generate_clips(
        WaveformGenerationOptions(
            **request,
            output=output,
            candidates=candidates,
            judge=judge,
            batch=batch,
            audio_format=audio_format,
            reject=reject,
            real=real,
        )
    )
