"""Fast paths read weights directly only where that equals calling the modules; elsewhere the modules are called."""

import copy
import types

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune

from mambacore.layers import (
    BidirectionalMixer,
    EquivariantStack,
    ResidualBlock,
    ResidualStack,
    RootMeanSquareNorm,
    SelectiveMixer,
    plain_modules,
)
from mambacore.layers.bidirectional import BidirectionalStack
from mambacore.models import MaskedLanguageModel, MaskedLanguageModelConfig
from tolerances import COMPLEX_FLOAT32, relative_error

WIDTH = 16
PROJECTIONS = ("input_projection", "selection_projection", "step_projection", "output_projection")


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter around it (LoRA, Hu et al., arXiv 2106.09685)."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(1)))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=torch.Generator().manual_seed(2)))

    def forward(self, inputs):
        return self.base(inputs) + inputs @ self.down.T @ self.up.T


class Shifted(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, inputs):
        return super().forward(inputs) + 1


class Marked(torch.Tensor):
    """A tensor subclass."""


def adapt(block):
    for name in PROJECTIONS:
        setattr(block.mixer, name, Adapted(getattr(block.mixer, name)))


def subclass_linear(block):
    for name in PROJECTIONS:
        layer = getattr(block.mixer, name)
        other = Shifted(layer.in_features, layer.out_features, bias=False)
        other.weight = layer.weight
        setattr(block.mixer, name, other)


def subclass_mixer(block):
    class Other(SelectiveMixer):
        def mix(self, inputs, gate, state, sequence_starts, reverse):
            outputs, state = super().mix(inputs, gate, state, sequence_starts, reverse)
            return outputs + 1, state

    block.mixer.__class__ = Other


def subclass_norm(block):
    class Other(RootMeanSquareNorm):
        def forward(self, sequence):
            return super().forward(sequence) + 1

    block.norm.__class__ = Other


def replace_forward(block):
    layer = block.mixer.output_projection
    layer.forward = types.MethodType(lambda self, inputs: nn.Linear.forward(self, inputs) + 1, layer)


def mark(block):
    for name in ("skip_weight", "log_decay_rate"):
        weight = getattr(block.mixer, name).detach()
        setattr(block.mixer, name, nn.Parameter(weight.as_subclass(Marked)))


def hook_on(path):
    def add(block):
        module = block.get_submodule(path)
        if path == "mixer":
            module.register_forward_hook(lambda _, __, outputs: (outputs[0] + 1, outputs[1]))
        else:
            module.register_forward_hook(lambda _, __, outputs: outputs + 1)

    return add


CHANGES = {
    "adapters": adapt,
    "subclass of nn.Linear": subclass_linear,
    "subclass of the mixer": subclass_mixer,
    "subclass of the norm": subclass_norm,
    "forward of an instance": replace_forward,
    "tensor subclass": mark,
    "hook on the norm": hook_on("norm"),
    "hook on the mixer": hook_on("mixer"),
    "hook on a projection": hook_on("mixer.selection_projection"),
    "hook before a projection": lambda block: block.mixer.step_projection.register_forward_pre_hook(
        lambda _, inputs: (inputs[0] + 100,)
    ),
    "weight_norm": lambda block: parametrizations.weight_norm(block.mixer.input_projection),
    "weight_norm of old": lambda block: nn.utils.weight_norm(block.mixer.output_projection),
    "spectral_norm": lambda block: parametrizations.spectral_norm(block.mixer.output_projection),
    "parametrised mixer": lambda block: nn.utils.parametrize.register_parametrization(
        block.mixer, "skip_weight", nn.Tanh()
    ),
    "pruned": lambda block: prune.l1_unstructured(block.mixer.input_projection, "weight", 0.5),
}


def block_of():
    torch.manual_seed(0)
    return ResidualBlock(WIDTH, SelectiveMixer(WIDTH)).eval()


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_steps_equal_two_positions(block):
    """One position at a time, without gradients, is what both are at once."""
    sequence = normal(2, 2, WIDTH)
    with torch.no_grad():
        expected, _ = block(sequence)
        first, state = block(sequence[:, :1])
        second, _ = block(sequence[:, 1:], state)
    assert relative_error(torch.cat([first, second], dim=1), expected) < COMPLEX_FLOAT32
    return expected


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_called_when_it_steps(change):
    block = block_of()
    before = assert_steps_equal_two_positions(block)
    CHANGES[change](block)
    after = assert_steps_equal_two_positions(block)
    assert change in ("tensor subclass", "weight_norm", "weight_norm of old") or relative_error(after, before) > 1e-3


