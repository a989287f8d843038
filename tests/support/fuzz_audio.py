"""Inputs of the audio commands to damage, and the whole files that damaged ones are made of."""

import io
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch

from audiomamba.data.quantisers import Quantiser
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig, save_waveform_model
from fuzzing import AUDIOMAMBA, Target
from waveform_runs import training_command, write_tones

SOUND_WORDS = (
    b"RIFF",
    b"WAVE",
    b"fmt ",
    b"data",
    b"LIST",
    b"\xff\xff\xff\xff",
    b"\0\0\0\x80",
    b"OggS",
    b"fLaC",
    b"ID3",
)
LIST_WORDS = (b"tone-00.wav", b"tone-01.wav", b"./", b"\\", b"/", b"..")


def prepare(material: Path) -> Path:
    """Write the models and files that the commands use."""
    stages = (StageConfig(1, {"name": "selective", "state_size": 2}), StageConfig(1, {"name": "s4d", "state_size": 2}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WaveformModel(WaveformModelConfig(stages, 4, (2,), quantiser=Quantiser(sample_rate_hz=8000)))
    save_waveform_model(material / "model", model, details={})
    write_tones(material / "tones", 6)
    return material


def sound(container: str, subtype: str | None = None) -> bytes:
    """A short sound in a container."""
    content = io.BytesIO()
    soundfile.write(content, 0.3 * np.sin(np.arange(200)), 8000, format=container, subtype=subtype)
    return content.getvalue()


@cache
def targets(material: Path) -> dict[str, Target]:
    """Name -> target."""
    sounds = (sound("WAV", "FLOAT"), sound("WAV", "PCM_24"), sound("FLAC"), sound("OGG"), sound("MP3"))
    model = material / "model"
    length = ["--clips", "1", "--seconds", "0.001"]

    def generate_from(folder: str, place: Path) -> list[str]:
        return ["generate", folder, *length, "--output", str(place / "out")]

    def continued(path: Path, place: Path) -> list[str]:
        return [*generate_from(str(model), place), "--continue", str(path)]

    def trained_beside(path: Path, place: Path) -> list[str]:
        shutil.copytree(material / "tones", place / "tones")
        shutil.move(path, place / "tones" / path.name)
        return training_command(place / "tones", place / "out", 1)

    def with_file(name: str):  # type: ignore[no-untyped-def]
        def command(path: Path, place: Path) -> list[str]:
            shutil.copytree(model, place / "copy")
            shutil.move(path, place / "copy" / name)
            return generate_from(str(place / "copy"), place)

        return command

    found = (
        Target("clip to continue", sounds, continued, AUDIOMAMBA, SOUND_WORDS, "x.wav"),
        Target("clip to train on", sounds, trained_beside, AUDIOMAMBA, SOUND_WORDS, "x.wav", outputs=()),
        Target(
            "list of a split", (b"tone-00.wav\ntone-01.wav\n",), trained_beside, AUDIOMAMBA, LIST_WORDS,
            "testing_list.txt", outputs=(),
        ),
        Target(
            "configuration of a waveform model", ((model / "config.json").read_bytes(),), with_file("config.json"),
            AUDIOMAMBA, (b"[" * 5000, b"{", b'"layers": 1000000000', b"NaN"), structured=True,
        ),
        Target(
            "weights of a waveform model", ((model / "model.safetensors").read_bytes(),),
            with_file("model.safetensors"), AUDIOMAMBA,
        ),
    )  # fmt: skip
    return {target.name: target for target in found}
