"""Clips as classes: folders, the official split of Speech Commands, long recordings, and examples by (seed, index)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiomamba.data.clips import (
    DIGITS,
    PADDING_TARGET,
    Clip,
    ClipCollection,
    ClipSampler,
    clip_example,
    read_clip,
    read_clips,
    speech_commands_files,
    split_recording,
)
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.waveforms import find_audio_files, read_waveform
from mambacore.errors import InputError

RATE = 8_000
QUANTISER = Quantiser("mu-law", 8, RATE)
DIGIT_CLIPS = Path(__file__).parents[4] / "shared" / "data" / "audio" / "spoken_digits_8khz"


def write(path, seconds=0.1, seed=0, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    soundfile.write(path, samples, rate)
    return path


def collection(*lengths):
    """Clips whose classes count up: every sample tells where it comes from."""
    clips = [Clip(str(number), torch.arange(length) % 100 + 100 * number) for number, length in enumerate(lengths)]
    return ClipCollection(tuple(clips), Quantiser(bits=10, sample_rate_hz=RATE))


def test_an_example_predicts_a_clip_from_the_middle_class_on():
    classes = torch.tensor([5, 6, 7], dtype=torch.uint8)
    whole = clip_example(classes, QUANTISER, 3)
    assert whole.inputs.tolist() == [128, 5, 6] and whole.targets.tolist() == [5, 6, 7]
    padded = clip_example(classes, QUANTISER, 5)
    assert padded.inputs.tolist() == [128, 5, 6, 7, 128]
    assert padded.targets.tolist() == [5, 6, 7, PADDING_TARGET, PADDING_TARGET]
    cut = clip_example(classes, QUANTISER, 2, start=1)
    assert cut.inputs.tolist() == [128, 6] and cut.targets.tolist() == [6, 7]
    assert whole.inputs.dtype == whole.targets.dtype == torch.int64
    with pytest.raises(InputError, match="at least one sample"):
        clip_example(classes, QUANTISER, 0)


def test_evaluation_sees_every_sample_once():
    clips = collection(10, 3, 8)
    targets = [example.targets for _, example in clips.examples(4)]
    assert all(target.shape == (4,) for target in targets)
    seen = torch.cat(targets)
    assert torch.equal(seen[seen != PADDING_TARGET], torch.cat([clip.classes for clip in clips.clips]))
    assert clips.seconds == 21 / RATE


@pytest.mark.parametrize("by_duration", [False, True])
def test_an_example_is_a_function_of_seed_and_index(by_duration):
    clips = collection(50, 9, 30)
    first, again = (ClipSampler(clips, 12, 7, by_duration) for _ in range(2))
    forwards = [first.sample(index) for index in range(20)]
    backwards = [again.sample(index) for index in reversed(range(20))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
    batch = again.sample_batch(5, 4)
    assert torch.equal(batch.targets, torch.stack([example.targets for example in forwards[5:9]]))
    other_seed = ClipSampler(clips, 12, 8, by_duration)
    assert any(not torch.equal(other_seed.sample(index).targets, forwards[index].targets) for index in range(20))


def test_every_clip_is_drawn_once_per_epoch_at_random_places():
    sampler = ClipSampler(collection(40, 12, 30, 5), 12, 0)
    orders, starts = set(), set()
    for epoch in range(12):
        firsts = [int(sampler.sample(4 * epoch + position).targets[0]) for position in range(4)]
        clips = [first // 100 for first in firsts]
        assert sorted(clips) == [0, 1, 2, 3]
        orders.add(tuple(clips))
        starts |= {first for first in firsts if first < 100}
    assert len(orders) > 4 and len(starts) > 4 and max(starts) <= 28


def test_seconds_are_drawn_equally_often_when_asked():
    sampler = ClipSampler(collection(900, 100), 5, 0, by_duration=True)
    drawn = [int(sampler.sample(index).targets[0]) >= 100 for index in range(600)]
    assert 0.06 < sum(drawn) / 600 < 0.15


def test_samplers_that_mean_nothing_are_refused():
    clips = collection(10)
    for arguments in ((clips, 0, 0), (clips, 5, -1), (ClipCollection((), QUANTISER), 5, 0)):
        with pytest.raises(InputError):
            ClipSampler(*arguments)


def test_a_folder_of_clips_of_any_format_and_rate(tmp_path):
    write(tmp_path / "b" / "one.wav", 0.1)
    write(tmp_path / "a" / "two.flac", 0.2, rate=16_000)
    write(tmp_path / "three.ogg", 0.3)
    clips = read_clips(find_audio_files(tmp_path), QUANTISER, folder=tmp_path)
    assert [clip.name for clip in clips.clips] == ["a/two.flac", "b/one.wav", "three.ogg"]
    assert [clip.classes.shape[0] for clip in clips.clips] == [1600, 800, 2400]
    assert all(clip.classes.dtype == torch.uint8 for clip in clips.clips)
    expected = QUANTISER.encode(read_waveform(tmp_path / "a" / "two.flac", RATE).samples)
    assert torch.equal(clips.clips[0].classes, expected)


def test_bad_files_among_good_ones_stop_or_are_named_and_skipped(tmp_path):
    for number in range(20):
        write(tmp_path / f"{number:02}.wav", seed=number)
    (tmp_path / "05.wav").write_text("no audio")
    (tmp_path / "11.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"05\.wav"):
        read_clips(find_audio_files(tmp_path), QUANTISER, folder=tmp_path)
    clips = read_clips(find_audio_files(tmp_path), QUANTISER, folder=tmp_path, skip_bad=True)
    assert len(clips.clips) == 18 and len(clips.bad) == 2
    assert "05.wav" in clips.bad[0] and "11.wav" in clips.bad[1]
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "x.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 1 files .*x\.wav is empty"):
        read_clips(find_audio_files(only_bad), QUANTISER, folder=only_bad, skip_bad=True)


@pytest.fixture
def archive(tmp_path):
    """Speech Commands in small: three clips per digit, another word, noises, and the lists of the split."""
    for word in (*DIGITS, "cat", "_background_noise_"):
        for speaker in ("aa", "bb", "cc"):
            write(tmp_path / word / f"{speaker}_nohash_0.wav", 0.01)
    (tmp_path / "validation_list.txt").write_text("".join(f"{word}/bb_nohash_0.wav\n" for word in (*DIGITS, "cat")))
    (tmp_path / "testing_list.txt").write_text("one/cc_nohash_0.wav\ncat/cc_nohash_0.wav\n")
    return tmp_path


def test_speech_commands_digits_follow_the_official_split(archive):
    files = {split: speech_commands_files(archive, split) for split in ("train", "valid", "test")}
    assert {split: len(paths) for split, paths in files.items()} == {"train": 19, "valid": 10, "test": 1}
    together = [path for paths in files.values() for path in paths]
    assert len(set(together)) == 30 and all(path.parent.name in DIGITS for path in together)
    assert files["test"] == [archive / "one" / "cc_nohash_0.wav"]
    assert [path.parent.name for path in files["valid"]] == sorted(DIGITS)


def test_an_incomplete_archive_is_refused(archive):
    with pytest.raises(InputError, match="no split 'dev'"):
        speech_commands_files(archive, "dev")
    with pytest.raises(InputError, match="no folder 'horse'"):
        speech_commands_files(archive, "train", ("one", "horse"))
    (archive / "one" / "cc_nohash_0.wav").unlink()
    with pytest.raises(InputError, match=r"lists one/cc_nohash_0\.wav, which is not there"):
        speech_commands_files(archive, "test")
    (archive / "validation_list.txt").unlink()
    with pytest.raises(InputError, match=r"validation_list\.txt is missing"):
        speech_commands_files(archive, "train")


def test_a_long_recording_is_cut_by_time_into_parts_that_do_not_overlap(tmp_path):
    path = write(tmp_path / "music.wav", 2.0)
    parts = split_recording(path, QUANTISER)
    assert list(parts) == ["train", "valid", "test"]
    pieces = [part.clips[0].classes for part in parts.values()]
    assert [piece.shape[0] for piece in pieces] == [14_080, 960, 960]
    assert torch.equal(torch.cat(pieces), read_clip(path, QUANTISER).classes)
    example = ClipSampler(parts["train"], 1_000, 3).sample(12345)
    assert (example.targets != PADDING_TARGET).all()
    for shares in ({}, {"train": 0.5}, {"train": 1.5, "test": -0.5}):
        with pytest.raises(InputError, match="add up to 1"):
            split_recording(path, QUANTISER, shares)
    with pytest.raises(InputError, match="too few samples to split"):
        split_recording(write(tmp_path / "short.wav", 3 / RATE), QUANTISER)


def test_importing_the_package_does_not_import_lightning():

    program = (
        "import sys, audiomamba, audiomamba.data.clips, audiomamba.models\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('lightning', 'pytorch_lightning')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(not DIGIT_CLIPS.is_dir(), reason="the spoken digits are not on this machine")
def test_real_spoken_digits_are_read():
    quantiser = Quantiser(sample_rate_hz=RATE)
    for path in sorted(DIGIT_CLIPS.glob("*.wav"))[::200]:
        clip = read_clip(path, quantiser)
        assert clip.classes.shape[0] > 800 and clip.classes.unique().shape[0] > 20
