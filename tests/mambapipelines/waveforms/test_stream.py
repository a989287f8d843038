"""`audiomamba generate --stream`: the samples of the files, as they come, to whoever listens."""

import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import soundfile
import torch

from audiomamba.data.clock import Clock, LabelDurations
from audiomamba.data.labels import LabelSet
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.writing import write_waveform
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig
from mambapipelines.cli.audiomamba.main import main

RATE = 8000
COUNT = 200
SHORT = ("--seconds", str(COUNT / RATE), "--threads", "1")
ASKED = ("--label", "digit=each", "--guidance", "2", "--temperature", "0.9", "--seed", "5")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    stage = StageConfig(1, {"name": "selective", "state_size": 2})
    config = WaveformModelConfig(
        (stage, stage),
        8,
        (4,),
        quantiser=Quantiser(sample_rate_hz=RATE),
        label_sets=(LabelSet("digit", ("3", "7")),),
        clock=Clock(8, by_label=True, durations=(LabelDurations((1,), 9, (0.01, 0.02)),)),
    )
    folder = tmp_path_factory.mktemp("models") / "voice"
    voice = WaveformModel(config)
    torch.nn.init.normal_(voice.clock_embedding.tables[0].weight)
    voice.save_pretrained(folder)
    return folder


def files_of(model, folder, *options):
    """The samples in 16 bits that the files of the same request have, one clip after the other."""
    assert main(["generate", str(model), "--output", str(folder), *SHORT, *options]) == 0
    return np.concatenate([soundfile.read(path, dtype="int16")[0] for path in sorted(folder.glob("*.wav"))])


@pytest.mark.parametrize("continued", [False, True], ids=["from nothing", "continuing"])
def test_the_stream_has_the_samples_of_the_files(model, tmp_path, capsysbinary, continued):
    options = [*ASKED, "--clips", "3"]
    if continued:
        write_waveform(tmp_path / "before.wav", 0.3 * torch.sin(torch.arange(100) / 5), RATE)
        options += ["--continue", str(tmp_path / "before.wav"), "--undo-gain"]
    expected = files_of(model, tmp_path / "files", *options)
    capsysbinary.readouterr()
    assert main(["generate", str(model), "--stream", *SHORT, *options]) == 0
    captured = capsysbinary.readouterr()
    assert np.array_equal(np.frombuffer(captured.out, "<i2"), expected)
    assert len(expected) == 3 * (COUNT + 100 * continued) and expected.std() > 0
    said = captured.err.decode()
    assert "16 bits, signed, little-endian, mono, 8,000 Hz" in said and "first sample after" in said
    assert ("a prompt of 0.01 s" in said) == continued


def test_a_file_and_a_pipe_get_what_standard_output_gets(model, tmp_path, capsysbinary):
    command = ["generate", str(model), "--stream", *SHORT, *ASKED]
    assert main(command) == 0
    expected = capsysbinary.readouterr().out
    assert len(expected) == 2 * COUNT  # one clip unless more are asked for
    assert main([*command, "--output", str(tmp_path / "sound.pcm")]) == 0
    assert (tmp_path / "sound.pcm").read_bytes() == expected
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_bytes()))
    reader.start()
    assert main([*command, "--output", str(pipe)]) == 0
    reader.join(10)
    assert heard == [expected]


def test_a_listener_who_goes_ends_the_stream_quietly(model):
    start = "import sys; from mambapipelines.cli.audiomamba.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "generate", str(model), "--stream", "--seconds", "3600", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert len(process.stdout.read(1000)) == 1000  # long before the hour is generated
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == 0
    assert "Traceback" not in said


class Loudspeaker:
    """Stands for `sounddevice.RawOutputStream`."""

    def __init__(self, heard, **settings):
        self.heard, self.settings = heard, settings

    def __enter__(self):
        self.heard.append(self.settings)
        return self

    def __exit__(self, *_):
        pass

    def write(self, content):
        self.heard.append(content)


def test_playing_sends_the_stream_to_the_loudspeaker(model, capsysbinary, monkeypatch):
    assert main(["generate", str(model), "--stream", *SHORT, *ASKED]) == 0
    expected = np.frombuffer(capsysbinary.readouterr().out, "<i2")
    heard, module = [], types.ModuleType("sounddevice")
    module.PortAudioError = type("PortAudioError", (Exception,), {})
    module.RawOutputStream = lambda **settings: Loudspeaker(heard, **settings)
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert main(["generate", str(model), "--play", *SHORT, *ASKED]) == 0
    assert heard[0] == {"samplerate": RATE, "channels": 1, "dtype": "int16"}
    assert np.array_equal(np.frombuffer(b"".join(heard[1:]), np.int16), expected)
    assert capsysbinary.readouterr().out == b""

    def no_device(**_):
        raise module.PortAudioError("Error querying device -1")

    module.RawOutputStream = no_device
    assert main(["generate", str(model), "--play", *SHORT]) == 2
    assert b"cannot be played (Error querying device -1): connect" in capsysbinary.readouterr().err


MISTAKES = {
    "no package": (["--play"], "playing needs the package sounddevice"),
    "nowhere": ([], "--output is missing"),
    "no clip": (["--stream", "--clips", "0"], "--clips is 0"),
    "choice among whole clips": (["--stream", "--reject", "paper"], "are for whole clips"),
    "candidates": (["--stream", "--label", "digit=3", "--candidates", "2"], "are for whole clips"),
    "endless clock": (["--stream", "--clock", "1e9"], "the clock runs for 1e+09 seconds"),
    "compressed": (["--stream", "--format", "ogg"], "are for whole clips"),
    "two places": (["--play", "--output", "OUT"], "leave out --output"),
    "file in use": (["--stream", "--output", "USED"], "already exists: choose a new file"),
    "no folder": (["--stream", "--output", "OUT/sound.pcm"], "No such file or directory"),
    "no such label": (["--stream", "--label", "digit=8"], "8"),
    "no seconds": (["--stream", "--seconds", "0"], "more than 0"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_end_in_one_sentence(model, tmp_path, capsys, monkeypatch, options, message):
    (tmp_path / "used").write_bytes(b"kept")
    monkeypatch.setitem(sys.modules, "sounddevice", None)  # not installed
    options = [one.replace("OUT", str(tmp_path / "out")).replace("USED", str(tmp_path / "used")) for one in options]
    assert main(["generate", str(model), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("audiomamba: error: ") and message in captured.err
    assert captured.err.splitlines()[0] == captured.err.rstrip() and captured.out == ""
    assert (tmp_path / "used").read_bytes() == b"kept" and not (tmp_path / "out").exists()


def test_a_terminal_gets_no_raw_sound(model, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", str(model), "--stream"]) == 2
    assert "would write raw sound to the terminal" in capsys.readouterr().err
