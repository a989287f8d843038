"""Figures of speech, and the second classifier."""

import math

import numpy as np
import pytest
import torch

from audiomamba.metrics.second_opinion import SecondOpinion
from audiomamba.metrics.speech import speech_figures

RATE = 8000


def voice(pitch_hz, seconds=0.5):
    """Pulses at a pitch: ten harmonics of falling strength."""
    time = np.arange(round(seconds * RATE)) / RATE
    harmonics = range(1, 11)
    return torch.from_numpy(0.1 * sum(np.sin(2 * np.pi * n * pitch_hz * time) / n for n in harmonics)).float()


def white_noise(seconds=0.5, seed=0):
    return 0.1 * torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pitch_hz", [90, 140, 210, 320])
def test_a_voice_is_voiced_at_its_pitch(pitch_hz):
    found = speech_figures([voice(pitch_hz), 0.01 * voice(pitch_hz)], RATE)
    assert found.voiced_share == 1
    assert found.pitch_hz[1] == pytest.approx(pitch_hz, rel=0.03)
    assert found.flatness < 0.05


def test_noise_is_neither_voiced_nor_tonal():
    found = speech_figures([white_noise(seed=seed) for seed in range(4)], RATE)
    assert found.voiced_share < 0.05 and 0.4 < found.flatness < 0.7


def test_half_a_voice_counts_half_and_silence_nothing():
    half = torch.cat([voice(120), white_noise()])
    assert speech_figures([half], RATE).voiced_share == pytest.approx(0.5, abs=0.06)
    padded = torch.cat([voice(120), torch.zeros(4000)])
    assert speech_figures([padded, torch.zeros(4000)], RATE).voiced_share > 0.9
    nothing = speech_figures([torch.zeros(4000), torch.zeros(3)], RATE)
    assert nothing.voiced_share == 0 and math.isnan(nothing.flatness) and all(map(math.isnan, nothing.pitch_hz))


def test_the_second_classifier_hears_what_differs_in_timbre_not_in_loudness_or_padding():
    def clips(seed):
        loud = [1.0, 0.1, 0.5, 0.3, 0.7, 0.2]
        padding = torch.zeros(800)
        return [
            torch.cat([padding, sound * gain, padding])
            for gain in loud
            for sound in (voice(120), white_noise(seed=seed))
        ]

    labels = ["voice", "noise"] * 6
    opinion = SecondOpinion(clips(1), labels, RATE)
    assert opinion.labels([clip[400:] * 0.5 for clip in clips(2)]) == labels
    assert len(opinion.labels([torch.zeros(100)])) == 1  # nothing to hear, and still an answer
