"""A U-Net generates through captured graphs, one for each step until its poolings meet again, what it does without."""

import pytest
import torch

from audiomamba.data.clock import Clock
from audiomamba.data.labels import LabelSet
from audiomamba.data.quantisers import Quantiser
from audiomamba.generation import WaveformGenerator
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig
from fake_graphs import use_fake_graphs
from mambacore import use_backend
from on_pretend import first_process, passed_on_pretend
from tolerances import DEVICE_FLOAT32, relative_error

POOLING = (2, 3)
SAMPLES = 30
DIGITS = LabelSet("digit", ("0", "1"))
MODELS = {
    "guided": ((DIGITS,), {"labels": {"digit": "1"}, "guidance": 2.0, "top_p": 0.8}),
    "after a prompt": ((), {"prompt": torch.arange(100, 107)}),
    "with a clock": ((DIGITS,), {"labels": {"digit": "1"}, "clock": 0.02}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_unet_generates_the_same_through_graphs(name, device, monkeypatch):
    label_sets, options = MODELS[name]
    mixers = ({"name": "selective", "state_size": 3}, {"name": "s4d", "state_size": 2}, {"name": "gru"})
    if device.type == "pretend":  # which does not have PyTorch's GRU
        mixers = (*mixers[:2], mixers[0])
    stages = tuple(StageConfig(1, mixer) for mixer in mixers)
    quantiser = Quantiser(sample_rate_hz=1000)
    torch.manual_seed(0)
    clock = Clock(4, by_label=True) if "clock" in options else Clock()
    config = WaveformModelConfig(stages, 4, POOLING, quantiser=quantiser, label_sets=label_sets, clock=clock)
    model = WaveformModel(config)
    if model.clock_embedding is not None:
        torch.nn.init.normal_(model.clock_embedding.tables[0].weight)
    generator = WaveformGenerator(model.to(device))
    with use_backend("torch"):
        expected = generator.generate(2, SAMPLES / 1000, seed=5, **options)
        graphs = use_fake_graphs(monkeypatch, device)
        found = generator.generate(2, SAMPLES / 1000, seed=5, **options)
    assert len(graphs) == 6 and sum(graph.replays for graph in graphs) >= SAMPLES - 8
    assert torch.equal(found.classes, expected.classes)
    assert relative_error(found.log_likelihoods, expected.log_likelihoods) < DEVICE_FLOAT32


@first_process
@pytest.mark.slow
def test_this_holds_on_the_pretended_device():
    assert passed_on_pretend(__file__) == len(MODELS)
