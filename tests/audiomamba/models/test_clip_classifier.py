"""The clip classifier: its folder, its picture of sound, its data."""

import numpy as np
import pytest
import soundfile
import torch

from audiomamba.data.labelled_clips import changed_clip, labelled_splits
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.waveforms import Waveform
from audiomamba.metrics.likelihood import clip_likelihoods
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig, load_waveform_model
from audiomamba.models.clip_classifier import (
    ClipClassifier,
    ClipClassifierConfig,
    load_clip_classifier,
    opinions,
    save_clip_classifier,
)
from audiomamba.models.log_mel import LogMel, LogMelConfig
from mambacore.errors import InputError

SMALL = {"stem_width": 4, "stage_width": 8, "blocks_per_stage": 1, "cardinality": 2, "base_width": 2}
CONFIG = ClipClassifierConfig(("low", "high"), LogMelConfig(8_000, 0.5), **SMALL)


@pytest.mark.parametrize(("rate", "seconds"), [(16_000, 1.0), (8_000, 1.0), (22_050, 0.7), (1_000, 0.6)])
def test_pictures_have_their_size_at_any_rate_and_duration(rate, seconds):
    config = LogMelConfig(rate, seconds)
    picture = LogMel(config)(torch.randn(2, config.clip_length))
    assert picture.shape == (2, 32, 32)


def test_silence_is_minus_one_and_a_second_at_16_khz_has_the_published_hop():
    assert LogMelConfig().hop_length == 512
    assert torch.allclose(LogMel(LogMelConfig())(torch.zeros(1, 16_000)), torch.tensor(-1.0))


def test_the_paper_classifier_has_1024_features_and_34_million_parameters():
    paper = ClipClassifierConfig(tuple("0123456789"), LogMelConfig(), 64, 256, 3, 8, 64)
    count = sum(parameter.numel() for parameter in ClipClassifier(paper).parameters())
    assert paper.feature_width == 1024
    assert 34.2e6 < count < 34.6e6  # ResNeXt-29 8x64d: 34.4M (arXiv 1611.05431, table 7)


def test_a_saved_classifier_says_the_same(tmp_path):
    model = ClipClassifier(CONFIG).eval()
    clips = torch.randn(3, CONFIG.log_mel.clip_length)
    save_clip_classifier(tmp_path / "model", model, details={"seed": 1})
    found, details = load_clip_classifier(tmp_path / "model")
    assert details == {"seed": 1}
    assert found.config == CONFIG
    assert np.array_equal(opinions(found, clips).probabilities, opinions(model, clips).probabilities)


def test_clips_of_other_rates_and_lengths_are_fitted():
    model = ClipClassifier(CONFIG)
    assert model.fitted(Waveform(torch.ones(16_000), 16_000)).shape == (4_000,)
    assert model.fitted(Waveform(torch.ones(100), 8_000))[100:].abs().max() == 0


def test_a_change_is_a_function_of_seed_and_index():
    clip = torch.randn(8_000) * 0.1
    assert torch.equal(changed_clip(clip, 8_000, 5, 9), changed_clip(clip, 8_000, 5, 9))
    assert not torch.equal(changed_clip(clip, 8_000, 5, 9), changed_clip(clip, 8_000, 5, 10))


def test_labels_come_from_names_or_folders_and_splits_from_patterns(tmp_path):
    for digit in range(2):
        for take in (3, 7, 12):
            soundfile.write(tmp_path / f"{digit}_ann_{take}.wav", np.zeros(100), 8_000)
    splits = labelled_splits(tmp_path, label_pattern="^([0-9])_", valid="*_12.wav", test="*_7.wav")
    assert splits["train"].labels == ("0", "1")
    assert [path.name for path in splits["test"].paths] == ["0_ann_7.wav", "1_ann_7.wav"]
    with pytest.raises(InputError, match="label-pattern"):
        labelled_splits(tmp_path)
    with pytest.raises(InputError, match="group"):
        labelled_splits(tmp_path, label_pattern="[0-9]")


def test_likelihoods_leave_padding_out_and_do_not_depend_on_the_pieces():
    torch.manual_seed(0)
    quantiser = Quantiser(sample_rate_hz=8_000)
    stages = (StageConfig(layers=1), StageConfig(layers=1))
    config = WaveformModelConfig(model_width=8, pooling=(4,), stages=stages, quantiser=quantiser)
    model = WaveformModel(config).eval()
    clips = [torch.randint(256, (length,)) for length in (50, 123)]
    together = clip_likelihoods(model, clips, quantiser, piece_samples=2 * 37)
    for clip, found in zip(clips, together, strict=True):
        alone = clip_likelihoods(model, [clip], quantiser)[0]
        assert found.samples == clip.shape[0]
        assert found.nats == pytest.approx(alone.nats, rel=1e-5)


def test_the_shipped_classifier_hears_the_digits_that_the_shipped_voice_speaks():
    classifier, details = load_clip_classifier("shipped://digits-classifier")
    voice = load_waveform_model("shipped://digits")[0].config
    assert classifier.config.class_names == voice.label_sets[0].values
    assert classifier.config.log_mel.sample_rate_hz == voice.quantiser.sample_rate_hz
    assert details["test_accuracy"] > 0.95
