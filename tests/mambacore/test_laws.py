"""The laws of every causal module: any pieces equal the whole, nothing sees the future, records do not see each other.

Every registered mixer is here, with one entry per way in which it computes, and what is built of mixers.
"""

import itertools
import random

import pytest
import torch
from torch import nn

from mambacore.convolution import causal_convolution
from mambacore.layers import (
    MIXERS,
    ContextEmbedding,
    LastPooling,
    MeanPooling,
    ResidualBlock,
    ResidualStack,
    attention,
    build_mixer,
    linear_attention,
    s4d,
)
from mambacore.packing import starts_from_lengths
from mambacore.ssd import chunked
from mambacore.state import map_state, state_tensors
from tolerances import FOURIER_CAUSALITY, PIECES_FLOAT32, PIECES_FLOAT64, relative_error

WIDTH, LENGTH = 8, 75
HYBRID = [
    {"name": "selective", "state_size": 3},
    {"name": "selective", "state_size": 2, "complex_state": True},
    {"name": "s4d", "state_size": 3, "convolution": True},
    "attention",
    "linear_attention",
    "retention",
    "rwkv",
    "gru",
]


class Convolution(nn.Module):
    """The causal convolution as a module."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 4)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, sequence, state=None, sequence_starts=None):
        return causal_convolution(
            sequence, self.weight, self.bias, silu=True, initial_state=state, return_final_state=True,
            sequence_starts=sequence_starts,
        )  # fmt: skip


MODULES = {name: name for name in MIXERS} | {
    "selective": {"name": "selective", "state_size": 4},
    "selective complex": {"name": "selective", "state_size": 3, "complex_state": True},
    "selective in the step": {"name": "selective", "state_size": 3, "selective": ["step"]},
    "selective in both matrices": {"name": "selective", "state_size": 3, "selective": ["input", "output"]},
    "mamba2": {"name": "mamba2", "state_size": 4, "head_width": 4, "groups": 2},
    "mamba3": {"name": "mamba3", "state_size": 4, "head_width": 4, "groups": 2},
    "mamba3 of rank 2": {"name": "mamba3", "state_size": 4, "rank": 2, "output_norm": True},
    "mamba3 by Euler's rule": {"name": "mamba3", "state_size": 4, "trapezoidal": False},
    "s4d": {"name": "s4d", "state_size": 5, "convolution": False},
    "s4d real": {"name": "s4d", "state_size": 5, "convolution": False, "complex_state": False},
    "s4d convolution": {"name": "s4d", "state_size": 5, "convolution": True},
    "s4d real convolution": {"name": "s4d", "state_size": 5, "convolution": True, "complex_state": False},
    "attention": {"name": "attention", "heads": 2},
    "linear_attention": {"name": "linear_attention", "heads": 4},
    "retention": {"name": "retention", "heads": 2},
    "block": lambda: ResidualBlock(WIDTH, build_mixer(WIDTH, {"name": "selective", "state_size": 3})),
    "hybrid stack": lambda: ResidualStack(WIDTH, HYBRID),
    "stack with feed-forward": lambda: ResidualStack(
        WIDTH, ["selective", {"name": "s4d", "convolution": False}], feed_forward_width=12, dropout=0.5
    ).eval(),
    "stack with checkpoints": lambda: ResidualStack(WIDTH, ["selective", "rwkv"], activation_checkpointing=True),
    "convolution": Convolution,
}
# Those that go through Fourier transforms, where every value is rounded relative to the largest one.
FOURIER = ("s4d convolution", "s4d real convolution", "hybrid stack")
# Those whose weights are relative to the largest of the piece, and so rounded by it.
RELATIVE_TO_THE_LARGEST = ("rwkv", "stack with checkpoints")


def random_split(length, seed):
    """Pieces of random lengths, with empty ones and ones of a single position among them."""
    generator = random.Random(seed)
    lengths = [0, 1]
    while sum(lengths) < length:
        lengths.append(min(generator.choice([0, 1, 2, 15, 16, 17, 33, 40]), length - sum(lengths)))
    return [*lengths, 0]


SPLITS = {
    "steps": [1] * LENGTH,
    "halves": [LENGTH // 2, LENGTH - LENGTH // 2],
    **{f"random {seed}": random_split(LENGTH, seed) for seed in range(3)},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_constants(monkeypatch):
    """Chunks, blocks and pieces so small that a short test has several of each."""
    monkeypatch.setattr(linear_attention, "CHUNK", 16)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 32)
    monkeypatch.setattr(chunked, "CHUNK_ROWS", 16)
    monkeypatch.setattr(s4d, "CONVOLUTION_FROM", 12)
    monkeypatch.setattr(s4d, "CONVOLUTION_PIECE", 48)
    monkeypatch.setattr(s4d, "POWER_BLOCK", 8)


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    module = MODULES[name]
    return (module() if callable(module) else build_mixer(WIDTH, module)).to(dtype)


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def packed_starts():
    """Two rows of records; the first one of the second row goes on from what came before."""
    starts = starts_from_lengths([[5, 1, 30, 9], [20, 3, 3, LENGTH - 26]], LENGTH)
    starts[1, 0] = False
    return starts


def numbers_of(state):
    return [tensor for tensor in state_tensors(state) if tensor.is_floating_point() or tensor.is_complex()]


def wanting_gradients(state):
    return map_state(
        lambda tensor: (
            tensor.detach().clone().requires_grad_() if tensor.is_floating_point() or tensor.is_complex() else tensor
        ),
        state,
    )


def run_in_pieces(module, inputs, state, starts, lengths):
    outputs = []
    starts_of_pieces = itertools.repeat(None) if starts is None else starts.split(lengths, dim=1)
    for piece, starts_here in zip(inputs.split(lengths, dim=1), starts_of_pieces, strict=False):
        output, state = module(piece, state, starts_here)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def with_all_gradients(module, inputs, state, starts, lengths):
    """Outputs and final state, and the gradients of a loss on both: of inputs, parameters and incoming state."""
    inputs, state = inputs.clone().requires_grad_(), wanting_gradients(state)
    outputs, final = run_in_pieces(module, inputs, state, starts, lengths)
    loss = (outputs * normal(*outputs.shape, seed=3)).sum()
    loss = loss + sum(number.abs().square().sum() for number in numbers_of(final))
    named = {"inputs": inputs, **dict(module.named_parameters())}
    named |= {f"incoming state {number}": tensor for number, tensor in enumerate(numbers_of(state))}
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    found = {"outputs": outputs} | {f"final state {number}": tensor for number, tensor in enumerate(numbers_of(final))}
    return found | {f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True)}


def assert_equal(found, expected, tolerance):
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert found.keys() == expected.keys() and not wrong, wrong


@pytest.mark.parametrize("packed", [False, True], ids=["one record", "many records"])
@pytest.mark.parametrize("lengths", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("name", MODULES)
def test_pieces_equal_the_whole_with_all_gradients(name, lengths, packed):
    module, inputs = build(name), normal(2, LENGTH, WIDTH)
    starts = packed_starts() if packed else None
    with torch.no_grad():
        _, incoming = module(normal(2, 20, WIDTH, seed=2))
    whole = with_all_gradients(module, inputs, incoming, starts, [LENGTH])
    pieces = with_all_gradients(module, inputs, incoming, starts, lengths)
    assert whole["gradient of inputs"].abs().min() > 0
    assert_equal(pieces, whole, PIECES_FLOAT64)


@pytest.mark.parametrize("name", MODULES)
def test_an_absent_state_is_the_state_of_an_empty_piece(name):
    module, inputs = build(name), normal(2, 20, WIDTH)
    nothing, state = module(inputs[:, :0])
    assert nothing.shape == (2, 0, WIDTH)
    for starts in (None, torch.zeros(2, 20, dtype=torch.bool)):
        assert relative_error(module(inputs, state, starts)[0], module(inputs, None, starts)[0]) < PIECES_FLOAT64


@pytest.mark.parametrize("name", MODULES)
def test_float32_pieces_equal_the_whole(name):
    module, inputs = build(name, torch.float32), normal(2, LENGTH, WIDTH, dtype=torch.float32)
    for starts in (None, packed_starts()):
        with torch.no_grad():
            whole, whole_state = module(inputs, None, starts)
            for lengths in SPLITS.values():
                pieces, state = run_in_pieces(module, inputs, None, starts, lengths)
                assert pieces.dtype == torch.float32
                assert relative_error(pieces, whole) < PIECES_FLOAT32
                for one, other in zip(numbers_of(state), numbers_of(whole_state), strict=True):
                    assert relative_error(one, other) < PIECES_FLOAT32


@pytest.mark.parametrize("name", MODULES)
def test_no_gradient_reaches_an_output_from_a_later_input(name):
    inputs = normal(2, LENGTH, WIDTH).requires_grad_()
    outputs, _ = build(name)(inputs)
    outputs[:, 41].sum().backward()
    future, present = inputs.grad[:, 42:].abs().max(), inputs.grad[:, 41].abs().max()
    assert future <= (FOURIER_CAUSALITY * present if name in FOURIER else 0)
    assert present > 0 and inputs.grad[:, 38].abs().max() > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("packed", [False, True], ids=["one record", "many records"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_what_is_not_finite_reaches_no_earlier_position_and_no_other_record(name, dtype, packed, value):
    module, inputs, position = build(name, dtype), normal(2, LENGTH, WIDTH, dtype=dtype), 17
    starts = packed_starts() if packed else None
    with torch.no_grad():
        expected, _ = module(inputs, None, starts)
        inputs[0, position, 3] = value
        outputs, _ = module(inputs, None, starts)
    assert expected.isfinite().all()
    untouched = torch.ones(2, LENGTH, dtype=torch.bool)
    untouched[0, position : 36 if packed else LENGTH] = False
    if name in (*FOURIER, *RELATIVE_TO_THE_LARGEST):
        assert relative_error(outputs[untouched], expected[untouched]) < PIECES_FLOAT32
    else:
        assert torch.equal(outputs[untouched], expected[untouched])
    assert not torch.equal(outputs[0, position], expected[0, position])
    assert name == "gru" or not outputs[0, position].isfinite().all()  # whose gates an infinity only saturates


@pytest.mark.parametrize("name", MODULES)
def test_packed_records_equal_the_records_alone_with_all_gradients(name):
    module, inputs = build(name), normal(2, LENGTH, WIDTH).requires_grad_()
    lengths = [[5, 1, 30, 9], [20, 3, 3, LENGTH - 26]]
    parameters, seeds = list(module.parameters()), normal(2, LENGTH, WIDTH, seed=3)
    spans = []
    for row, lengths_here in enumerate(lengths):
        ends = list(itertools.accumulate(lengths_here))
        spans += [(row, end - length, end) for length, end in zip(lengths_here, ends, strict=True)]

    def loss_gradients(outputs):
        return torch.autograd.grad(sum((outputs[span] * seeds[span[0], span[1] : span[2]]).sum() for span in spans),
                                   [inputs, *parameters])  # fmt: skip

    together, _ = module(inputs, None, starts_from_lengths(lengths, LENGTH))
    packed = {(row, begin, end): together[row, begin:end] for row, begin, end in spans}
    alone = {(row, begin, end): module(inputs[row : row + 1, begin:end])[0][0] for row, begin, end in spans}
    for span in spans:
        assert relative_error(packed[span], alone[span]) < PIECES_FLOAT64, span
    names = ["inputs", *dict(module.named_parameters())]
    found, expected = loss_gradients(packed), loss_gradients(alone)
    assert_equal(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)), PIECES_FLOAT64)
    assert found[0][0, 45:].abs().max() == 0  # padding


@pytest.mark.parametrize("name", MODULES)
def test_no_gradient_reaches_a_record_from_its_neighbours_or_from_before(name):
    module = build(name)
    with torch.no_grad():
        _, incoming = module(normal(2, 20, WIDTH, seed=2))
    incoming = wanting_gradients(incoming)
    inputs = normal(2, LENGTH, WIDTH).requires_grad_()
    outputs, _ = module(inputs, incoming, packed_starts())
    grads = torch.autograd.grad(
        outputs[0, 6:36].sum(), [inputs, *numbers_of(incoming)], materialize_grads=True, retain_graph=True
    )
    assert grads[0][0, 6:36].abs().min() > 0
    assert grads[0][0, :6].abs().max() == grads[0][0, 36:].abs().max() == grads[0][1].abs().max() == 0
    assert all(grad.abs().max() == 0 for grad in grads[1:])
    going_on = torch.autograd.grad(outputs[1, :20].sum(), numbers_of(incoming), materialize_grads=True)
    assert any(grad[1].abs().max() > 0 for grad in going_on)
    assert all(grad[0].abs().max() == 0 for grad in going_on)


@pytest.mark.parametrize("pooling", [MeanPooling(), LastPooling()])
@pytest.mark.parametrize("lengths", SPLITS.values(), ids=SPLITS.keys())
def test_pooling_in_pieces_equals_the_whole_with_gradients(pooling, lengths):
    grads, results = [], []
    for pieces in ([LENGTH], lengths):
        inputs, state = normal(2, LENGTH, WIDTH).requires_grad_(), None
        for piece in inputs.split(pieces, dim=1):
            pooled, state = pooling(piece, state)
        results.append(pooled)
        grads.append(torch.autograd.grad((pooled * normal(2, WIDTH, seed=3)).sum(), inputs)[0])
    expected = normal(2, LENGTH, WIDTH)
    expected = expected.mean(1) if isinstance(pooling, MeanPooling) else expected[:, -1]
    assert relative_error(results[0], expected) < PIECES_FLOAT64
    assert relative_error(results[1], results[0]) < PIECES_FLOAT64
    assert relative_error(grads[1], grads[0]) < PIECES_FLOAT64


@pytest.mark.parametrize("lengths", SPLITS.values(), ids=SPLITS.keys())
def test_context_embedding_in_pieces_equals_the_whole_with_gradients(lengths):
    torch.manual_seed(0)
    embedding = ContextEmbedding(4, (1, 3, 4), WIDTH).double()
    symbols = torch.randint(0, 6, (2, LENGTH))
    results = []
    for pieces in ([LENGTH], lengths):
        state, outputs = None, []
        for piece in symbols.split(pieces, dim=1):
            output, state = embedding(piece, state)
            outputs.append(output)
        outputs = torch.cat(outputs, dim=1)
        grads = torch.autograd.grad((outputs * normal(*outputs.shape, seed=3)).sum(), list(embedding.parameters()))
        results.append([outputs, state.double(), *grads])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < PIECES_FLOAT64


def test_context_embedding_does_not_see_later_symbols():
    torch.manual_seed(0)
    embedding = ContextEmbedding(4, (1, 3), WIDTH)
    symbols = torch.randint(0, 4, (1, 30))
    other = symbols.clone()
    other[:, 20:] = 3 - symbols[:, 20:]
    assert torch.equal(embedding(symbols)[0][:, :20], embedding(other)[0][:, :20])
    assert not torch.equal(embedding(symbols)[0], embedding(other)[0])
