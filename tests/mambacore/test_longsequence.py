"""Backpropagation in pieces leaves what the backward pass over the whole sequence leaves, in bounded memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longsequence_models import (
    BATCH,
    CLASSES,
    LABELS,
    LENGTH,
    LOSSES,
    MIXER_LISTS,
    VOCABULARY,
    WIDTH,
    Classifier,
    build,
    errors,
    gradients,
    targets,
    tokens,
    worst,
)
from mambacore.layers import POOLINGS, ContextEmbedding, ResidualStack
from mambacore.layers import stack as stack_module
from mambacore.longsequence import (
    PooledLoss,
    TokenCrossEntropy,
    backward_at_once,
    backward_in_pieces,
    next_token_cross_entropy,
    next_token_targets,
    pooled_cross_entropy,
)
from mambacore.state import detached, map_state, state_tensors
from tolerances import BFLOAT16, PIECES_FLOAT64, relative_error


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mixers", MIXER_LISTS)
def test_gradients_equal_those_of_the_whole_sequence(mixers, loss):
    model = build(mixers=MIXER_LISTS[mixers])
    assert worst(model, tokens(), LOSSES[loss](LENGTH), 16) < PIECES_FLOAT64


@pytest.mark.parametrize(
    ("length", "piece_length"), [(45, 1), (45, 7), (45, 15), (45, 44), (45, 45), (45, 1000), (1, 5)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_pieces_of_any_length(loss, length, piece_length):
    assert worst(build(), tokens(length), LOSSES[loss](length), piece_length) < PIECES_FLOAT64


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_model_that_pools_by_itself(pooling):
    loss = PooledLoss(lambda logits: F.cross_entropy(logits, LABELS), pooling=None)
    assert worst(build(Classifier, pooling), tokens(), loss, 16) < PIECES_FLOAT64


def test_a_head_in_the_loss_gets_its_gradient():
    model, head = build(), nn.Linear(CLASSES, 3).double()
    found = []
    for function, options in ((backward_at_once, {}), (backward_in_pieces, {"piece_length": 16})):
        model.zero_grad(), head.zero_grad()
        function(model, tokens(), pooled_cross_entropy(torch.tensor([2, 0]), head), **options)
        found.append(gradients(model) | gradients(head))
    assert max(errors(found[1], found[0]).values()) < PIECES_FLOAT64


def test_the_definition_is_plain_backward():
    model, definition = build(), build()
    backward_at_once(definition, tokens(), TokenCrossEntropy(targets()))
    F.cross_entropy(model(tokens())[0].flatten(0, 1), targets().flatten()).backward()
    assert max(errors(gradients(definition), gradients(model)).values()) < PIECES_FLOAT64


@pytest.mark.parametrize("mixers", ["selective", "complex selective", "hybrid"])
def test_the_sequence_and_the_initial_state_get_their_gradients(mixers):
    stack = build(ResidualStack, WIDTH, MIXER_LISTS[mixers])
    generator = torch.Generator().manual_seed(3)
    sequence, before = (torch.randn(BATCH, LENGTH, WIDTH, generator=generator).double() for _ in range(2))
    _, state = stack(before)
    state = map_state(
        lambda tensor: tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex()), detached(state)
    )
    loss = lambda outputs, positions: (outputs.square() * targets()[:, positions, None]).sum() / 10  # noqa: E731
    assert worst(stack, sequence.requires_grad_(), loss, 16, state=state) < PIECES_FLOAT64
    frozen = detached(state)
    assert worst(stack, sequence, loss, 16, state=frozen) < PIECES_FLOAT64
    assert all(tensor.grad is None for tensor in state_tensors(frozen))


def test_gradients_flow_on_into_what_made_the_sequence_and_the_state():
    stack = build(ResidualStack, WIDTH, ["selective"])
    made = nn.Linear(WIDTH, WIDTH).double()
    given = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    found = []
    for function, options in ((backward_at_once, {}), (backward_in_pieces, {"piece_length": 16})):
        stack.zero_grad(), made.zero_grad()
        sequence = made(given)
        _, state = stack(sequence.flip(1))
        function(stack, sequence, lambda outputs, positions: outputs.square().sum(), state=state, **options)
        found.append(gradients(stack) | gradients(made))
    assert max(errors(found[1], found[0]).values()) < PIECES_FLOAT64


def test_accumulated_calls_add_up():
    model, sequences, loss = build(), [tokens(seed=1), tokens(30, seed=4)], next_token_cross_entropy
    model.head = nn.Linear(WIDTH, VOCABULARY).double()
    total = sum(F.cross_entropy(model(s[:, :-1])[0].flatten(0, 1), s[:, 1:].flatten()) for s in sequences) / 2
    total.backward()
    expected = gradients(model)
    model.zero_grad()
    found = [backward_in_pieces(model, s, loss(s), piece_length=16, scale=0.5).loss for s in sequences]
    assert max(errors(gradients(model), expected).values()) < PIECES_FLOAT64
    assert relative_error(sum(found) / 2, total.detach()) < PIECES_FLOAT64


def test_packed_records():
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    starts[0, [0, 16, 20]], starts[1, [3, 31, 44]] = True, True
    model = build(mixers=["selective", "attention"])
    model.embedding = ContextEmbedding(VOCABULARY, (1,), WIDTH).double()
    model.head = nn.Linear(WIDTH, VOCABULARY).double()
    loss = next_token_cross_entropy(tokens(), starts)
    assert worst(model, tokens(), loss, 16, sequence_starts=starts) < PIECES_FLOAT64
    backward_in_pieces(model, tokens(), loss, piece_length=16)
    packed = gradients(model)
    assert worst(model, tokens(), loss, 16) < PIECES_FLOAT64
    assert max(errors(packed, gradients(model)).values()) > 1e-3  # the records did matter


def test_next_token_targets():
    row = torch.tensor([[5, 6, 7, 8]])
    assert next_token_targets(row).tolist() == [[6, 7, 8, -100]]
    starts = torch.tensor([[True, False, True, False]])
    assert next_token_targets(row, starts, ignored=-1).tolist() == [[6, -1, 8, -1]]


def test_ignored_and_weighted_positions_keep_the_mean_exact():
    model, labels = build(), targets()
    labels[0, 10:40] = -100
    assert worst(model, tokens(), TokenCrossEntropy(labels), 7) < PIECES_FLOAT64
    expected = F.cross_entropy(model(tokens())[0].flatten(0, 1), labels.flatten()).detach()
    found = backward_in_pieces(model, tokens(), TokenCrossEntropy(labels), piece_length=7).loss
    assert relative_error(found, expected) < PIECES_FLOAT64
    weights = (labels != -100).double() * 0.5
    weighted = TokenCrossEntropy(targets(), weights)
    assert relative_error(backward_in_pieces(model, tokens(), weighted, piece_length=7).loss, expected) < PIECES_FLOAT64


@pytest.mark.parametrize(
    "loss",
    [
        TokenCrossEntropy(torch.full((BATCH, LENGTH), -100)),
        TokenCrossEntropy(targets(), torch.zeros(BATCH, LENGTH)),
        pooled_cross_entropy(torch.full((BATCH,), -100)),
    ],
)
def test_nothing_to_learn_from_is_a_loss_of_zero(loss):
    model = build()
    assert backward_in_pieces(model, tokens(), loss, piece_length=16).loss == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("piece_length", [16, 45])
def test_dropout_draws_the_same_numbers_again(piece_length, monkeypatch):
    """The reference walks the same pieces with one graph through all of them, so that nothing is run twice."""
    monkeypatch.setattr(
        stack_module, "PIECE_POSITIONS_OF_CALLS", 8
    )  # without gradients a stack walks, and draws, otherwise
    model = build(dropout=0.3)
    for block in model.stack.blocks:
        block.norm = nn.Sequential(block.norm, nn.Dropout(0.3))
    loss, sequence = TokenCrossEntropy(targets()), tokens()

    def chained():
        state, total = None, 0.0
        for begin in range(0, LENGTH, piece_length):
            positions = slice(begin, min(begin + piece_length, LENGTH))
            outputs, state = model(sequence[:, positions], state)
            total = total + loss(outputs, positions)
        total.backward()

    found = []
    for run in (chained, lambda: backward_in_pieces(model, sequence, loss, piece_length=piece_length)):
        model.zero_grad()
        torch.manual_seed(11)
        run()
        found.append(gradients(model) | {"draw": torch.rand(3, dtype=torch.float64)})
    assert max(errors(found[1], found[0]).values()) < PIECES_FLOAT64


@pytest.mark.parametrize("piece_length", [16, 45])
def test_what_is_drawn_after_a_pooled_loss_follows_the_last_piece(piece_length):
    """The head of a pooled loss draws last, after the pieces; going back over the pieces moves no numbers."""
    model, sequence, found = build(dropout=0.3), tokens(), []

    def head(pooled):
        return nn.functional.dropout(pooled, 0.5)

    for run in ("by hand", "in pieces"):
        torch.manual_seed(11)
        loss = pooled_cross_entropy(torch.tensor([0, 1]), head)
        if run == "by hand":
            state = pooling = None
            for piece in sequence.split(piece_length, dim=1):
                outputs, state = model(piece, state)
                pooled, pooling = loss.pool(outputs, pooling)
            found.append(loss.function(pooled))
        else:
            found.append(backward_in_pieces(model, sequence, loss, piece_length=piece_length).loss)
        found.append(torch.rand(3))
    assert relative_error(found[2], found[0]) < PIECES_FLOAT64
    assert torch.equal(found[3], found[1])


def test_a_loss_draws_new_numbers_for_every_piece():
    drawn = []

    def loss(outputs, positions):
        drawn.append(float(torch.rand(())))
        return outputs.square().sum()

    for dropout in (0.0, 0.3):
        drawn.clear()
        backward_in_pieces(build(dropout=dropout), tokens(), loss, piece_length=10)
        assert len(set(drawn)) == 5


def test_autocast_holds_for_both_runs():
    model = build(dtype=torch.float32)
    found = []
    for function, options in ((backward_at_once, {}), (backward_in_pieces, {"piece_length": 16})):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dtypes = set()
            model.head.register_forward_hook(lambda _module, _inputs, output, seen=dtypes: seen.add(output.dtype))
            function(model, tokens(), TokenCrossEntropy(targets()), **options)
        assert dtypes == {torch.bfloat16}
        found.append(gradients(model))
    assert max(errors(found[1], found[0]).values()) < BFLOAT16
