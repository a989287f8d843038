"""What rounded weights cost on real clips, measured and recorded with the model."""

import json
import math

import pytest
import torch

from audiomamba.data.clips import Clip
from audiomamba.data.quantisers import Quantiser
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig, load_waveform_model
from audiomamba.rounding import DETAIL, record_rounding_cost, recorded_change, rounding_cost
from mambacore.errors import InputError
from mambacore.native_library import native_library

native = pytest.mark.skipif(native_library() is None, reason="installed without the native library")


def model_of(mixer="selective"):
    torch.manual_seed(0)
    stages = (StageConfig(1, {"name": mixer}), StageConfig(1, {"name": "selective"}))
    model = WaveformModel(WaveformModelConfig(stages, 16, (2,), quantiser=Quantiser(sample_rate_hz=1000))).eval()
    with torch.no_grad():
        model.head.weight.mul_(8)
    return model


def clips():
    generator = torch.Generator().manual_seed(2)
    return [Clip(str(length), torch.randint(256, (length,), generator=generator)) for length in (40, 63)]


@native
def test_the_cost_in_float32_is_that_of_the_model_and_every_format_has_its_own():
    model = model_of()
    cost = rounding_cost(model, clips())
    nats = 0.0
    for clip in clips():
        inputs = torch.cat([torch.tensor([model.config.quantiser.middle_class]), clip.classes[:-1]]).unsqueeze(0)
        nats += float(model.loss(inputs, clip.classes.unsqueeze(0))[0].detach())
    assert cost.samples == 103 and cost.clips == 2
    assert cost.bits["float32"] == pytest.approx(nats / 103 / math.log(2), rel=1e-5)
    assert cost.change("float32") == 0
    assert len({round(bits, 9) for bits in cost.bits.values()}) == 4
    assert all(abs(cost.change(name)) < 0.1 for name in cost.bits)


@native
def test_a_record_stands_in_the_configuration_and_once_in_the_card(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "model", {"steps": 3})
    first, second = rounding_cost(model, clips()), rounding_cost(model, clips()[:1])
    for cost in (first, second):
        record_rounding_cost(tmp_path / "model", cost)
        loaded, details = load_waveform_model(tmp_path / "model")
        assert details["steps"] == 3
        assert details[DETAIL]["clips"] == cost.clips
        assert recorded_change(details, "int8") == pytest.approx(cost.change("int8"), abs=1e-6)
        card = (tmp_path / "model" / "README.md").read_text()
        assert card.count("## Rounded weights") == 1 and f"on {cost.clips} real clips" in card
        assert f"{cost.change('int8'):+.4f} in int8" in card and card.startswith("# Waveform model")
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True))
    assert recorded_change({}, "int8") is None


@native
def test_a_section_after_the_record_stays(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "model")
    card = tmp_path / "model" / "README.md"
    card.write_text("# Voice\n\n## Rounded weights\n\nold\n\n## Licence\n\nfree\n")
    record_rounding_cost(tmp_path / "model", rounding_cost(model, clips()))
    text = card.read_text()
    assert "old" not in text and text.endswith("## Licence\n\nfree\n") and text.count("## ") == 2


def test_what_cannot_be_measured_or_recorded_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="no native steps"):
        rounding_cost(model_of("attention"), clips())
    if native_library() is not None:
        with pytest.raises(InputError, match="there are no clips"):
            rounding_cost(model_of(), [])
        (tmp_path / "config.json").write_text(json.dumps({}))
        with pytest.raises(InputError):
            record_rounding_cost(tmp_path, rounding_cost(model_of(), clips()))
