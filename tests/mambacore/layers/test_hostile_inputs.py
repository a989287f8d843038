"""Every module of the core against one table of hostile inputs: each is computed rightly or refused clearly.

The table of the operators is `test_contract.py`; this one is of what is built of them. A row is a function of a module;
add one to `ROWS`, or a module to `MODULES`, and it is tried with all of the others.
"""

import copy

import pytest
import torch
from torch import nn

from mambacore.layers import (
    BidirectionalStack,
    ContextEmbedding,
    EquivariantStack,
    GatedFeedForward,
    LastPooling,
    Mamba2Mixer,
    Mamba3Mixer,
    MeanPooling,
    ResidualBlock,
    ResidualStack,
    SelectiveMixer,
    build_mixer,
)
from mambacore.models import CausalLanguageModel, CausalLanguageModelConfig
from mambacore.state import map_state, state_tensors
from tolerances import BFLOAT16_LAYERS, COMPLEX_FLOAT32, FLOAT16_LAYERS, relative_error

WIDTH, BATCH, LENGTH = 16, 3, 7
MIXERS = ("selective", "s4d", "mamba2", "mamba3", "attention", "linear_attention", "retention", "rwkv", "gru")

MODULES = {name: lambda name=name: build_mixer(WIDTH, name) for name in MIXERS} | {
    "block": lambda: ResidualBlock(WIDTH, SelectiveMixer(WIDTH)),
    "complex block": lambda: ResidualBlock(WIDTH, SelectiveMixer(WIDTH, complex_state=True)),
    "Mamba-2 block": lambda: ResidualBlock(WIDTH, Mamba2Mixer(WIDTH, state_size=6, head_width=4, groups=2)),
    "Mamba-3 block": lambda: ResidualBlock(WIDTH, Mamba3Mixer(WIDTH, state_size=6, head_width=4, rank=2)),
    "stack": lambda: ResidualStack(WIDTH, ["selective", "s4d"], feed_forward_width=8),
    "feed-forward": lambda: GatedFeedForward(WIDTH, 8),
    "bidirectional": lambda: BidirectionalStack(WIDTH, 1),
    "equivariant": lambda: EquivariantStack(WIDTH // 2, 1),
    "mean": MeanPooling,
    "last": LastPooling,
}
CAUSAL = (*MIXERS, "block", "complex block", "Mamba-2 block", "Mamba-3 block", "stack")
POOLINGS = ("mean", "last")


def build(name):
    torch.manual_seed(0)
    return MODULES[name]().eval()


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs_of(module, *arguments):
    """The outputs without the state."""
    found = module(*arguments)
    return found[0] if isinstance(found, tuple) else found


def assert_equal(found, expected, tolerance=COMPLEX_FLOAT32):
    assert found.dtype == expected.dtype
    assert relative_error(found, expected) < tolerance


def both_ways(check):
    """With gradients, operator by operator, and without, where single positions may take a fast path."""

    def row(name):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                for length in (1, LENGTH):
                    check(name, length)

    return row


def batch_zero(name, length):
    outputs = outputs_of(build(name), normal(0, length, WIDTH))
    assert outputs.shape == ((0, WIDTH) if name in POOLINGS else (0, length, WIDTH))


def length_zero(name, length):
    module = build(name)
    found = module(normal(BATCH, 0, WIDTH))
    outputs = found[0] if isinstance(found, tuple) else found
    assert outputs.shape == ((BATCH, WIDTH) if name in POOLINGS else (BATCH, 0, WIDTH))
    if name in CAUSAL:  # and goes on as if nothing had been there
        assert_equal(module(normal(BATCH, length, WIDTH), found[1])[0], module(normal(BATCH, length, WIDTH))[0])


def wrong_width(name, length):
    if name in POOLINGS:
        pytest.skip("has no width")
    module = build(name)
    for wrong in (WIDTH - 8, WIDTH + 1):
        with pytest.raises((ValueError, RuntimeError), match=r"must|shape|width|channels|size"):
            module(normal(BATCH, length, wrong))


def wrong_state(name, length):
    """A state of another batch, or of a larger model: never numbers."""
    if name not in CAUSAL:
        pytest.skip("has no state")
    module = build(name)
    _, state = module(normal(1, 3, WIDTH))
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        module(normal(BATCH + 1, length, WIDTH), state)
    _, state = module(normal(BATCH, 3, WIDTH))
    small = map_state(lambda tensor: tensor[..., : tensor.shape[-1] // 2], state)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        module(normal(BATCH, length, WIDTH), small)


def other_device(name, length):
    if not list(MODULES[name]().parameters()):
        pytest.skip("has no parameters")
    if name in ("attention", "linear_attention", "feed-forward"):
        pytest.skip("PyTorch's own linear layer computes with a weight that has no memory")
    module = build(name).to("meta")
    with pytest.raises((ValueError, RuntimeError)):
        outputs_of(module, normal(BATCH, length, WIDTH)).sum().item()


class Tagged(torch.Tensor):
    """A subclass of tensor as users write them."""


def tensor_subclass(name, length):
    module, sequence = build(name), normal(BATCH, length, WIDTH)
    expected = outputs_of(module, sequence)
    assert_equal(outputs_of(module, sequence.as_subclass(Tagged)).as_subclass(torch.Tensor), expected)
    for part in module.modules():
        for own, parameter in list(part.named_parameters(recurse=False)):
            part.register_parameter(own, nn.Parameter(parameter.detach().as_subclass(Tagged)))
    assert_equal(outputs_of(module, sequence).as_subclass(torch.Tensor), expected)


def linear_layers(module):
    return [
        (part, own) for part in module.modules() for own, inner in part.named_children() if type(inner) is nn.Linear
    ]


class Wrapper(nn.Module):
    """An adapter around a linear layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return self.layer(inputs) * 1.5


def wrapped(name, length):
    """An adapter equals the layer with its weights changed, wherever it sits."""
    module, sequence = build(name), normal(BATCH, length, WIDTH)
    expected = copy.deepcopy(module)
    outer = linear_layers(module)
    if not outer:
        pytest.skip("has no linear layers")
    for part, own in outer:
        setattr(part, own, Wrapper(getattr(part, own)))
    with torch.no_grad():
        for layer in {getattr(part, own) for part, own in linear_layers(expected)}:
            layer.weight.mul_(1.5)
            if layer.bias is not None:
                layer.bias.mul_(1.5)
    assert_equal(outputs_of(module, sequence), outputs_of(expected, sequence))


def hooked(name, length):
    module, sequence = build(name), normal(BATCH, length, WIDTH)
    outer = {getattr(part, own) for part, own in linear_layers(module)}
    if not outer:
        pytest.skip("has no linear layers")
    called = set()
    for layer in outer:
        layer.register_forward_hook(lambda which, *_: called.add(which))
    outputs_of(module, sequence)
    assert called == outer


def non_contiguous(name, length):
    module, sequence = build(name), normal(BATCH, length, WIDTH)
    expected = outputs_of(module, sequence)
    for spread in (
        sequence.mT.contiguous().mT,
        torch.stack([sequence, sequence], dim=-1)[..., 0],
        sequence.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert_equal(outputs_of(module, spread), expected)
    if name in CAUSAL:
        _, state = module(sequence)
        spread = map_state(lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0], state)
        assert_equal(module(sequence, spread)[0], module(sequence, state)[0])


def in_dtype(dtype, tolerance):
    def check(name, length):
        module, sequence = build(name), normal(BATCH, length, WIDTH).to(dtype)
        expected = outputs_of(module, sequence.float())
        found = outputs_of(module.to(dtype), sequence)
        assert found.dtype == dtype
        assert relative_error(found, expected) < tolerance

    return check


def infinities(name, length):
    """An infinite input does not reach other rows of the batch, nor the positions before it.

    Attention multiplies what is masked by zero, so what is infinite makes NaN of other positions; never wrong numbers.
    """
    module, sequence = build(name), normal(BATCH, length, WIDTH)
    expected = outputs_of(module, sequence)
    for value in (float("inf"), float("-inf"), float("nan")):
        hostile = sequence.clone()
        hostile[1, length - 1, 3] = value
        found = outputs_of(module, hostile)
        assert_equal(found[[0, 2]], expected[[0, 2]])
        if name in CAUSAL:
            before, wanted = found[1, : length - 1], expected[1, : length - 1]
            if name in ("attention", "linear_attention", "retention"):
                before = torch.where(before.isnan(), wanted, before)
            assert_equal(before, wanted)


def traced(name, length):
    module, sequence = build(name), normal(BATCH, length, WIDTH)
    graph = torch.jit.trace(lambda numbers: outputs_of(module.requires_grad_(False), numbers), (sequence,),
                            check_trace=False)  # fmt: skip
    assert_equal(graph(2 * sequence), outputs_of(module, 2 * sequence))


def vmapped(name, length):
    if name in ("gru", "attention"):
        pytest.skip("torch's own operators of this mixer are not for vmap")
    module, sequences = build(name), normal(2, BATCH, length, WIDTH)
    found = torch.vmap(lambda sequence: outputs_of(module, sequence))(sequences)
    for one, sequence in zip(found, sequences, strict=True):
        assert_equal(one, outputs_of(module, sequence))


ROWS = {
    "batch 0": both_ways(batch_zero),
    "length 0": both_ways(length_zero),
    "wrong width": both_ways(wrong_width),
    "wrong state": both_ways(wrong_state),
    "other device": both_ways(other_device),
    "tensor subclass": both_ways(tensor_subclass),
    "wrapped module": both_ways(wrapped),
    "hooked module": both_ways(hooked),
    "traced": both_ways(traced),
    "vmapped": both_ways(vmapped),
    "non-contiguous": both_ways(non_contiguous),
    "float16": both_ways(in_dtype(torch.float16, FLOAT16_LAYERS)),
    "bfloat16": both_ways(in_dtype(torch.bfloat16, BFLOAT16_LAYERS)),
    "infinities": both_ways(infinities),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_hostile_inputs_are_computed_rightly_or_refused_clearly(row, name):
    row(name)


def test_a_state_of_another_kind_of_stack_is_refused():
    stack = ResidualStack(WIDTH, ["selective"] * 2)
    _, state = ResidualStack(WIDTH, ["s4d"] * 2)(normal(BATCH, 3, WIDTH))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises((AttributeError, ValueError)):
            stack(normal(BATCH, 1, WIDTH), state)


@pytest.mark.parametrize("tokens", [torch.tensor([[13]]), torch.tensor([[-1]]), torch.tensor([[10**10]])])
def test_unknown_tokens_are_refused(tokens):
    model = CausalLanguageModel(CausalLanguageModelConfig(13, WIDTH, ("selective",)))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(IndexError):
            model(tokens)
    with pytest.raises(ValueError, match="the model has those from 0 to 12"):
        model.generate(tokens, 20)


def test_symbols_outside_the_alphabet_add_nothing():
    embedding = ContextEmbedding(4, (1, 2), WIDTH)
    found, state = embedding(torch.tensor([[4, -1, 10**10, 7]]))
    assert (found == 0).all() and state.shape == (1, 1)
    assert embedding(torch.zeros(0, 5, dtype=torch.long))[0].shape == (0, 5, WIDTH)


@pytest.mark.parametrize("name", CAUSAL)
def test_states_are_new_tensors(name):
    """A step hands on a new state: the one that came in is as it was."""
    module = build(name)
    with torch.no_grad():
        _, state = module(normal(BATCH, 3, WIDTH))
        before = [tensor.clone() for tensor in state_tensors(state)]
        module(normal(BATCH, 1, WIDTH), state)
    assert all(torch.equal(one, other) for one, other in zip(state_tensors(state), before, strict=True))
