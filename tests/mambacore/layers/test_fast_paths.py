"""Whatever is hung on any module of a model, its fast paths give what calling the modules gives.

One table of models, each with the ways to compute it, against one table of changes (`module_changes`), which are made
to every module of each model in turn: a new module, model or change is tried with all others.
"""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from mambacore import causal_convolution, selective_scan, ssd_scan
from mambacore.layers import (
    BidirectionalStack,
    EquivariantStack,
    Mamba2Mixer,
    Mamba3Mixer,
    ResidualBlock,
    ResidualStack,
    SelectiveMixer,
    build_mixer,
)
from mambacore.layers import stack as stack_module
from mambacore.layers.gated_norm import gated_norm, norm_after_gate
from mambacore.layers.norm import root_mean_square_norm
from mambacore.layers.plain_modules import is_plain
from mambacore.models import CausalLanguageModel, CausalLanguageModelConfig, generation, language_steps
from mambacore.native_library import native_library
from module_changes import CHANGES, places
from tolerances import COMPLEX_FLOAT32, relative_error

WIDTH, BATCH, LENGTH = 16, 2, 3
MAMBA2_IN_GROUPS = {"name": "mamba2", "state_size": 6, "head_width": 8, "groups": 2}

MIXERS = {
    "selective": lambda: SelectiveMixer(WIDTH, linear_bias=True),
    "mamba2": lambda: Mamba2Mixer(WIDTH, state_size=6, head_width=4),
    "mamba2 in groups": lambda: Mamba2Mixer(WIDTH, state_size=6, head_width=4, groups=2),
    "mamba3 of rank 2": lambda: Mamba3Mixer(WIDTH, state_size=6, head_width=4, rank=2, groups=2, output_norm=True),
} | {name: lambda name=name: build_mixer(WIDTH, name) for name in ("s4d", "retention")}


def block_of(mixer):
    return ResidualBlock(WIDTH, MIXERS[mixer](), dropout=0.5)


def language_model(mixers):
    config = CausalLanguageModelConfig(7, WIDTH, mixers, tied_head=False)
    return CausalLanguageModel(config)


MODELS = {f"block of {name}": (lambda name=name: block_of(name)) for name in MIXERS} | {
    "stack": lambda: ResidualStack(WIDTH, ["selective", "mamba2"], feed_forward_width=8),
    "bidirectional": lambda: BidirectionalStack(WIDTH, 1),
    "bidirectional mamba2": lambda: BidirectionalStack(
        WIDTH, 1, {"name": "mamba2", "state_size": 6, "head_width": 8, "groups": 2}
    ),
    "equivariant": lambda: EquivariantStack(WIDTH // 2, 1),
    "language model": lambda: language_model(("selective", "s4d")),
    "language model of duals": lambda: language_model((MAMBA2_IN_GROUPS, "mamba3")),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():  # norms, biases and weights of ranks start as constants, projections small
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def outputs_of(found):
    return found[0] if isinstance(found, tuple) else found


def one_by_one(model, sequence):
    state, outputs = None, []
    for piece in sequence.split(1, dim=1):
        found, state = model(piece, state)
        outputs.append(found)
    return torch.cat(outputs, dim=1)


def generated(model):
    """Log-likelihoods of the likeliest tokens after a prompt."""
    prompt = torch.arange(2 * BATCH).view(BATCH, 2)
    return model.generate(prompt, LENGTH, temperature=0.0).log_likelihoods


def computed(name, model):
    """The outputs by the operators, and by each fast path."""
    if isinstance(model, CausalLanguageModel):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "FEWEST_FOR_A_PROGRAM", LENGTH)
            found = generated(model)
            patch.setattr(generation, "steps_library", lambda _: None)
            return generated(model), [found]
    sequence = normal(BATCH, LENGTH, WIDTH)
    expected = outputs_of(model(sequence)).detach()
    with torch.no_grad():
        fast = [outputs_of(model(sequence))]
        if "block" in name or name == "stack":
            fast.append(one_by_one(model, sequence))
    return expected, fast


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODELS)
def test_fast_paths_call_what_is_hung_on_any_module(name, change):
    model = build(name)
    before, _ = computed(name, model)
    tried = 0
    for path in places(model, change):
        changed = copy.deepcopy(model)
        CHANGES[change](changed.get_submodule(path))
        expected, fast = computed(name, changed)
        for found in fast:
            assert relative_error(found, expected) < COMPLEX_FLOAT32, path
        assert relative_error(expected, before) > 10 * COMPLEX_FLOAT32, f"{path} is not called at all"
        tried += 1
    assert tried >= 3


