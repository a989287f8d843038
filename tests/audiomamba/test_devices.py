"""Every model of sound trains, is saved, read and used on a device as on the CPU, in both precisions."""

import pytest
import torch

import audiomamba
from audiomamba.data.labels import LabelSet
from audiomamba.data.quantisers import Quantiser
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig, save_waveform_model
from audiomamba.models.clip_classifier import (
    ClipClassifier,
    ClipClassifierConfig,
    load_clip_classifier,
    save_clip_classifier,
)
from audiomamba.models.log_mel import LogMelConfig
from model_laws import PRECISIONS, train_alike
from on_pretend import first_process, passed_on_pretend
from tolerances import DEVICE_FLOAT32, relative_error

SELECTIVE = StageConfig(1, {"name": "selective", "state_size": 2})
COMPLEX = StageConfig(1, {"name": "selective", "state_size": 2, "complex_state": True}, 1)
S4D = StageConfig(1, {"name": "s4d", "state_size": 2}, 2)
DIGITS = LabelSet("digit", ("0", "1"))
MODELS = {
    "whole stack": ((SELECTIVE,), (), True, ()),
    "unet": ((SELECTIVE, S4D, COMPLEX), (2, 3), True, ()),
    "not a unet": ((S4D, SELECTIVE), (2,), False, ()),
    "labelled": ((SELECTIVE, S4D), (2,), True, (DIGITS,)),
}
precisions = pytest.mark.parametrize("precision", PRECISIONS)


@precisions
@pytest.mark.parametrize("name", MODELS)
def test_waveform_models(name, precision, device, tmp_path):
    stages, pooling, unet, label_sets = MODELS[name]
    torch.manual_seed(0)
    config = WaveformModelConfig(
        stages, 4, pooling, blocks_on_the_way_down=unet, quantiser=Quantiser(sample_rate_hz=1000),
        label_sets=label_sets,
    )  # fmt: skip
    tokens = torch.randint(256, (2, 31))

    def loss_of(model, place):
        labels = torch.tensor([[1], [0]]).to(place) if label_sets else None
        read = tokens.to(place)
        total, count, _ = model.loss(read[:, :-1], read[:, 1:], model.labelled_state(labels))
        return total / count

    model = train_alike(WaveformModel(config), loss_of, device, precision)
    save_waveform_model(tmp_path / "model", model, details={})
    options = {"labels": {"digit": "1"}, "guidance": 1.5} if label_sets else {"prompt": tokens[0]}
    found, expected = (
        audiomamba.load(tmp_path / "model", device=place).generate(2, 0.02, seed=3, **options)
        for place in (device, "cpu")
    )
    assert torch.equal(found.classes, expected.classes)
    assert relative_error(found.log_likelihoods, expected.log_likelihoods) < DEVICE_FLOAT32


@precisions
def test_the_clip_classifier(precision, device, tmp_path):
    torch.manual_seed(0)
    sizes = {"stem_width": 4, "stage_width": 8, "blocks_per_stage": 1, "cardinality": 2, "base_width": 1}
    classifier = ClipClassifier(ClipClassifierConfig(("0", "1"), LogMelConfig(8000, 0.1), **sizes)).eval()
    # With an odd batch and two threads, oneDNN's gradient of a convolution in groups of few channels overruns memory.
    samples = torch.randn(4, classifier.config.log_mel.clip_length)

    def loss_of(model, place):
        logits = model(samples.to(place)).float()
        return torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 0]).to(place))

    model = train_alike(classifier, loss_of, device, precision)
    save_clip_classifier(tmp_path / "model", model, details={})
    read, _ = load_clip_classifier(tmp_path / "model")
    with torch.no_grad():
        assert relative_error(model(samples.to(device)).cpu(), read(samples)) < DEVICE_FLOAT32


@first_process
def test_all_of_this_holds_on_the_pretended_device():
    assert passed_on_pretend(__file__) == 2 * (len(MODELS) + 1)
