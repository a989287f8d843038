"""Every causal layer keeps the law: pieces equal the whole, forward and backward, and nothing sees the future."""

import copy

import pytest
import torch
from torch import nn

from mambacore.layers import ContextEmbedding, LastPooling, MeanPooling, ResidualBlock, ResidualStack, SelectiveMixer
from mambacore.layers import stack as stack_module
from tolerances import PIECES_FLOAT32, PIECES_FLOAT64, relative_error

WIDTH = 12
LAYERS = {
    "mixer": lambda: SelectiveMixer(WIDTH, state_size=4),
    "block": lambda: ResidualBlock(WIDTH, SelectiveMixer(WIDTH, state_size=3, kernel_width=2)),
    "stack": lambda: ResidualStack(WIDTH, [{"name": "selective", "state_size": 4}] * 3),
}
SPLITS = {"halves": [65, 65], "steps": [1] * 130, "ragged": [1, 63, 64, 2]}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    return LAYERS[name]().to(dtype)


def sequence(dtype=torch.float64, length=130):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def run_in_pieces(layer, inputs, lengths):
    state, outputs = None, []
    for piece in inputs.split(lengths, dim=1):
        output, state = layer(piece, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def flatten(state):
    return [tensor for part in state for tensor in flatten(part)] if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("lengths", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("name", LAYERS)
def test_pieces_equal_the_whole_with_all_gradients(name, lengths):
    layer = build(name)
    results = []
    for run in (layer, lambda inputs: run_in_pieces(layer, inputs, lengths)):
        inputs = sequence().requires_grad_()
        outputs, state = run(inputs)
        total = (outputs * outputs.detach().cos()).sum() + sum(part.square().sum() for part in flatten(state))
        grads = torch.autograd.grad(total, [inputs, *layer.parameters()])
        results.append([outputs, *flatten(state), *grads])
    errors = [relative_error(pieces, whole) for whole, pieces in zip(*results, strict=True)]
    assert max(errors) < PIECES_FLOAT64, errors


@pytest.mark.parametrize("name", LAYERS)
def test_float32_pieces_equal_the_whole(name):
    layer = build(name, torch.float32)
    with torch.no_grad():
        whole, _ = layer(sequence(torch.float32))
        pieces, _ = run_in_pieces(layer, sequence(torch.float32), [1, 63, 64, 2])
    assert relative_error(pieces, whole) < PIECES_FLOAT32


@pytest.mark.parametrize("name", LAYERS)
def test_no_gradient_reaches_an_output_from_a_later_input(name):
    inputs = sequence().requires_grad_()
    outputs, _ = build(name)(inputs)
    outputs[:, 70].sum().backward()
    assert inputs.grad[:, 71:].abs().max() == 0
    assert inputs.grad[:, 70].abs().max() > 0 and inputs.grad[:, 0].abs().max() > 0


def test_a_stack_walks_in_pieces_without_gradients_and_gives_the_same(monkeypatch):
    layer, inputs = build("stack"), sequence()
    expected, expected_state = layer(inputs)
    monkeypatch.setattr(stack_module, "PIECE_POSITIONS", 64)
    with torch.inference_mode():
        found, state = layer(inputs)
    assert relative_error(found, expected) < PIECES_FLOAT64
    for one, other in zip(flatten(state), flatten(expected_state), strict=True):
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


def test_a_stack_scales_its_output_projections_by_the_depth():
    torch.manual_seed(0)
    one = ResidualStack(16, ["selective"]).blocks[0].mixer.output_projection.weight.abs().max()
    torch.manual_seed(0)
    four = ResidualStack(16, ["selective"] * 4).blocks[0].mixer.output_projection.weight.abs().max()
    assert torch.isclose(four, one / 2)


@pytest.mark.parametrize(
    ("pooling", "expected"), [(MeanPooling(), lambda s: s.mean(1)), (LastPooling(), lambda s: s[:, -1])]
)
def test_pooling_in_pieces_equals_the_whole(pooling, expected):
    inputs = sequence()
    pooled, _ = pooling(inputs)
    assert relative_error(pooled, expected(inputs)) < PIECES_FLOAT64
    state = None
    for piece in inputs.split([1, 100, 29], dim=1):
        in_pieces, state = pooling(piece, state)
    assert relative_error(in_pieces, pooled) < PIECES_FLOAT64
    unchanged, _ = pooling(inputs[:, :0], state)
    assert torch.equal(unchanged, in_pieces)


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
    one_by_one, handed = [], None
    for piece in symbols.split(1, dim=1):
        here, handed = embedding(piece, handed)
        one_by_one.append(here)
    assert torch.equal(torch.cat(one_by_one, dim=1), embedded)


def test_layers_copy_and_reload_by_their_tensors():
    layer = build("stack")
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(sequence())[0], layer(sequence())[0])
