"""Which clips are trained on, validated on and left out, whatever a folder offers."""

import logging
import os

import pytest
import torch

from audiomamba.data.clips import DIGITS
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.splits import read_split_clips
from audiomamba.data.writing import write_waveform
from mambacore.errors import InputError

RATE = 8000
QUANTISER = Quantiser(sample_rate_hz=RATE)


def write(folder, *names, samples=40):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_waveform(folder / name, torch.linspace(-0.5, 0.5, samples), RATE)
    return folder


def names_of(collection):
    return [clip.name for clip in collection.clips]


def test_patterns_choose_and_test_clips_are_not_read(tmp_path):
    write(tmp_path, *(f"{digit}_ann_{take}.wav" for digit in (0, 1) for take in (5, 12, 30)))
    (tmp_path / "0_ann_7.wav").write_bytes(b"not audio")
    split = read_split_clips(tmp_path, QUANTISER, valid="*_1[0-4].wav", test="*_[5-9].wav")
    assert names_of(split.train) == ["0_ann_30.wav", "1_ann_30.wav"]
    assert names_of(split.valid) == ["0_ann_12.wav", "1_ann_12.wav"]
    assert not split.are_recordings
    assert split.names()["test"] == ("0_ann_5.wav", "0_ann_7.wav", "1_ann_5.wav")


@pytest.mark.parametrize(
    ("valid", "test", "message"),
    [
        ("*.mp3", None, "no file of .* matches the pattern"),
        ("*.wav", None, "leaves none for training"),
        ("a*", "a*", "make them exclusive"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(tmp_path, valid, test, message):
    with pytest.raises(InputError, match=message):
        read_split_clips(write(tmp_path, "a.wav", "b.wav"), QUANTISER, valid=valid, test=test)


def test_lists_in_the_folder_split_it(tmp_path):
    write(tmp_path, "x/1.wav", "x/2.wav", "y/3.wav", "y/4.wav")
    (tmp_path / "validation_list.txt").write_text("x/2.wav\n")
    (tmp_path / "testing_list.txt").write_text("y/4.wav\n\n")
    split = read_split_clips(tmp_path, QUANTISER)
    assert names_of(split.train) == ["x/1.wav", "y/3.wav"] and names_of(split.valid) == ["x/2.wav"]
    assert names_of(read_split_clips(tmp_path, QUANTISER, words=["x"]).train) == ["x/1.wav"]
    (tmp_path / "testing_list.txt").write_text("y/5.wav\n")
    with pytest.raises(InputError, match=r"lists y/5\.wav, which is not there"):
        read_split_clips(tmp_path, QUANTISER)
    (tmp_path / "testing_list.txt").write_text("x/2.wav\n")
    with pytest.raises(InputError, match="list it once"):
        read_split_clips(tmp_path, QUANTISER)


def test_speech_commands_is_its_ten_digits(tmp_path):
    write(tmp_path, *(f"{word}/{number}.wav" for word in (*DIGITS, "cat") for number in (1, 2)))
    (tmp_path / "validation_list.txt").write_text("zero/1.wav\ncat/1.wav\n")
    (tmp_path / "testing_list.txt").write_text("one/1.wav\n")
    split = read_split_clips(tmp_path, QUANTISER)
    assert len(split.train.clips) == 18 and names_of(split.valid) == ["zero/1.wav"]
    assert split.test_names == ("one/1.wav",)
    assert "Speech Commands" in split.rule
    assert names_of(read_split_clips(tmp_path, QUANTISER, words=["cat"]).train) == ["cat/2.wav"]


def test_many_clips_without_a_rule_are_split_by_their_names(tmp_path):
    write(tmp_path, *(f"{number}.wav" for number in range(60)))
    split = read_split_clips(tmp_path, QUANTISER)
    assert 1 <= len(split.valid.clips) <= 10 and len(split.train.clips) + len(split.valid.clips) == 60
    assert names_of(read_split_clips(tmp_path, QUANTISER).valid) == names_of(split.valid)


def test_recordings_are_cut_by_time(tmp_path):
    write(tmp_path, "a.wav", "b.flac", samples=1000)
    for data, clips in ((tmp_path, 2), (tmp_path / "a.wav", 1)):
        split = read_split_clips(data, QUANTISER)
        assert split.are_recordings and len(split.train.clips) == len(split.valid.clips) == clips
        assert [clip.classes.shape[0] for clip in (split.train.clips[0], split.valid.clips[0])] == [880, 60]
        assert split.test_names == ("a.wav (test)", "b.flac (test)")[:clips]
    with pytest.raises(InputError, match="is one recording"):
        read_split_clips(tmp_path / "a.wav", QUANTISER, valid="*")


def test_bad_files_are_named_or_skipped(tmp_path):
    write(tmp_path, *(f"{number}.wav" for number in range(30)))
    (tmp_path / "8.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"8\.wav"):
        read_split_clips(tmp_path, QUANTISER)
    split = read_split_clips(tmp_path, QUANTISER, skip_bad=True)
    bad = [*split.train.bad, *split.valid.bad]
    assert len(bad) == 1 and "8.wav" in bad[0]
    assert len(split.train.clips) + len(split.valid.clips) == 29


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        read_split_clips(tmp_path / "none", QUANTISER)


def test_names_that_are_not_utf8_are_split_like_others(tmp_path):
    write(tmp_path, *(f"{number}.wav" for number in range(30)))
    os.rename(tmp_path / "7.wav", os.path.join(os.fsencode(tmp_path), b"caf\xe9.wav"))
    split = read_split_clips(tmp_path, QUANTISER)
    assert len(split.train.clips) + len(split.valid.clips) == 30


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), ("\n \n", "is empty"), (".\n", "outside its folder")]
)
def test_lists_that_name_nothing_are_refused(content, message, tmp_path):
    write(tmp_path, *(f"{number}.wav" for number in range(30)))
    (tmp_path / "testing_list.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        read_split_clips(tmp_path, QUANTISER)


@pytest.mark.parametrize(("name", "is_noted"), [("test_list.txt", True), ("README.txt", False)])
def test_a_list_of_another_name_is_noted(name, is_noted, tmp_path, caplog):
    write(tmp_path, *(f"{number}.wav" for number in range(30)))
    (tmp_path / name).write_text("3.wav\n4.wav\n" if is_noted else "Clips of 2020\n")
    with caplog.at_level(logging.WARNING):
        read_split_clips(tmp_path, QUANTISER)
    assert ("lists clips but is not used" in caplog.text) is is_noted
