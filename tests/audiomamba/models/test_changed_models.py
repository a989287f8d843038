"""What is hung on any module of a waveform model, or trained on, is in the clips that the model generates."""

import copy

import pytest
import torch

from audiomamba.data.clock import Clock
from audiomamba.data.labels import LabelSet
from audiomamba.data.quantisers import Quantiser
from audiomamba.generation import WaveformGenerator
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig
from audiomamba.models import waveform_model as waveform_module
from audiomamba.models.step_program import steps_library
from mambacore import use_backend
from mambacore.errors import InputError
from mambacore.native_library import native_library
from module_changes import CHANGES, places

SAMPLES = 6

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without the native library")


def build():
    torch.manual_seed(0)
    stages = (
        StageConfig(1, {"name": "selective", "state_size": 2}, feed_forward_expansion=2),
        StageConfig(1, {"name": "mamba2", "state_size": 2, "head_width": 4, "groups": 2}),
    )
    config = WaveformModelConfig(
        stages, 4, (2,), quantiser=Quantiser(sample_rate_hz=1000), label_sets=(LabelSet("digit", ("0", "1")),),
        clock=Clock(4),
    )  # fmt: skip
    model = WaveformModel(config).eval()
    with torch.no_grad():  # norms and the clock start as constants
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def likelihoods(generator):
    seconds = SAMPLES / 1000
    made = generator.generate(1, seconds, seed=3, temperature=0.0, labels={"digit": "1"}, clock=seconds)
    return made.log_likelihoods


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_native_steps_stand_aside_for_what_is_hung_on_any_module(change):
    model, tried = build(), 0
    before = likelihoods(WaveformGenerator(model))
    for path in places(model, change):
        changed = copy.deepcopy(model)
        CHANGES[change](changed.get_submodule(path))
        generator = WaveformGenerator(changed)
        assert not generator.is_native or change.endswith("for a parameter"), path  # which is read like a parameter
        assert (likelihoods(generator) - before).abs().max() > 1e-6, f"{path} is not called at all"
        tried += 1
    assert tried >= 10


def test_a_generator_follows_a_model_that_changes():
    model = build()
    generator = WaveformGenerator(model)
    likelihoods(generator)
    with torch.no_grad():
        model.head.weight.mul_(2)  # as training goes on
    assert torch.equal(likelihoods(generator), likelihoods(WaveformGenerator(model)))
    model.load_state_dict(build().state_dict())
    assert torch.equal(likelihoods(generator), likelihoods(WaveformGenerator(build())))
    model.final_norm.register_forward_hook(lambda _, __, outputs: 2 * outputs)
    assert generator.is_native is False
    with torch.autocast("cpu", torch.bfloat16):
        assert steps_library(build()) is None


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_model_that_computes_no_numbers_makes_no_clips(backend):
    with torch.no_grad(), use_backend(backend):
        model = build()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.sign_().mul_(3e38)
        with pytest.raises(InputError, match=r"computes probabilities that are not numbers \(NaN\)"):
            likelihoods(WaveformGenerator(model))


def test_a_hook_sees_the_whole_waveform(monkeypatch):
    monkeypatch.setattr(waveform_module, "PIECE_POSITIONS", 8)
    model, kept = build(), {}
    model.final_norm.register_forward_hook(lambda _, __, outputs: kept.update(outputs=outputs))
    with torch.no_grad():
        model(torch.randint(256, (1, 20)))
    assert kept["outputs"].shape == (1, 20, 4)
