"""Sound files of the wild: lengths that headers state wrongly, formats that cannot seek, cut and joined files."""

import io
import os
import struct

import numpy as np
import pytest
import soundfile
import torch

from audiomamba.data.clips import listed_clips
from audiomamba.data.labelled_clips import labelled_splits
from audiomamba.data.mp3 import mp3_streams
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.sound_files import named_complaints
from audiomamba.data.splits import read_split_clips
from audiomamba.data.waveforms import find_audio_files, read_header, read_waveform
from audiomamba.data.writing import write_waveform
from mambacore.errors import InputError
from tolerances import FLOAT32, relative_error

RATE = 16_000
SECONDS = 2


def noise(seconds=SECONDS, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def encoded(samples=None, **how):
    content = io.BytesIO()
    soundfile.write(content, noise() if samples is None else samples, how.pop("rate", RATE), **how)
    return content.getvalue()


def wave_of_length(length, samples_bytes, bits=16, after=b""):
    """A WAV file whose data chunk states a length of its own."""
    size = bits // 8
    layout = struct.pack("<IHHIIHH", 16, 1, 1, RATE, RATE * size, size, bits)
    chunks = b"WAVEfmt " + layout + b"data" + struct.pack("<I", length) + samples_bytes + after
    return b"RIFF" + struct.pack("<I", min(len(chunks), 2**32 - 1)) + chunks


PCM16 = (noise() * 32767).astype("<i2").tobytes()
PCM24 = (noise() * 8388607).astype("<i4").view("u1").reshape(-1, 4)[:, :3].tobytes()


def without_header_frame(content):
    """An MP3 file without its Xing header."""
    start = content.find(content[:2], max(content.find(b"Xing"), content.find(b"Info")))
    return content[start:]


def variable_rate_mp3():
    content = io.BytesIO()
    with soundfile.SoundFile(
        content, "w", RATE, 1, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5
    ) as sound:
        sound.write(np.concatenate([noise(5), 0.01 * np.sin(np.arange(10 * RATE) / 9).astype(np.float32)]))
    return without_header_frame(content.getvalue())


GOOD = {
    "a length of 0.wav": (lambda: wave_of_length(0, PCM16), SECONDS),
    "a pipe of 16 bits.wav": (lambda: wave_of_length(0x7FFFFFFF, PCM16), SECONDS),
    "a pipe of 24 bits.wav": (lambda: wave_of_length(0x7FFFF000 // 3 * 3, PCM24, 24), SECONDS),
    "a few bytes too long.wav": (lambda: wave_of_length(len(PCM16) + 44, PCM16), SECONDS),
    "gsm.wav": (lambda: encoded(noise(2)[:16_000], rate=8000, format="WAV", subtype="GSM610"), 2),
    "whole.rf64": (lambda: encoded(format="RF64"), SECONDS),
    "whole.aiff": (lambda: encoded(format="AIFF"), SECONDS),
    "whole.au": (lambda: encoded(format="AU"), SECONDS),
    "whole.mp3": (lambda: encoded(format="MP3"), SECONDS),
    "joined.mp3": (lambda: encoded(format="MP3") * 2, 2 * SECONDS),
    "joined three.mp3": (lambda: encoded(format="MP3") + b"TAG" + bytes(125) + encoded(noise(1), format="MP3"), 3),
    "variable rate without a header.mp3": (variable_rate_mp3, 15),
}
CUT = {
    "cut.rf64": lambda: encoded(format="RF64")[: 44 + len(PCM16) // 2],
    "cut.wav": lambda: wave_of_length(len(PCM16), PCM16[:-1000]),
    "cut.aiff": lambda: encoded(format="AIFF")[:20_000],
    "cut.au": lambda: encoded(format="AU")[:20_000],
}


@pytest.mark.parametrize("name", GOOD)
def test_every_sample_is_read_whatever_the_header_states(tmp_path, name):
    content, seconds = GOOD[name]
    (tmp_path / name).write_bytes(content())
    found = read_waveform(tmp_path / name)
    assert found.seconds == pytest.approx(seconds, abs=0.12)
    assert read_header(tmp_path / name).frames == found.samples.shape[0]
    assert float(found.samples[-RATE // 2 : -RATE // 4].abs().max()) > 1e-3


@pytest.mark.parametrize("name", CUT)
def test_files_that_are_cut_off_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(CUT[name]())
    with pytest.raises(InputError, match="is cut off"):
        read_waveform(tmp_path / name)


def test_an_empty_data_chunk_before_another_chunk_is_empty(tmp_path):
    (tmp_path / "x.wav").write_bytes(wave_of_length(0, b"", after=b"LIST" + struct.pack("<I", 4) + b"INFO"))
    with pytest.raises(InputError, match="holds no samples"):
        read_waveform(tmp_path / "x.wav")


def test_a_stretch_of_a_joined_file_lies_where_it_lies_in_the_whole(tmp_path):
    (tmp_path / "x.mp3").write_bytes(encoded(format="MP3") + encoded(noise(seed=1), format="MP3"))
    whole = read_waveform(tmp_path / "x.mp3").samples
    stretch = read_waveform(tmp_path / "x.mp3", start_seconds=1.75, seconds=0.5).samples
    expected = whole[round(1.75 * RATE) : round(2.25 * RATE)]
    assert relative_error(stretch, expected) < FLOAT32  # a decoder rounds otherwise where it begins


def test_streams_that_state_their_length_rightly_stay_as_they_are():
    assert mp3_streams(encoded(format="MP3")) is None
    assert mp3_streams(b"not audio at all") is None
    joined = mp3_streams(encoded(format="MP3") * 3)
    assert len(joined) == 3 and all(mp3_streams(part) is None for part in joined)


def test_channels_that_cancel_out_are_refused(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.stack([noise(), -noise()], axis=1), RATE)
    with pytest.raises(InputError, match=r"channels of .*x\.wav cancel out"):
        read_waveform(tmp_path / "x.wav")
    soundfile.write(tmp_path / "silent.wav", np.zeros((100, 2)), RATE)
    assert read_waveform(tmp_path / "silent.wav").samples.abs().max() == 0


def test_linked_folders_are_entered_once_and_hidden_files_left_out(tmp_path):
    tone = torch.from_numpy(noise(0.01))
    for name in ("data/a/1.wav", "elsewhere/2.wav", "data/a/._1.wav", "data/.cache/3.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_waveform(tmp_path / name, tone, RATE)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    found = [path.relative_to(tmp_path / "data").as_posix() for path in find_audio_files(tmp_path / "data")]
    assert found == ["a/1.wav", "b/2.wav"]


@pytest.fixture
def archive(tmp_path):
    """Speech Commands converted to FLAC, with a hidden file; its lists still say WAV."""
    for word in ("yes", "no"):
        for number in range(4):
            path = tmp_path / word / f"{number:08x}_nohash_0.flac"
            path.parent.mkdir(exist_ok=True)
            write_waveform(path, torch.from_numpy(noise(0.01)), RATE)
    (tmp_path / "yes" / "._00000000_nohash_0.wav").write_bytes(b"\0\5\x16\7")
    (tmp_path / "validation_list.txt").write_text("yes/00000000_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text(".\\no\\00000001_nohash_0.flac\n")
    return tmp_path


def test_lists_hold_whatever_way_their_paths_are_written(archive):
    assert listed_clips(archive / "testing_list.txt") == ["no/00000001_nohash_0.flac"]
    for words in (None, ("yes", "no")):
        split = read_split_clips(archive, Quantiser(sample_rate_hz=RATE), words=words)
        assert len(split.train.clips) == 6
        assert [clip.name for clip in split.valid.clips] == ["yes/00000000_nohash_0.flac"]
        assert split.test_names == ("no/00000001_nohash_0.flac",)
    labelled = labelled_splits(archive)
    assert {split: len(files.paths) for split, files in labelled.items()} == {"train": 6, "valid": 1, "test": 1}
    (archive / "validation_list.txt").unlink()  # one list is a list too
    assert len(labelled_splits(archive)["test"].paths) == 1


@pytest.mark.parametrize("listed", ["no/missing.wav", "../no/00000001_nohash_0.flac", "/no/00000001_nohash_0.flac"])
def test_lists_of_clips_that_are_not_there_are_refused(archive, listed):
    (archive / "testing_list.txt").write_text(f"{listed}\n")
    for read in (lambda: read_split_clips(archive, Quantiser()), lambda: labelled_splits(archive)):
        with pytest.raises(InputError, match=r"testing_list\.txt lists "):
            read()


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_not_utf8_are_read(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    (tmp_path / name).write_bytes(encoded(format="WAV"))
    assert read_waveform(tmp_path / name).seconds == SECONDS
    assert [path.name for path in find_audio_files(tmp_path)] == [name]


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [(noise(), 22_050, "22050 Hz with 1 channel"), (np.stack([noise(), noise(seed=1)], 1), RATE, "2 channels")],
)
def test_joined_mp3_parts_of_another_kind_are_refused(samples, rate, words, tmp_path):
    """Else the second part would be left out without a word."""
    path = tmp_path / "joined.mp3"
    path.write_bytes(encoded(format="MP3") + encoded(samples, rate=rate, format="MP3"))
    with pytest.raises(InputError, match=f"joined.mp3 cannot be read as one recording: .*{words}"):
        read_waveform(path)


def test_the_mp3_decoder_complains_by_the_name_of_the_file(tmp_path, caplog, capfd):
    content = encoded(format="MP3")
    path = tmp_path / "damaged.mp3"
    path.write_bytes(content[: len(content) // 2] + bytes(range(256)) * 8 + content[len(content) // 2 :])
    try:
        read_waveform(path)
    except InputError as error:
        assert "damaged.mp3" in str(error)
    else:
        assert "damaged.mp3: the MP3 decoder says:" in caplog.text
    assert "Note:" not in capfd.readouterr().err


def test_what_others_write_on_standard_error_meanwhile_is_passed_on(tmp_path, caplog, capfd):
    with named_complaints(tmp_path / "x.mp3"):
        os.write(2, b"step 1\nNote: Trying to resync...\n[src/libmpg123/layer3.c:1] error: big_values\n[bar] 5 %\n")
    # Commands that other tests have run show warnings on standard error too.
    others = [line for line in capfd.readouterr().err.splitlines() if "the MP3 decoder says:" not in line]
    assert others == ["step 1", "[bar] 5 %"]
    assert "x.mp3: the MP3 decoder says: Note: Trying to resync" in caplog.text


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_recordings_joined_into_one_file_are_read_to_the_end(container, tmp_path):
    content = io.BytesIO()
    soundfile.write(content, 0.3 * np.sin(np.arange(8000)), 8000, format=container)
    (tmp_path / "joined").with_suffix(f".{container.lower()}").write_bytes(content.getvalue() * 3)
    found = read_waveform(tmp_path / f"joined.{container.lower()}")
    assert found.seconds == pytest.approx(3, rel=0.05)
    assert float(found.samples[-4000:].abs().max()) > 0.2


def test_joined_recordings_of_different_rates_are_refused(tmp_path):
    parts = []
    for rate in (8000, 16000):
        content = io.BytesIO()
        soundfile.write(content, np.zeros(800), rate, format="FLAC")
        parts.append(content.getvalue())
    (tmp_path / "x.flac").write_bytes(b"".join(parts))
    with pytest.raises(InputError, match="different rates"):
        read_waveform(tmp_path / "x.flac")


@pytest.mark.parametrize("kind", ["link", "loop", "pipe"])
def test_what_is_no_file_is_listed_and_named(kind, tmp_path):
    """A link whose file was not fetched is a lost clip; a pipe would be waited for."""
    path = tmp_path / "x.wav"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("x.wav" if kind == "loop" else "nowhere.wav")
    assert find_audio_files(tmp_path) == [path]
    with pytest.raises(InputError, match="not a regular file" if kind == "pipe" else "leads nowhere"):
        read_waveform(path)
