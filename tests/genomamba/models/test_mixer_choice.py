"""A configuration chooses what the classifier's layers mix with, by a word."""

import pytest
import torch

from genomamba.models.species_classifier import SpeciesClassifier, SpeciesClassifierConfig
from mambacore.errors import InputError
from mambacore.layers import MIXERS


def config(**options) -> SpeciesClassifierConfig:
    return SpeciesClassifierConfig(class_names=("alba", "nigra"), model_width=16, layers=2, state_size=4, **options)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_classifier_learns_with_every_mixer(mixer):
    torch.manual_seed(0)
    model = SpeciesClassifier(SpeciesClassifierConfig.from_dict(config(mixer=mixer).to_dict()))
    assert {type(block.mixer) for block in model.stack.blocks} == {MIXERS[mixer]}
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=0.01)
    tokens = torch.randint(7, 9, (4, 64))  # A and C only: every mixer can learn that G and T never come
    labels = torch.tensor([0, 1, 0, 1])
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2, losses
    assert all(parameter.grad is not None for parameter in model.stack.parameters())


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_record_in_pieces_gets_the_evidence_of_the_whole(mixer):
    torch.manual_seed(0)
    model = SpeciesClassifier(config(mixer=mixer)).eval()
    torch.nn.init.normal_(model.deviation.weight)
    tokens = torch.randint(7, 11, (1, 300))
    with torch.inference_mode():
        whole, _ = model(tokens)
        state = None
        for piece in tokens.split([1, 130, 169], dim=1):
            in_pieces, state = model(piece, state)
    assert torch.allclose(whole, in_pieces, rtol=1e-4, atol=1e-7)


def test_a_hybrid_is_a_list_and_options_go_with_the_name():
    model = SpeciesClassifier(config(mixer=["attention", {"name": "s4d", "state_size": 6}]))
    first, second = (block.mixer for block in model.stack.blocks)
    assert (first.name, second.name, second.state_size) == ("attention", "s4d", 6)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ("mamba", "there is no mixer 'mamba'; choose attention"),
        (["selective"], "mixer lists 1 mixers but layers is 2"),
        ({"name": "gru", "states": 3}, "the mixer 'gru' has no option 'states'"),
        ([3, "gru"], "3 is not a mixer"),
    ],
)
def test_mistakes_are_named(mixer, message):
    with pytest.raises(InputError, match=message):
        config(mixer=mixer)
