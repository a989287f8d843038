"""Sounds and lists that were once misread, from a script that lies beside this repository where it is."""

import subprocess
import sys
from pathlib import Path

import pytest

import audiomamba
from mambacore.errors import InputError
from mambapipelines.cli.audiomamba.main import main

SCRIPT = Path(__file__).resolve().parents[3].parent / "shared" / "cases" / "make.py"
TRAIN = ("--recipe", "tiny", "--steps", "2", "--threads", "1")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not SCRIPT.is_file():
        pytest.skip(f"{SCRIPT} is not there")
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, timeout=120)
    return folder


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("plain.wav", 2),
        ("length_zero.wav", 2),
        ("gsm.wav", 2),
        ("pipe24.wav", 2),
        ("joined.mp3", 4),
        ("vbr_no_header.mp3", 60),
    ],
)
def test_sounds_are_read_to_their_end(cases: Path, name: str, seconds: float) -> None:
    waveform = audiomamba.read_waveform(str(cases / "audio" / name))
    assert len(waveform.samples) / waveform.sample_rate_hz == pytest.approx(seconds, rel=0.05)


def test_a_cut_sound_is_refused(cases: Path) -> None:
    with pytest.raises(InputError, match="cut"):
        audiomamba.read_waveform(str(cases / "audio" / "rf64_cut.wav"))


def test_lists_of_a_split_are_followed(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(cases / "lists"), *TRAIN, "--output", str(tmp_path / "out")]) == 0
    assert "16 training clips" in capsys.readouterr().err


def test_hidden_files_are_skipped(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(cases / "commands"), *TRAIN, "--output", str(tmp_path / "out")]) == 0
    assert "22 training clips" in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_no_exception(cases: Path, tmp_path: Path) -> None:
    assert main(["train", str(cases / "names"), *TRAIN, "--output", str(tmp_path / "out")]) in (0, 2)
