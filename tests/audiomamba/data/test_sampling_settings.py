"""A model suggests how its clips are sampled; a caller's choice comes first, and labels are needed for some of it."""

import dataclasses

import pytest
import torch

from audiomamba.data.labels import LabelSet
from audiomamba.data.sampling_settings import SamplingSettings
from audiomamba.generation import WaveformGenerator
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig, load_waveform_model, save_waveform_model
from mambacore.errors import InputError

SUGGESTED = SamplingSettings(temperature=0.8, top_p=0.9, guidance=2.0, candidates=3)
LABELS = {"digit": "7"}


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    config = WaveformModelConfig(
        (StageConfig(1, {"name": "selective", "state_size": 2}),), 4, (), label_sets=(LabelSet("digit", ("3", "7")),)
    )
    return WaveformGenerator(WaveformModel(dataclasses.replace(config, sampling=SUGGESTED)))


def test_the_model_s_settings_are_used_where_none_are_chosen(generator):
    asked = {"temperature": 0.8, "top_p": 0.9, "guidance": 2.0, "candidates": 3, "labels": LABELS}
    suggested = generator.generate(2, 0.002, labels=LABELS).classes
    assert torch.equal(suggested, generator.generate(2, 0.002, **asked).classes)
    plain = {"temperature": 1.0, "top_p": 1.0, "guidance": 1.0, "candidates": 1}
    assert not torch.equal(suggested, generator.generate(2, 0.002, labels=LABELS, **plain).classes)
    # Without labels there is nothing to guide by or to compare.
    without = generator.generate(2, 0.002, temperature=0.8, top_p=0.9, guidance=1.0, candidates=1).classes
    assert torch.equal(generator.generate(2, 0.002).classes, without)
    # A stream has no candidates.
    streamed = torch.cat(list(generator.stream(0.002, labels=LABELS)))
    whole = generator.generate(1, 0.002, labels=LABELS, candidates=1)
    assert torch.equal(streamed, whole.samples[0])


def test_the_settings_are_stored_with_the_model(generator, tmp_path):
    save_waveform_model(tmp_path / "model", generator.model, details={})
    assert load_waveform_model(tmp_path / "model")[0].config.sampling == SUGGESTED
    values = generator.model.config.to_dict()
    del values["sampling"]  # as in folders written before
    assert WaveformModelConfig.from_dict(values).sampling == SamplingSettings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "finite"),
        ({"top_p": 0.0}, "top"),
        ({"guidance": 21}, "guidance is 21"),
        ({"candidates": 1.5}, "candidates"),
        ({"candidates": True}, "finite number"),
        ({"judges": "x"}, "sampling is"),
        ({"judge": ""}, "name a clip classifier"),
        ([], "sampling is"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        SamplingSettings.from_config(values)


def test_what_needs_labels_says_so():
    for chosen in ({"guidance": 2.0}, {"candidates": 2}):
        with pytest.raises(InputError, match="ask for a label too"):
            SUGGESTED.chosen(**chosen, labelled=False)
    assert SUGGESTED.chosen(labelled=False) == SamplingSettings(0.8, 0.9)
    assert str(SUGGESTED) == "temperature 0.8, top-p 0.9, guidance 2, the best of 3 candidates each"
