"""Training starts from an earlier model, which may be shallower: what is added begins as the identity."""

import dataclasses

import pytest
import torch

from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig
from mambacore.errors import InputError
from mambapipelines.waveforms.train import start_from

SELECTIVE = {"name": "selective", "state_size": 2}


def model_of(layers, mixer=SELECTIVE, feed_forward_expansion=0):
    stages = tuple(StageConfig(count, mixer, feed_forward_expansion) for count in layers)
    torch.manual_seed(len(layers) + sum(layers))
    return WaveformModel(WaveformModelConfig(stages, 4, (2,))).double()


@pytest.mark.parametrize(
    ("mixer", "feed_forward_expansion"),
    [(SELECTIVE, 0), ("s4d", 2), ("gru", 0), ("attention", 2), ("mamba2", 0), ("mamba3", 0), ("retention", 0)],
)
def test_a_deeper_model_computes_at_first_what_the_earlier_one_did(mixer, feed_forward_expansion):
    if mixer == "attention":
        mixer = {"name": "attention", "heads": 1}
    earlier, deeper = (model_of(layers, mixer, feed_forward_expansion) for layers in ((2, 1), (2, 3)))
    tokens = torch.randint(256, (2, 12))
    before, _ = earlier(tokens)
    assert not torch.allclose(deeper(tokens)[0], before)
    start_from(deeper, earlier, "earlier")
    logits, _ = deeper(tokens)
    torch.testing.assert_close(logits, before, rtol=1e-12, atol=1e-12)
    logits.square().sum().backward()
    added = [weight for name, weight in deeper.named_parameters() if name not in dict(earlier.named_parameters())]
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in added)  # they can be trained


def test_other_layers_are_refused():
    earlier = model_of((1, 2))
    for other in (model_of((1, 1)), model_of((2, 2)), model_of((1, 2), "s4d"), model_of((1, 2), SELECTIVE, 2)):
        with pytest.raises(InputError, match=r"stage [01] of earlier has other layers"):
            start_from(other, earlier, "earlier")
    wider = WaveformModel(dataclasses.replace(earlier.config, model_width=6))
    with pytest.raises(InputError, match="another model_width"):
        start_from(wider, earlier, "earlier")
