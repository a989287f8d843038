"""The laws of the models of waveforms, through pooling: pieces equal the whole, nothing sees the future."""

import pytest
import torch

from audiomamba.data.quantisers import Quantiser
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig, WaveformState, waveform_model
from audiomamba.models.pooling import DownPooling, UpPooling
from mambacore.errors import InputError
from mambacore.state import map_state, state_tensors
from tolerances import FLOAT64, FOURIER_CAUSALITY, PIECES_FLOAT32, PIECES_FLOAT64, relative_error

LENGTH = 61
SELECTIVE = StageConfig(2, {"name": "selective", "state_size": 3})
COMPLEX = StageConfig(1, {"name": "selective", "state_size": 2, "complex_state": True})
S4D = StageConfig(2, {"name": "s4d", "state_size": 3, "convolution": False}, 2)
TRANSFORMED = StageConfig(1, {"name": "s4d", "state_size": 3, "convolution": True}, 2)
ATTENTION = StageConfig(1, "attention", 2)
HYBRID = StageConfig(2, ["gru", {"name": "selective", "state_size": 2}], 1)


def configured(stages, pooling, unet=True, width=8):
    return WaveformModelConfig(tuple(stages), width, tuple(pooling), blocks_on_the_way_down=unet)


CONFIGURATIONS = {
    "no pooling": configured([SELECTIVE], []),
    "one pooling": configured([SELECTIVE, S4D], [3]),
    "one pooling, no unet": configured([S4D, SELECTIVE], [4], unet=False),
    "two poolings": configured([SELECTIVE, SELECTIVE, SELECTIVE], [4, 4]),
    "two poolings, no unet": configured([S4D, S4D, S4D], [4, 4], unet=False),
    "two unlike poolings": configured([COMPLEX, HYBRID, ATTENTION], [2, 5]),
    "three poolings": configured([S4D, COMPLEX, SELECTIVE, ATTENTION], [2, 3, 2]),
    "four poolings, no unet": configured([SELECTIVE, HYBRID, S4D, COMPLEX, SELECTIVE], [2, 2, 2, 2], unet=False),
    "transformed": configured([TRANSFORMED, SELECTIVE], [4]),
}
SPLITS = {
    "steps": [1] * LENGTH,
    "halves": [LENGTH // 2, LENGTH - LENGTH // 2],
    "odd": [0, 1, 2, 3, 5, 7, 11, 0, 13, 4, 4, 8, 3, 0],
    "groups": [16, 16, 16, 13],
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    return WaveformModel(CONFIGURATIONS[name]).to(dtype)


def classes(length=LENGTH, seed=1):
    return torch.randint(256, (2, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers_of(state):
    return [tensor for tensor in state_tensors(state) if tensor.is_floating_point() or tensor.is_complex()]


def run_in_pieces(function, inputs, state, lengths):
    outputs = []
    for piece in inputs.split(lengths, dim=1):
        output, state = function(piece, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def with_all_gradients(model, tokens, state, lengths):
    """Logits and final state, and the gradients of a loss on both: of parameters and incoming state."""
    state = map_state(
        lambda tensor: (
            tensor.detach().clone().requires_grad_() if tensor.is_floating_point() or tensor.is_complex() else tensor
        ),
        state,
    )
    logits, final = run_in_pieces(model, tokens, state, lengths)
    loss = (logits * normal(*logits.shape, seed=3)).sum()
    loss = loss + sum(number.abs().square().sum() for number in numbers_of(final))
    named = dict(model.named_parameters())
    named |= {f"incoming state {number}": tensor for number, tensor in enumerate(numbers_of(state))}
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    found = {"logits": logits} | {f"final state {number}": tensor for number, tensor in enumerate(numbers_of(final))}
    return found | {f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True)}


def assert_equal(found, expected, tolerance):
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert found.keys() == expected.keys() and not wrong, wrong


def through_scales(model, embedded):
    hidden, _ = model.scales(embedded)
    return model.logits(model.final_norm(hidden))


@pytest.mark.parametrize("before", [0, 23], ids=["from the start", "going on"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_pieces_equal_the_whole_with_all_gradients(name, before):
    model = build(name)
    with torch.no_grad():
        incoming = model(classes(before, seed=2))[1] if before else model(classes(0))[1]
    whole = with_all_gradients(model, classes(), incoming, [LENGTH])
    for lengths in SPLITS.values():
        assert_equal(with_all_gradients(model, classes(), incoming, lengths), whole, PIECES_FLOAT64)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_parameter_receives_a_gradient(name):
    gradients = with_all_gradients(build(name), classes(), None, [LENGTH])
    assert not [key for key, grad in gradients.items() if key.startswith("gradient") and grad.abs().max() == 0]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_absent_state_is_the_state_of_an_empty_piece(name):
    model = build(name)
    nothing, state = model(classes(0))
    assert nothing.shape == (2, 0, 256) and isinstance(state, WaveformState)
    assert relative_error(model(classes(), state)[0], model(classes())[0]) < PIECES_FLOAT64


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_float32_pieces_and_steps_equal_the_whole(name):
    model = build(name, torch.float32)
    with torch.no_grad():
        whole, whole_state = model(classes())
        for lengths in SPLITS.values():
            pieces, state = run_in_pieces(model, classes(), None, lengths)
            assert pieces.dtype == torch.float32
            assert relative_error(pieces, whole) < PIECES_FLOAT32
            for one, other in zip(numbers_of(state), numbers_of(whole_state), strict=True):
                assert relative_error(one, other) < PIECES_FLOAT32


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_gradient_reaches_a_logit_from_a_later_sample(name):
    model, embedded = build(name), normal(2, LENGTH, 8).requires_grad_()
    logits = through_scales(model, embedded)
    for position in range(0, LENGTH, 7):
        (grad,) = torch.autograd.grad(logits[:, position].sum(), embedded, retain_graph=True)
        future, present = grad[:, position + 1 :].abs().max(), grad[:, position].abs().max()
        assert future <= (FOURIER_CAUSALITY * present if name == "transformed" else 0), position
        assert present > 0 and grad[:, :1].abs().max() > 0


def test_the_centre_is_heard_as_soon_as_it_may_be():
    """Its first position knows the samples 0 to 15, and is passed on one group of 4 times 4 and then of 4 later."""
    model, embedded = build("two poolings"), normal(1, LENGTH, 8)
    centre = model.scales.deeper.deeper
    with torch.no_grad():
        before = through_scales(model, embedded)
        for parameter in centre.parameters():
            parameter.add_(0.1)
        moved = (through_scales(model, embedded) - before).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [position >= 16 + 4 for position in range(LENGTH)]


def published_equations(model, embedded):
    """SaShiMi's forward as a list of outputs that is pushed and popped (arXiv 2202.09729, section 4 and its figure)."""

    def walk(scale, fine):
        outputs, hidden = [fine], fine
        for block in scale.down:
            hidden = block(hidden)[0]
            outputs.append(hidden)
        if scale.deeper is None:
            for block in scale.up:
                hidden = block(hidden)[0]
            return hidden + fine
        factor, length = scale.down_pooling.factor, fine.shape[1]
        groups = [hidden[:, begin : begin + factor] for begin in range(0, length - factor + 1, factor)]
        coarse = [scale.down_pooling.linear(group.flatten(1)) for group in groups]
        spread = [torch.zeros_like(hidden[:, :1])] * factor
        for position in walk(scale.deeper, torch.stack(coarse, dim=1)).unbind(1) if coarse else ():
            spread += scale.up_pooling.linear(position).unflatten(1, (factor, -1)).split(1, dim=1)
        hidden = torch.cat(spread, dim=1)[:, :length] + outputs.pop()
        entered = hidden
        for block in scale.up:
            hidden = block(hidden)[0]
            if scale.is_unet:
                hidden = hidden + outputs.pop()
        return hidden if scale.is_unet else hidden + entered

    return model.logits(model.final_norm(walk(model.scales, embedded)))


@pytest.mark.parametrize("length", [5, 16, LENGTH])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_model_is_the_published_one(name, length):
    model, tokens = build(name), classes(length)
    with torch.no_grad():
        expected = published_equations(model, model.embedding(tokens))
        assert relative_error(model(tokens)[0], expected) < PIECES_FLOAT64


@pytest.mark.parametrize("factor", [2, 4, 5])
@pytest.mark.parametrize("lengths", SPLITS.values(), ids=SPLITS.keys())
def test_poolings_equal_their_whole_in_any_pieces(factor, lengths):
    torch.manual_seed(0)
    down, up = DownPooling(3, 6, factor).double(), UpPooling(6, 3, factor).double()

    def both(piece, state):
        before = state or (None, None)
        coarse, down_state = down(piece, before[0])
        fine, up_state = up(coarse, piece.shape[1], before[1])
        return fine, (down_state, up_state)

    inputs = normal(2, LENGTH, 3)
    whole, _ = both(inputs, None)
    assert whole[:, :factor].abs().max() == 0 and whole[:, factor:].abs().min() > 0
    assert relative_error(run_in_pieces(both, inputs, None, lengths)[0], whole) < FLOAT64


def test_up_pooling_refuses_coarse_positions_that_the_piece_does_not_complete():
    up = UpPooling(6, 3, 4)
    with pytest.raises(ValueError, match="complete 1 groups but 2 were given"):
        up(torch.zeros(1, 2, 6), 7)


def test_a_long_waveform_without_gradients_is_walked_in_pieces(monkeypatch):
    model = build("two unlike poolings")
    whole = model(classes())
    monkeypatch.setattr(waveform_model, "PIECE_POSITIONS", 26)
    seen = []
    kind = type(model.embedding)
    embed = kind.forward

    def forward(self, classes):
        seen.append(classes.shape[1])
        return embed(self, classes)

    # Not a hook: a model with hooks is called once, with everything.
    monkeypatch.setattr(kind, "forward", forward)
    with torch.no_grad():
        pieces = model(classes())
    assert seen == [13, 13, 13, 13, 9]
    assert relative_error(pieces[0], whole[0]) < PIECES_FLOAT64


def test_the_loss_adds_up_over_pieces_and_leaves_padding_out(monkeypatch):
    model, tokens = build("one pooling"), classes()
    targets = torch.roll(tokens, -1, 1)
    targets[1, 40:] = -100
    logits, _ = model(tokens)
    log_likelihoods = torch.log_softmax(logits, -1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    expected = -(log_likelihoods * (targets >= 0)).sum()
    monkeypatch.setattr(waveform_model, "PIECE_POSITIONS", 20)
    total, count, state = 0, 0, None
    for piece, wanted in zip(tokens.split(17, dim=1), targets.split(17, dim=1), strict=True):
        loss, counted, state = model.loss(piece, wanted, state)
        total, count = total + loss, count + counted
    assert count == LENGTH + 40
    assert relative_error(total, expected) < PIECES_FLOAT64


def test_every_parameter_is_in_one_optimizer_group_and_dynamics_do_not_decay():
    model = build("three poolings")
    decaying, others = (group["params"] for group in model.parameter_groups(0.1))
    assert sorted(map(id, [*decaying, *others])) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(parameter)].endswith("weight") or "matrix" in names[id(parameter)] for parameter in decaying)
    for spared in ("log_decay_rate", "frequency", "embedding.weight", "norm.weight"):
        assert not [name for name in map(names.get, map(id, decaying)) if name.endswith(spared)]


def test_classes_of_any_integer_dtype_are_read():
    config = WaveformModelConfig((SELECTIVE,), 8, (), quantiser=Quantiser("linear", 10))
    model = WaveformModel(config)
    tokens = classes()
    logits = model(tokens)[0]
    assert logits.shape == (2, LENGTH, 1024)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(model(tokens.to(dtype))[0], logits)


def test_one_step_costs_the_centre_nothing_until_a_group_is_complete():
    model, calls = build("two poolings"), []
    model.scales.deeper.deeper.up[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        _, state = model(classes(0))
        calls.clear()
        for position, token in enumerate(classes(32).split(1, dim=1)):
            _, state = model(token, state)
            assert len(calls) == (position + 1) // 16


@pytest.mark.parametrize("name", ["stages", "pooling", "label_sets"])
def test_a_configuration_of_one_value_for_a_list_is_refused(name):
    values = configured([SELECTIVE], []).to_dict() | {name: 4}
    with pytest.raises(InputError, match=name):
        WaveformModelConfig.from_dict(values)
    if name == "pooling":
        with pytest.raises(InputError, match="pooling is 4 in the model's configuration; give a list"):
            WaveformModelConfig((SELECTIVE, SELECTIVE), 8, 4)
