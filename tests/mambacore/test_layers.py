"""Layers start from the papers' values, copy and reload. What all causal layers promise is in test_laws.py."""

import copy

import pytest
import torch
from torch import nn

from mambacore.errors import InputError
from mambacore.layers import ContextEmbedding, ResidualStack, SelectiveMixer, build_mixer
from mambacore.layers import stack as stack_module
from mambacore.state import state_tensors
from tolerances import PIECES_FLOAT32, PIECES_FLOAT64, relative_error

WIDTH = 12


def build_stack():
    torch.manual_seed(0)
    return ResidualStack(WIDTH, [{"name": "selective", "state_size": 4}] * 3).double()


def sequence(length=130):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_stack_walks_in_pieces_without_gradients_and_gives_the_same(monkeypatch):
    layer, inputs = build_stack(), sequence()
    expected, expected_state = layer(inputs)
    monkeypatch.setattr(stack_module, "PIECE_POSITIONS_OF_CALLS", 64)
    lengths, walk = [], ResidualStack._walk

    def seen(stack, piece, *rest):
        lengths.append(piece.shape[1])
        return walk(stack, piece, *rest)

    monkeypatch.setattr(ResidualStack, "_walk", seen)
    with torch.inference_mode():
        found, state = layer(inputs)
    assert lengths == [64, 64, 2]
    assert relative_error(found, expected) < PIECES_FLOAT64
    for one, other in zip(state_tensors(state), state_tensors(expected_state), strict=True):
        assert relative_error(one, other) < PIECES_FLOAT64


def test_mixer_starts_with_the_papers_step_sizes_and_decay_rates():
    torch.manual_seed(0)
    mixer = SelectiveMixer(512, state_size=16)
    steps = nn.functional.softplus(mixer.step_bias)
    assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 1e-1 * 1.001
    median = steps.median().item()
    assert 0.008 < median < 0.0125  # log-uniform: the middle of 0.001 and 0.1 is 0.01
    assert torch.allclose(mixer.log_decay_rate.exp()[7], torch.arange(1.0, 17.0))
    assert mixer.step_rank == 32 and mixer.inner_width == 1024


@pytest.mark.parametrize("mixer", ["selective", "s4d", "rwkv"])
def test_a_stack_scales_its_output_projections_by_the_depth(mixer):
    torch.manual_seed(0)
    one = ResidualStack(16, [mixer]).blocks[0].mixer.output_projection.weight
    torch.manual_seed(0)
    four = ResidualStack(16, [mixer] * 4).blocks[0].mixer.output_projection.weight
    assert torch.allclose(four, one / 2)


def test_context_embedding_looks_up_the_last_symbols():
    torch.manual_seed(0)
    embedding = ContextEmbedding(4, (1, 3), 5)
    symbols = torch.tensor([[0, 1, 2, 3, 9, 1, 2, 3]])
    embedded, state = embedding(symbols)
    single, triple = embedding.tables
    assert torch.allclose(embedded[0, 3], single.weight[3] + triple.weight[1 * 16 + 2 * 4 + 3])
    assert torch.allclose(embedded[0, 0], single.weight[0])  # the triple reaches before the start
    assert torch.allclose(embedded[0, 4], torch.zeros(5))  # outside the alphabet
    assert torch.allclose(embedded[0, 6], single.weight[2])  # the triple holds one outside the alphabet
    assert torch.allclose(embedded[0, 7], embedded[0, 3])
    assert state.tolist() == [[2, 3]]


def test_layers_copy_and_reload_by_their_tensors():
    layer = build_stack()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(sequence())[0], layer(sequence())[0])


@pytest.mark.parametrize(
    "mixer", ["selective", {"name": "selective", "complex_state": True}, "s4d", "attention", "rwkv"]
)
def test_a_stack_compiles_into_one_graph(mixer):
    torch.manual_seed(0)
    stack, inputs = ResidualStack(16, [mixer]), torch.randn(1, 70, 16)
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    expected, _ = stack(inputs)
    found, _ = compiled(inputs)
    assert relative_error(found, expected) < PIECES_FLOAT32
    expected.sum().backward()
    wanted = [parameter.grad.clone() for parameter in stack.parameters()]
    stack.zero_grad()
    found.sum().backward()
    assert all(
        relative_error(parameter.grad, grad) < PIECES_FLOAT32
        for parameter, grad in zip(stack.parameters(), wanted, strict=True)
    )


def test_a_mixer_that_cannot_exchange_states_refuses_a_sequence_over_ranks(monkeypatch):
    mixer = build_mixer(16, "gru")
    monkeypatch.setattr("mambacore.layers.mixer.active_ranks", object)
    with pytest.raises(InputError, match="the mixer 'gru' cannot process a sequence that is split over ranks; build"):
        mixer(torch.zeros(1, 3, 16))
