"""What a stack is built of, what it refuses, and what its options do."""

import pytest
import torch

from mambacore.errors import InputError
from mambacore.layers import MIXERS, Mixer, ResidualBlock, ResidualStack, S4DMixer, SelectiveMixer, build_mixer
from tolerances import FLOAT64, relative_error

WIDTH = 8


class Doubling(Mixer):
    """A mixer that nobody has registered, with a step of its own."""

    def __init__(self, model_width):
        super().__init__()
        self.output_projection = torch.nn.Linear(model_width, model_width)
        self.stepped = 0

    def forward(self, sequence, state=None, sequence_starts=None):
        return 2 * sequence, state

    def step(self, norm, sequence, state):
        self.stepped += 1
        return sequence + 2 * norm(sequence), state


class Inheriting(Doubling):
    """Computes something else than the step that it inherits."""

    def forward(self, sequence, state=None, sequence_starts=None):
        return 3 * sequence, state


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_mixers_are_given_by_instance_class_name_or_mapping():
    own = SelectiveMixer(WIDTH, kernel_width=3)
    before = own.output_projection.weight.clone()
    stack = ResidualStack(WIDTH, [own, S4DMixer, "attention", {"name": "selective", "state_size": 5}, Doubling])
    kinds = [type(block.mixer).__name__ for block in stack.blocks]
    assert kinds == ["SelectiveMixer", "S4DMixer", "AttentionMixer", "SelectiveMixer", "Doubling"]
    assert stack.blocks[0].mixer is own and stack.blocks[3].mixer.state_size == 5
    assert torch.equal(own.output_projection.weight, before)  # an instance is taken as it is
    assert stack(normal(2, 3, WIDTH))[0].shape == (2, 3, WIDTH)


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        ("selective", "mixers must be a list with one mixer per layer but is 'selective'"),
        ({"name": "s4d"}, "mixers must be a list with one mixer per layer but is {'name': 's4d'}"),
        (SelectiveMixer(WIDTH), "mixers must be a list with one mixer per layer but is an instance of SelectiveMixer"),
        (4, "mixers must be a list with one mixer per layer but is 4"),
        ([3], "3 is not a mixer; give a name, a mapping"),
        ([torch.nn.Linear], "the class Linear is not a mixer"),
        ([torch.nn.Linear(8, 8)], "an instance of Linear is not a mixer"),
        ([None], "None is not a mixer"),
        ([{"state_size": 3}], "lacks a name; choose attention"),
        ([{"name": 3}], "lacks a name; choose attention"),
        ([SelectiveMixer(4)], "'selective' has a model_width of 4 but the stack has 8"),
    ],
)
def test_wrong_kinds_of_mixers_are_refused_in_one_sentence(mixers, message):
    with pytest.raises(InputError) as refused:
        ResidualStack(WIDTH, mixers)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed_forward_width": 0}, "feed_forward_width must be at least 1 but is 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1 but is 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1 but is -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ResidualStack(WIDTH, ["selective"], **options)


def test_a_sequence_or_a_state_that_does_not_fit_is_refused():
    stack = ResidualStack(WIDTH, ["selective"] * 2)
    for shape in ((1, 3, WIDTH - 1), (3, WIDTH), (1, 1, 1, WIDTH)):
        with pytest.raises(InputError, match=r"must be \(batch, length, model_width=8\) but has shape"):
            stack(normal(*shape))
    with pytest.raises(InputError, match="the state is of 1 blocks but the stack has 2"):
        stack(normal(1, 3, WIDTH), (None,))


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_width_is_known_of_every_mixer(name):
    assert build_mixer(WIDTH, name).model_width == WIDTH


def test_a_step_is_a_hook_that_any_mixer_may_implement():
    block, piece = ResidualBlock(WIDTH, Doubling(WIDTH)), normal(2, 1, WIDTH)
    expected, _ = block(piece)
    assert block.mixer.stepped == 0  # with gradients the operators run
    with torch.no_grad():
        found, _ = block(piece)
        block(normal(2, 2, WIDTH))
    assert block.mixer.stepped == 1 and torch.equal(found, expected)


def test_a_subclass_does_not_inherit_the_step_of_what_it_changed():
    block, piece = ResidualBlock(WIDTH, Inheriting(WIDTH)), normal(2, 1, WIDTH)
    expected, _ = block(piece)
    with torch.no_grad():
        assert torch.equal(block(piece)[0], expected)
    assert block.mixer.stepped == 0


def test_a_gated_feed_forward_layer_follows_every_mixer():
    stack = ResidualStack(WIDTH, ["selective", "s4d"], feed_forward_width=5).double()
    plain = ResidualStack(WIDTH, ["selective", "s4d"]).double()
    kept = {name: tensor for name, tensor in stack.state_dict().items() if "feed_forward" not in name}
    plain.load_state_dict(kept)  # other names are as without it
    sequence = normal(2, 7, WIDTH).double()
    expected = sequence
    for block, without in zip(stack.blocks, plain.blocks, strict=True):
        expected, _ = without(expected)
        layer = block.feed_forward
        normed = expected * (expected.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        values, gate = (normed @ layer.input_projection.weight.T).chunk(2, dim=-1)
        expected = expected + (values * gate * torch.sigmoid(gate)) @ layer.output_projection.weight.T
    assert relative_error(stack(sequence)[0], stack.final_norm(expected)) < FLOAT64


def test_dropout_is_for_training_only():
    stack, sequence = ResidualStack(WIDTH, ["selective"], feed_forward_width=4, dropout=0.5), normal(2, 30, WIDTH)
    plain = ResidualStack(WIDTH, ["selective"], feed_forward_width=4)
    plain.load_state_dict(stack.state_dict())
    with torch.no_grad():
        assert torch.equal(stack.eval()(sequence)[0], plain(sequence)[0])
        stack.train()
        torch.manual_seed(0)
        assert not torch.equal(stack(sequence)[0], plain(sequence)[0])
        # A single position takes the operators, which drop, not the native step.
        assert not torch.equal(stack(sequence[:, :1])[0], stack(sequence[:, :1])[0])


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_activation_checkpointing_gives_the_same_gradients_from_fewer_kept_tensors(mixer):
    torch.manual_seed(0)
    plain = ResidualStack(WIDTH, [mixer] * 2, feed_forward_width=6, dropout=0.3)
    saving = ResidualStack(WIDTH, [mixer] * 2, feed_forward_width=6, dropout=0.3, activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    found, kept = [], []
    for stack in (plain, saving):
        torch.manual_seed(1)
        sequence, sizes = normal(2, 40, WIDTH).requires_grad_(), []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs, _ = stack(sequence)
        kept.append(sum(sizes))
        found.append(torch.autograd.grad(outputs.square().sum(), [sequence, *stack.parameters()]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert kept[1] < kept[0] / 3
