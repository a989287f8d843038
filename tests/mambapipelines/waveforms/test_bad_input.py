"""Odd and broken sounds through `audiomamba train` and `generate --continue`: they work, or one sentence says why."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiomamba.models import load_waveform_model
from mambapipelines.cli.audiomamba.main import main
from waveform_runs import RATE, training_command, write_tones

SAMPLES = 400


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("data") / "clips", 20)


@pytest.fixture(scope="module")
def model(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "model"
    assert main(training_command(tones, output, 1)) == 0
    return output


def tone(amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * 440 * np.arange(SAMPLES) / RATE)


def noise() -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE)


def sound(samples: np.ndarray, subtype: str = "PCM_16", rate: int = RATE) -> Callable[[Path], None]:
    return lambda path: soundfile.write(path, samples, rate, subtype=subtype, format=path.suffix[1:].upper())


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def shortened(make: Callable[[Path], None], share: float = 0.6) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        make(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return write


def patched(make: Callable[[Path], None], offset: int, form: str, value: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        make(path)
        data = bytearray(path.read_bytes())
        struct.pack_into(form, data, offset, value)
        path.write_bytes(data)

    return write


def with_value(value: float) -> np.ndarray:
    samples = tone()
    samples[123] = value
    return samples


# Made by; what `generate --continue` says of it, if anything.
LEGITIMATE = {
    "8 bit.wav": (sound(tone(), "PCM_U8"), None),
    "24 bit.wav": (sound(tone(), "PCM_24"), None),
    "24 bit.flac": (sound(tone(), "PCM_24"), None),
    "float.wav": (sound(tone(), "FLOAT"), None),
    "stereo.wav": (sound(np.stack([tone(), tone(0.2)], 1)), None),
    "silent.wav": (sound(0 * tone()), "silent"),
    "clipped.wav": (sound(np.clip(tone(4.0), -1, 1)), "clipped"),
    "float beyond full scale.wav": (sound(tone(4.0), "FLOAT"), "clipped"),
}
BAD = {
    "empty.wav": (content(b""), "is empty"),
    "no samples.wav": (sound(tone()[:0]), "holds no samples"),
    "no audio.wav": (content(b"this is no sound\n" * 10), "cannot be read as audio"),
    "picture.mp3": (content(b"\x89PNG\r\n\x1a\n" + bytes(200)), "cannot be read as audio"),
    "cut.wav": (shortened(sound(tone())), "is cut off"),
    "cut header.wav": (shortened(sound(tone()), 0.02), "cannot be read as audio"),
    "cut.flac": (shortened(sound(noise())), "cannot be read as audio|is cut off"),
    "cut.ogg": (shortened(sound(noise(), "VORBIS")), "is cut off"),
    "NaN.wav": (sound(with_value(np.nan), "FLOAT"), "holds NaN or infinity, first at second 0.015"),
    "infinity.wav": (sound(with_value(-np.inf), "FLOAT"), "holds NaN or infinity"),
    "whole numbers.wav": (sound(tone() * 32768, "FLOAT"), "where full scale is 1"),
    "rate of 0.wav": (patched(sound(tone()), 24, "<I", 0), "cannot be read as audio"),
    "rate of 2 MHz.wav": (patched(sound(tone()), 24, "<I", 2_000_000), "not a valid sampling rate"),
    "60000 channels.wav": (patched(sound(tone()), 22, "<H", 60_000), "cannot be read as audio"),
    "2 GB stated.wav": (patched(sound(tone()), 40, "<I", 2_000_000_000), "is cut off"),
    "a week stated.flac": (patched(sound(tone()), 22, ">I", 0xFFFFFFFF), "cannot be read as audio|is cut off|hours"),
}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for name, (make, _) in (LEGITIMATE | BAD).items():
        make(folder / name)
    return folder


@pytest.mark.parametrize("name", LEGITIMATE)
def test_a_clip_that_can_be_continued_is(
    model: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command = ["generate", str(model), "--continue", str(sounds / name), "--clips", "1", "--seconds", "0.01"]
    assert main([*command, "--format", "flac", "--output", str(tmp_path / "out")]) == 0
    samples, _ = soundfile.read(tmp_path / "out" / "clip-00000.flac")
    prompt = soundfile.read(sounds / name, always_2d=True)[0].mean(1).clip(-1, 1)
    assert len(samples) == SAMPLES + 80 and np.abs(samples[:SAMPLES] - prompt).max() < 0.03  # steps of mu-law
    said, flag = capsys.readouterr().err, LEGITIMATE[name][1]
    assert (f"{name} is {flag}: its continuation" in said) if flag else ("its continuation" not in said)


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_clip_gets_its_sentence_from_train_and_generate(
    model: Path, tones: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "clips").mkdir()
    for path in (*tones.iterdir(), sounds / name):
        (tmp_path / "clips" / path.name).symlink_to(path)
    output = tmp_path / "out"
    train = training_command(tmp_path / "clips", output, 1)
    generate = ["generate", str(model), "--continue", str(sounds / name), "--output", str(output)]
    capsys.readouterr()
    for command in (train, generate):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("audiomamba: error: ") and said.count("\n") == 1 and name in said
        assert any(part in said for part in BAD[name][1].split("|")), said
        assert not output.exists()


def test_bad_files_among_good_ones_are_named_counted_and_left_out(
    tones: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Odd ones are learned from, and counted where that matters."""
    (tmp_path / "clips").mkdir()
    for path in (*tones.iterdir(), *sounds.iterdir()):
        (tmp_path / "clips" / path.name).symlink_to(path)
    command = training_command(tmp_path / "clips", tmp_path / "model", 1, "--valid", "tone-0*", "--skip-bad")
    assert main(command) == 0
    said = capsys.readouterr().err
    named = [line for line in said.splitlines() if line.startswith("left out: ")]
    assert len(named) == len(BAD) and all(any(name in line for line in named) for name in BAD)
    assert f"{len(BAD)} files in all are left out" in said
    assert "1 clips to train on are silent, the first is silent.wav" in said
    assert "2 clips to train on are clipped, the first is clipped.wav" in said
    split = load_waveform_model(tmp_path / "model")[1]["split"]
    assert split["train"]["clips"] == 10 + len(LEGITIMATE) and split["valid"]["clips"] == 10


def test_a_list_with_an_endless_line_is_one_short_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = write_tones(tmp_path / "clips", 3)
    (clips / "testing_list.txt").write_text("x" * 10**6 + "\n")
    assert main(training_command(clips, tmp_path / "out", 1)) == 2
    assert len(capsys.readouterr().err) < 2000
