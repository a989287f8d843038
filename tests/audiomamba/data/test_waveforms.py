"""Audio files in: every format, depth, rate and number of channels; everything wrong in one sentence with the name."""

import struct

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.transforms import Resample

from audiomamba.data import waveforms
from audiomamba.data.waveforms import (
    condition_of,
    cut_or_pad,
    find_audio_files,
    read_header,
    read_waveform,
    resample,
    waveform_pieces,
)
from mambacore.errors import InputError
from tolerances import relative_error

RATE = 16_000


def tone(seconds=0.5, rate=RATE, hertz=440.0, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def written(path, samples=None, rate=RATE, subtype=None):
    soundfile.write(path, tone() if samples is None else samples, rate, subtype=subtype)
    return path


# Encoding, and how far a sample may be off: half a step of whole numbers; the ears' tolerance for lossy formats.
ENCODINGS = {
    ("wav", "PCM_U8"): 2**-7,
    ("wav", "PCM_16"): 2**-15,
    ("wav", "PCM_24"): 2**-23,
    ("wav", "PCM_32"): 2**-24,
    ("wav", "FLOAT"): 0,
    ("wav", "DOUBLE"): 0,
    ("wav", "ULAW"): 2**-6,
    ("flac", "PCM_16"): 2**-15,
    ("flac", "PCM_24"): 2**-23,
    ("ogg", "VORBIS"): 0.05,
    ("mp3", "MPEG_LAYER_III"): 0.05,
}


@pytest.mark.parametrize(("encoding", "tolerance"), ENCODINGS.items(), ids=map("-".join, ENCODINGS))
def test_every_encoding_is_read(tmp_path, encoding, tolerance):
    path = written(tmp_path / f"tone.{encoding[0]}", subtype=encoding[1])
    waveform = read_waveform(path)
    assert waveform.sample_rate_hz == RATE and waveform.samples.dtype == torch.float32
    assert waveform.samples.shape == (8000,) and waveform.seconds == 0.5
    assert (waveform.samples - torch.from_numpy(tone())).abs()[100:-100].max() <= tolerance
    header = read_header(path)
    assert (header.frames, header.channels, header.seconds) == (8000, 1, 0.5) and encoding[1] in header.encoding


def test_channels_are_averaged(tmp_path):
    left, right = tone(), tone(hertz=300, amplitude=0.2)
    found = read_waveform(written(tmp_path / "stereo.wav", np.stack([left, right], 1), subtype="FLOAT")).samples
    assert relative_error(found, torch.from_numpy((left + right) / 2)) < 1e-6
    many = np.repeat(left[:, None], 6, axis=1)
    assert relative_error(read_waveform(written(tmp_path / "six.flac", many)).samples, torch.from_numpy(left)) < 1e-4


RATES = [(8_000, 16_000), (44_100, 16_000), (48_000, 8_000), (22_050, 16_000), (16_000, 44_100), (44_101, 16_000)]


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
def test_a_tone_keeps_its_pitch_and_length_at_every_rate(tmp_path, from_rate, to_rate):
    path = written(tmp_path / "tone.wav", tone(rate=from_rate), from_rate, "FLOAT")
    waveform = read_waveform(path, to_rate)
    assert waveform.sample_rate_hz == to_rate and abs(waveform.seconds - 0.5) < 2e-4
    expected = torch.from_numpy(tone(rate=to_rate))
    length = min(len(expected), len(waveform.samples))
    assert (waveform.samples[:length] - expected[:length]).abs()[200:-200].max() < 5e-3


@pytest.mark.parametrize(("from_rate", "to_rate"), RATES)
def test_resampling_in_pieces_is_resampling_at_once(monkeypatch, from_rate, to_rate):
    samples = torch.randn(30_011, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(waveforms, "_BLOCK_VALUES", 3_000)
    ratio = waveforms.Fraction(to_rate, from_rate)
    pieces = list(waveforms._resampled(iter(samples.split(701)), ratio))
    nearest = ratio.limit_denominator(1000)
    assert len(pieces) > 2
    assert relative_error(torch.cat(pieces), Resample(nearest.denominator, nearest.numerator)(samples)) < 2e-6
    assert abs(nearest / ratio - 1) < (1e-5 if from_rate == 44_101 else 1e-15)


def test_resampling_nothing_or_to_the_same_rate_changes_nothing():
    samples = torch.randn(10)
    assert resample(samples, 8000, 8000) is samples
    assert resample(torch.empty(0), 8000, 16000).shape == (0,)
    assert resample(samples, 8000, 16000).shape == (20,)


def test_a_stretch_is_the_same_part_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(waveforms, "_BLOCK_VALUES", 1_000)
    path = written(tmp_path / "noise.wav", np.random.default_rng(0).uniform(-1, 1, RATE), subtype="FLOAT")
    whole = read_waveform(path).samples
    assert len(list(waveform_pieces(path))) == 16
    assert torch.equal(read_waveform(path, start_seconds=0.25, seconds=0.5).samples, whole[4000:12000])
    assert torch.equal(read_waveform(path, start_seconds=0.9, seconds=5).samples, whole[14400:])
    with pytest.raises(InputError, match=r"noise.wav lasts 1.00 seconds, so there is nothing after second 1"):
        read_waveform(path, start_seconds=1)
    for options in ({"start_seconds": -1}, {"seconds": 0}, {"seconds": float("nan")}, {"sample_rate_hz": 10}):
        with pytest.raises(InputError, match=r"noise\.wav"):
            read_waveform(path, **options)


def test_lengths_are_cut_or_padded():
    samples = torch.arange(5.0)
    assert cut_or_pad(samples, 3, 1).tolist() == [1, 2, 3]
    assert cut_or_pad(samples, 4, 3, fill=9).tolist() == [3, 4, 9, 9]


def patched(path, offset, code, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, offset, value)
    path.write_bytes(data)


def shortened(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def with_value(value):
    samples = tone()
    samples[1234] = value
    return samples


def noise():
    return np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE)


MISTAKES = {
    "missing": (lambda folder: folder / "x.wav", "there is no file"),
    "a folder": (lambda folder: folder, "is a folder"),
    "empty": (lambda folder: (folder / "x.wav").write_bytes(b""), "is empty"),
    "text": (lambda folder: (folder / "x.wav").write_text("no audio " * 100), "cannot be read as audio"),
    "no samples": (lambda folder: written(folder / "x.wav", np.zeros(0)), "holds no samples"),
    "cut header": (lambda folder: shortened(written(folder / "x.wav"), 0.001), "cannot be read as audio"),
    "cut wav": (lambda folder: shortened(written(folder / "x.wav")), "is cut off"),
    "cut 24 bit": (lambda folder: shortened(written(folder / "x.wav", subtype="PCM_24")), "is cut off"),
    "cut flac": (lambda folder: shortened(written(folder / "x.flac", noise())), "cannot be read as audio|is cut off"),
    "cut ogg": (lambda folder: shortened(written(folder / "x.ogg", noise())), "is cut off"),
    "cut mp3": (lambda folder: shortened(written(folder / "x.mp3", noise())), "cannot be read as audio|is cut off"),
    "NaN": (lambda folder: written(folder / "x.wav", with_value(np.nan), subtype="FLOAT"), "NaN or infinity.* 0.077"),
    "infinity": (lambda folder: written(folder / "x.wav", with_value(np.inf), subtype="FLOAT"), "NaN or infinity"),
    "whole numbers": (lambda folder: written(folder / "x.wav", tone() * 32768, subtype="FLOAT"), "where full scale"),
    "rate 0": (lambda folder: patched(written(folder / "x.wav"), 24, "<I", 0), "cannot be read as audio"),
    "rate 4 GHz": (lambda folder: patched(written(folder / "x.wav"), 24, "<I", 4_000_000_000), "cannot be read"),
    "rate 2 MHz": (lambda folder: patched(written(folder / "x.wav"), 24, "<I", 2_000_000), "not a valid sampling rate"),
    "rate 3 Hz": (lambda folder: patched(written(folder / "x.wav"), 24, "<I", 3), "not a valid sampling rate"),
    "no channels": (lambda folder: patched(written(folder / "x.wav"), 22, "<H", 0), "cannot be read as audio"),
    "60,000 channels": (lambda folder: patched(written(folder / "x.wav"), 22, "<H", 60_000), "cannot be read as audio"),
    "77 bits": (lambda folder: patched(written(folder / "x.wav"), 34, "<H", 77), "cannot be read as audio"),
    "unknown codec": (lambda folder: patched(written(folder / "x.wav"), 20, "<H", 0x9999), "cannot be read as audio"),
    "2 GB stated": (lambda folder: patched(written(folder / "x.wav"), 40, "<I", 2_000_000_000), "is cut off"),
    "flac of a day": (lambda folder: patched(written(folder / "x.flac"), 22, ">I", 0xFFFFFFFF), "cannot be read|cut"),
}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path, make, message):
    made = make(tmp_path)
    path = made if made == tmp_path else next(tmp_path.iterdir(), tmp_path / "x.wav")
    with pytest.raises(InputError, match=message) as caught:
        read_waveform(path, 8_000)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "; " in str(caught.value)


def test_a_file_that_was_written_to_a_pipe_is_read(tmp_path):
    path = written(tmp_path / "piped.wav")
    patched(path, 40, "<I", 0xFFFFFFFF)
    patched(path, 4, "<I", 0xFFFFFFFF)
    assert read_waveform(path).samples.shape == (8000,)


def test_silent_clipped_and_shifted_waveforms_are_read_and_known(tmp_path):
    silent = read_waveform(written(tmp_path / "silent.wav", np.zeros(RATE))).samples
    assert condition_of(silent).is_silent and condition_of(silent).clipped_fraction == 0
    assert condition_of(torch.empty(0)).is_silent
    loud = read_waveform(written(tmp_path / "loud.wav", np.clip(3 * tone(amplitude=1), -1, 1))).samples
    assert condition_of(loud).clipped_fraction > 0.5 and not condition_of(loud).is_silent
    assert condition_of(torch.from_numpy(tone(amplitude=1.0, hertz=430))).clipped_fraction == 0
    beyond = read_waveform(written(tmp_path / "beyond.wav", tone(amplitude=1.5), subtype="FLOAT")).samples
    assert condition_of(beyond).peak == pytest.approx(1.5, abs=1e-3)
    assert condition_of(torch.full((100,), 0.25)).mean == 0.25


def test_files_are_found_in_the_order_of_their_names(tmp_path):
    for name in ("b.wav", "a/z.FLAC", "a/b.mp3", ".hidden.wav", ".cache/c.wav", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_audio_files(tmp_path)]
    assert found == ["a/b.mp3", "a/z.FLAC", "b.wav"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="holds no audio file"):
        find_audio_files(tmp_path / "nothing")
    with pytest.raises(InputError, match="there is no folder"):
        find_audio_files(tmp_path / "nowhere")
