"""One gain per clip, and its silent end cut off."""

import pytest
import torch

from audiomamba.data.clips import read_clip
from audiomamba.data.preparation import ClipPreparation
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.writing import write_waveform
from mambacore.errors import InputError

RATE = 8000
QUANTISER = Quantiser(sample_rate_hz=RATE)


def tone(seconds, amplitude):
    return amplitude * torch.sin(torch.arange(round(seconds * RATE)) * 0.5)


def rms(samples):
    return float(samples.double().square().mean().sqrt())


@pytest.mark.parametrize("amplitude", [0.02, 0.2, 0.9])
def test_loud_and_quiet_clips_get_the_same_level(amplitude):
    samples, gain = ClipPreparation(target_rms=0.1).prepared(tone(0.5, amplitude), RATE)
    assert rms(samples) == pytest.approx(0.1, rel=1e-4)
    assert torch.allclose(samples, tone(0.5, amplitude) * gain)


def test_the_gain_is_capped_and_silence_stays_silence():
    preparation = ClipPreparation(target_rms=0.1, largest_gain=20)
    assert preparation.prepared(torch.zeros(100), RATE)[0].abs().max() == 0
    hiss = tone(0.1, 1e-4)
    samples, gain = preparation.prepared(hiss, RATE)
    assert gain == 20 and torch.equal(samples, hiss * 20)


def test_a_gain_never_clips():
    click = torch.zeros(8000)
    click[100] = 0.5
    samples, gain = ClipPreparation(target_rms=0.1).prepared(click, RATE)
    assert gain == pytest.approx(2) and samples.max() == 1


def test_the_silent_end_is_cut_off_and_what_fades_is_kept():
    clip = torch.cat([torch.zeros(800), tone(0.5, 0.5), 1e-4 * torch.ones(4000)])
    samples, _ = ClipPreparation(trim_db=40).prepared(clip, RATE)
    assert samples.shape[0] == 800 + 4000 + 240  # 30 ms of the silence
    assert ClipPreparation(trim_db=40).without_trimming().prepared(clip, RATE)[0].shape == clip.shape
    assert ClipPreparation(trim_db=40).prepared(torch.zeros(500), RATE)[0].shape[0] == 500


@pytest.mark.parametrize("lengths", [[4803], [1, 79, 80, 81, 4562], [1000] * 4 + [803]])
def test_the_measure_does_not_depend_on_the_pieces(lengths):
    preparation = ClipPreparation(target_rms=0.1, trim_db=40)
    clip = torch.cat([tone(0.4, 0.3), torch.zeros(1603)])
    whole, gain = preparation.prepared(clip, RATE)
    measure = preparation.measure(clip.split(lengths), RATE)
    pieces = list(preparation.apply(clip.split(lengths), measure))
    assert measure.gain == pytest.approx(gain) and torch.allclose(torch.cat(pieces), whole)


def test_a_file_is_prepared_as_its_samples_are(tmp_path):
    write_waveform(tmp_path / "tone.wav", tone(0.3, 0.05), RATE)
    preparation = ClipPreparation(target_rms=0.1)
    clip = read_clip(tmp_path / "tone.wav", QUANTISER, preparation=preparation)
    assert clip.gain == pytest.approx(0.1 / (0.05 / 2**0.5), rel=0.01)
    assert rms(QUANTISER.decode(clip.classes)) == pytest.approx(0.1, rel=0.01)
    assert ClipPreparation.from_config(preparation.to_config()) == preparation


@pytest.mark.parametrize("values", [{"target_rms": -1}, {"largest_gain": 0.5}, {"trim_db": "x"}, {"loud": 1}, [1]])
def test_preparations_that_make_no_sense_are_refused(values):
    with pytest.raises(InputError):
        ClipPreparation.from_config(values)