def test_a_quantised_layer_is_called_when_it_steps():
    block = torch.ao.quantization.quantize_dynamic(block_of(), {nn.Linear}, dtype=torch.qint8)
    assert type(block.mixer.input_projection) is not nn.Linear
    sequence = normal(1, 1, WIDTH)
    with torch.no_grad():
        found, _ = block(sequence)
        mixed, _ = block.mixer(block.norm(sequence))
    assert torch.equal(found, sequence + mixed)


def test_a_global_hook_is_called_when_a_block_steps():
    block, seen = block_of(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, _, __: seen.append(type(module)))
    try:
        with torch.no_grad():
            block(normal(1, 1, WIDTH))
    finally:
        handle.remove()
    assert nn.Linear in seen and RootMeanSquareNorm in seen


def test_the_epsilon_of_a_norm_may_change_between_steps():
    block, piece = block_of(), normal(1, 1, WIDTH) * 1e-2
    with torch.no_grad():
        block(piece)
        block.norm.epsilon = 1.0
        found, _ = block(piece)
    assert relative_error(found, block(piece)[0]) < COMPLEX_FLOAT32


def test_a_traced_step_is_the_operators():
    block, one, other = block_of(), normal(2, 1, WIDTH), 2 * normal(2, 1, WIDTH)
    with torch.no_grad():
        traced = torch.jit.trace(block, (one,), check_trace=False)
        assert relative_error(traced(other)[0], block(other)[0]) < COMPLEX_FLOAT32


def test_a_step_of_fake_tensors_has_the_right_shapes():
    with FakeTensorMode() as mode, torch.no_grad():
        block = ResidualBlock(WIDTH, SelectiveMixer(WIDTH))
        outputs, state = block(mode.from_tensor(normal(3, 1, WIDTH)))
    assert outputs.shape == (3, 1, WIDTH) and state.scan.shape == (3, 2 * WIDTH, 16)


def test_a_step_can_be_recorded_by_make_fx():
    block, one, other = block_of(), normal(2, 1, WIDTH), 2 * normal(2, 1, WIDTH)
    with torch.no_grad():
        recorded = make_fx(lambda sequence: block(sequence)[0])(one)
        assert relative_error(recorded(other), block(other)[0]) < COMPLEX_FLOAT32


def test_parameters_of_a_functional_call_are_those_of_the_step():
    block, piece = block_of(), normal(1, 1, WIDTH)
    others = {name: 0.5 * parameter.detach() for name, parameter in block.named_parameters()}
    with torch.no_grad():
        block(piece)
        found, _ = torch.func.functional_call(block, others, (piece,))
    expected, _ = torch.func.functional_call(block, others, (piece,))
    assert relative_error(found, expected) < COMPLEX_FLOAT32


def test_nothing_is_watched_in_an_ordinary_call():
    assert not plain_modules.operators_are_watched()
    seen = []
    torch.jit.trace(
        lambda x: (seen.append(plain_modules.operators_are_watched()), x + 1)[1], (normal(2),), check_trace=False
    )
    torch.vmap(lambda x: (seen.append(plain_modules.operators_are_watched()), x + 1)[1])(normal(2))
    with FakeTensorMode():
        seen.append(plain_modules.operators_are_watched())
    with torch.device("cpu"):
        seen.append(plain_modules.operators_are_watched())
    assert seen and all(seen)


BIDIRECTIONAL_CHANGES = {
    "adapters on the projections": lambda mixer: [
        setattr(one, name, Adapted(getattr(one, name)))
        for one in (mixer.forward_mixer, mixer.reverse_mixer)
        for name in PROJECTIONS
    ],
    "hook on a direction": lambda mixer: mixer.reverse_mixer.register_forward_hook(
        lambda _, __, outputs: (outputs[0] + 1, outputs[1])
    ),
    "hook on the shared projection": lambda mixer: mixer.forward_mixer.output_projection.register_forward_hook(
        lambda _, __, outputs: outputs + 1
    ),
    "weight_norm": lambda mixer: parametrizations.weight_norm(mixer.forward_mixer.input_projection),
}