def test_what_takes_the_place_of_dropout_is_called():
    """Also in evaluation, where dropout itself does nothing."""
    for mixer in ("selective", "mamba2", "mamba3 of rank 2"):
        block = build(f"block of {mixer}")
        block.dropout = nn.Hardtanh(-0.1, 0.1).eval()
        expected, fast = computed("block", block)
        assert all(relative_error(found, expected) < COMPLEX_FLOAT32 for found in fast)
    model = build("language model")
    assert language_steps.steps_library(model) is not None or native_library() is None
    for dropout in (nn.Hardtanh().eval(), nn.Dropout(0.5).train()):
        model.stack.blocks[0].dropout = dropout
        assert language_steps.steps_library(model) is None


def test_what_a_language_model_does_differently_is_generated():
    class Other(CausalLanguageModel):
        def logits(self, hidden):
            return super().logits(hidden).flip(-1)

    for change in (
        lambda model: setattr(model, "__class__", Other),
        lambda model: setattr(model, "logits", lambda hidden: CausalLanguageModel.logits(model, hidden).flip(-1)),
        lambda model: setattr(model.head, "bias", nn.Parameter(torch.arange(7.0))),
        lambda model: setattr(model.embedding, "max_norm", 0.5),
    ):
        model = build("language model")
        before, _ = computed("language model", model)
        change(model)
        expected, fast = computed("language model", model)
        assert relative_error(expected, before) > 1e-3
        assert relative_error(fast[0], expected) < COMPLEX_FLOAT32


def test_a_hook_sees_the_whole_sequence(monkeypatch):
    """Walked in pieces, an activation that is kept for later would be that of the last piece."""
    monkeypatch.setattr(stack_module, "SHORTEST_PIECE", 4)
    monkeypatch.setattr(stack_module, "PIECE_POSITIONS", 4)
    monkeypatch.setattr(stack_module, "PIECE_POSITIONS_OF_CALLS", 4)
    stack, kept = build("stack"), {}
    stack.blocks[0].register_forward_hook(lambda _, __, outputs: kept.update(outputs=outputs[0]))
    with torch.no_grad():
        stack(normal(1, 50, WIDTH))
    assert kept["outputs"].shape == (1, 50, WIDTH)


@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_and_sequences_of_other_layouts_are_read_rightly(mixer):
    block, sequence = build(f"block of {mixer}"), normal(BATCH, LENGTH, WIDTH)
    expected, _ = computed("block", block)
    negated = torch._neg_view(-sequence)  # numbers in memory are the negative ones
    assert negated.is_neg()
    with torch.no_grad():
        assert relative_error(outputs_of(block(negated)), expected) < COMPLEX_FLOAT32
        assert relative_error(one_by_one(block, negated), expected) < COMPLEX_FLOAT32
    layer = block.mixer.output_projection
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    assert not is_plain(layer, nn.Linear)
    with torch.no_grad():
        assert relative_error(one_by_one(block, sequence), expected) < COMPLEX_FLOAT32


def dual(shape):
    return forward_ad.make_dual(normal(*shape), normal(*shape))


OPERATORS = {
    "convolution": lambda: causal_convolution(normal(1, 3, 2), dual((2, 4))),
    "selective scan": lambda: selective_scan(
        normal(1, 3, 2), normal(1, 3, 2), dual((2, 4)), normal(1, 3, 4), normal(1, 3, 4)
    ),
    "dual scan": lambda: ssd_scan(normal(1, 3, 2, 4), normal(1, 3, 2), normal(1, 3, 1, 4), dual((1, 3, 1, 4))),
    "norm": lambda: root_mean_square_norm(normal(1, 3, 2), dual((2,))),
    "norm after a gate": lambda: gated_norm(normal(1, 3, 4), dual((1, 3, 4)), norm_after_gate(4, 1, 1e-5)),
    "blocks": lambda: [block_of(mixer).eval()(dual((1, 1, WIDTH))) for mixer in ("selective", "mamba2")],
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_derivatives_are_refused_not_dropped(operator, gradients):
    with (
        torch.set_grad_enabled(gradients),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode"),
    ):
        OPERATORS[operator]()