def reversed_by_hand(mixer, sequence):
    """BiMamba as it is written: forward(x) + R(reverse(R(x))), by calling both mixers."""
    ahead, _ = mixer.forward_mixer(sequence)
    behind, _ = mixer.reverse_mixer(sequence.flip(1))
    return ahead + behind.flip(1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", BIDIRECTIONAL_CHANGES)
def test_bidirectional_mixers_call_what_is_hung_on_them(change, tied):
    torch.manual_seed(0)
    mixer, sequence = BidirectionalMixer(WIDTH, {"linear_bias": True}, tied_projections=tied), normal(2, 9, WIDTH)
    before = mixer(sequence)
    BIDIRECTIONAL_CHANGES[change](mixer)
    found = mixer(sequence)
    assert relative_error(found, reversed_by_hand(mixer, sequence)) < COMPLEX_FLOAT32
    assert change == "weight_norm" or relative_error(found, before) > 1e-3
    flipped = mixer(sequence.flip(1, 2), reverse_complement=True).flip(1, 2)
    assert relative_error(flipped, found) < COMPLEX_FLOAT32


@pytest.mark.parametrize("stack_of", [BidirectionalStack, EquivariantStack])
def test_hooks_on_norms_of_bidirectional_blocks_are_called(stack_of):
    torch.manual_seed(0)
    stack = stack_of(WIDTH, 1)
    sequence = normal(1, 5, WIDTH * (2 if stack_of is EquivariantStack else 1))
    before, called = stack(sequence), []
    for norm in (stack.blocks[0].norm, stack.final_norm):
        norm.register_forward_hook(lambda _, __, outputs: called.append(1) or 2 * outputs)
    assert len(called) == 0 and relative_error(stack(sequence), before) > 1e-3 and len(called) >= 2


@pytest.mark.parametrize("equivariant", [False, True])
def test_adapters_on_a_masked_model_train(equivariant):
    torch.manual_seed(0)
    model = MaskedLanguageModel(
        MaskedLanguageModelConfig(6, WIDTH, 2, complement=(0, 1, 5, 4, 3, 2), equivariant=equivariant)
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, SelectiveMixer):
            for name in PROJECTIONS:
                if isinstance(getattr(module, name), nn.Linear):
                    setattr(module, name, Adapted(getattr(module, name)))
    model(torch.randint(6, (2, 12))).square().mean().backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(grad is not None and grad.abs().max() > 0 for grad in trained.values())


@pytest.mark.parametrize("sequence", [normal(2, 1, WIDTH - 8), normal(1, 1, WIDTH)[..., :8]])
def test_a_step_of_another_width_is_refused(sequence):
    block = block_of()
    for _ in range(3):
        with torch.no_grad(), pytest.raises(ValueError, match=r"weight must have shape .* to fit the inputs"):
            block(sequence)


def test_a_state_that_does_not_fit_is_refused():
    block, other = block_of(), ResidualBlock(WIDTH, SelectiveMixer(WIDTH, state_size=4))
    with torch.no_grad():
        _, of_one = block(normal(1, 1, WIDTH))
        _, small = other(normal(4, 1, WIDTH))
        for batch, state in ((4, of_one), (7, of_one), (4, small)):
            with pytest.raises(ValueError, match="initial_state must have shape"):
                block(normal(batch, 1, WIDTH), state)


def test_a_copied_stack_steps_with_its_own_weights():
    torch.manual_seed(0)
    stack, piece = ResidualStack(WIDTH, ["selective"] * 2), normal(1, 1, WIDTH)
    with torch.no_grad():
        stack(piece)
        other = copy.deepcopy(stack)
        other.blocks[0].mixer.skip_weight.add_(1)
        found, _ = other(piece)
    assert relative_error(found, other(piece)[0]) < COMPLEX_FLOAT32
