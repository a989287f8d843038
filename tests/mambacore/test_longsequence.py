"""Backpropagation in pieces leaves what the backward pass over the whole sequence leaves, in bounded memory."""

import copy
import json
import subprocess
import sys
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mambacore.errors import InputError
from mambacore.layers import MIXERS, POOLINGS, ContextEmbedding, ResidualStack, build_mixer
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
from tolerances import BFLOAT16, FLOAT32, PIECES_FLOAT64, relative_error

VOCABULARY, WIDTH, CLASSES, BATCH, LENGTH = 7, 16, 5, 2, 45
MIXER_LISTS = {name: [name] * 2 for name in sorted(MIXERS)}
MIXER_LISTS["complex selective"] = [{"name": "selective", "complex_state": True, "state_size": 3}] * 2
MIXER_LISTS["mamba3 of rank 2"] = [{"name": "mamba3", "rank": 2, "state_size": 4, "head_width": 4, "groups": 2}] * 2
MIXER_LISTS["hybrid"] = sorted(MIXERS)


class LanguageModel(nn.Module):
    """Tokens to logits (batch, length, CLASSES); the embedding has a state of its own, of whole numbers."""

    def __init__(self, mixers=("selective", "selective"), dropout=0.0):
        super().__init__()
        self.embedding = ContextEmbedding(VOCABULARY, (1, 2), WIDTH)
        self.stack = ResidualStack(WIDTH, mixers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens, state=None, sequence_starts=None):
        symbols, blocks = (None, None) if state is None else state
        embedded, symbols = self.embedding(tokens, symbols)
        hidden, blocks = self.stack(self.dropout(embedded), blocks, sequence_starts)
        return self.head(hidden), (symbols, blocks)


class Classifier(nn.Module):
    """The same, but it pools by itself: logits (batch, CLASSES) of everything so far."""

    def __init__(self, pooling):
        super().__init__()
        self.model, self.pooling = LanguageModel(), POOLINGS[pooling]()

    def forward(self, tokens, state=None):
        inner, pooled = (None, None) if state is None else state
        outputs, inner = self.model(tokens, inner)
        logits, pooled = self.pooling(outputs, pooled)
        return logits, (inner, pooled)


def build(kind=LanguageModel, *arguments, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return kind(*arguments, **options).to(dtype)


def tokens(length=LENGTH, seed=1):
    return torch.randint(VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def targets(length=LENGTH):
    return torch.randint(CLASSES, (BATCH, length), generator=torch.Generator().manual_seed(2))


LABELS = torch.tensor([3, 1])
LOSSES = {
    "tokens": lambda length: TokenCrossEntropy(targets(length)),
    "mean": lambda length: pooled_cross_entropy(LABELS, pooling="mean"),
    "last": lambda length: pooled_cross_entropy(LABELS, pooling="last"),
}


def gradients(model):
    return {name: None if tensor.grad is None else tensor.grad.clone() for name, tensor in model.named_parameters()}


def errors(found, expected):
    """Relative errors by name; a gradient that only one of them has is infinitely wrong."""
    assert found.keys() == expected.keys()
    return {
        name: float("inf") if (found[name] is None) != (value is None) else relative_error(found[name], value)
        for name, value in expected.items()
        if value is not None or found[name] is not None
    }


def results(function, model, sequence, loss, state=None, **options):
    """Gradients of all parameters, of the sequence and of the state, besides the loss and the final state."""
    model.zero_grad()
    leaves = [sequence, *state_tensors(state)]
    for leaf in leaves:
        leaf.grad = None
    result = function(model, sequence, loss, state=state, **options)
    found = gradients(model) | {f"argument {number}": leaf.grad for number, leaf in enumerate(leaves)}
    found["loss"] = result.loss
    found |= {f"final state {number}": tensor for number, tensor in enumerate(state_tensors(result.state))}
    return {name: None if value is None else value.clone() for name, value in found.items()}


def worst(model, sequence, loss, piece_length, **options):
    expected = results(backward_at_once, model, sequence, loss, **options)
    found = results(backward_in_pieces, model, sequence, loss, piece_length=piece_length, **options)
    assert any(value is not None for name, value in expected.items() if "." in name)
    return max(errors(found, expected).values())


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


class PlainState(NamedTuple):
    total: torch.Tensor
    constant: torch.Tensor
    count: torch.Tensor
    positions: int
    nothing: None


def test_states_of_any_kind_of_member():
    """Tensors that hand on nothing, that pass through, whole numbers, and none at all."""
    weight = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def model(piece, state):
        if state is None:
            state = PlainState(weight * 0, torch.ones(3).double(), torch.zeros(1).long(), 0, None)
        outputs = weight * piece.cumsum(1) + state.total * state.constant.sum() + state.positions + state.count
        total = outputs[:, -1].sum() * weight / 100
        return outputs, PlainState(total, state.constant, state.count + 1, state.positions + piece.shape[1], None)

    sequence = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).double()
    for piece_length in (5, 1):  # the model depends on how it is cut, so the same cuts are chained by hand
        weight.grad, state, total = None, None, 0.0
        for piece in sequence.split(piece_length, dim=1):
            outputs, state = model(piece, state)
            total = total + outputs.square().sum()
        total.backward()
        expected, weight.grad = weight.grad, None
        result = backward_in_pieces(
            model, sequence, lambda outputs, _: outputs.square().sum(), piece_length=piece_length
        )
        assert relative_error(weight.grad, expected) < PIECES_FLOAT64
        assert relative_error(result.loss, total) < PIECES_FLOAT64
        assert (result.state.positions, result.state.nothing) == (12, None)


def test_no_piece_is_longer_than_asked_and_progress_is_told():
    model, lengths, told = build(), [], []
    hook = model.head.register_forward_hook(lambda _module, _inputs, logits: lengths.append(logits.shape[1]))
    loss = TokenCrossEntropy(targets())
    backward_in_pieces(model, tokens(), loss, piece_length=10, progress=lambda done, total: told.append((done, total)))
    hook.remove()
    assert lengths == [10, 10, 10, 10, 5, 10, 10, 10, 10]
    assert told == [(done, 9) for done in range(1, 10)]


def test_borders_hold_on_to_no_piece():
    """The outgoing state of an embedding or a convolution is a view of a whole piece."""
    alive, most = weakref.WeakSet(), 0
    model = build(Classifier, "last")

    def watched(piece, state):
        nonlocal most
        outputs, (inner, pooled) = model(piece, None if state is None else state[:2])
        large = torch.zeros(1000, requires_grad=torch.is_grad_enabled())
        alive.add(large.untyped_storage())
        most = max(most, len(alive))
        return outputs, (inner, pooled, large[:2])

    loss = PooledLoss(lambda logits: logits.square().sum(), pooling=None)
    backward_in_pieces(watched, tokens(), loss, piece_length=3)
    assert most <= 3


def test_mistakes_are_explained():
    model, loss = build(), TokenCrossEntropy(targets())
    with pytest.raises(ValueError, match="piece_length"):
        backward_in_pieces(model, tokens(), loss, piece_length=0)
    with pytest.raises(ValueError, match="at least one position"):
        backward_in_pieces(model, tokens()[:, :0], loss)
    with pytest.raises(ValueError, match="sequence_starts must have shape"):
        backward_in_pieces(model, tokens(), loss, sequence_starts=torch.zeros(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="scalar"):
        backward_in_pieces(model, tokens(), lambda outputs, positions: outputs)
    with pytest.raises(ValueError, match="holds a list"):
        backward_in_pieces(lambda piece, state: (model(piece)[0], [piece]), tokens(), loss, piece_length=16)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference mode"):
        backward_in_pieces(model, tokens(), loss)
    with pytest.raises(InputError, match="no pooling 'median'"):
        pooled_cross_entropy(LABELS, pooling="median")
    with pytest.raises(ValueError, match="to fit the targets"):
        backward_in_pieces(model, tokens(LENGTH + 1), loss)
    with pytest.raises(ValueError, match="not be negative"):
        TokenCrossEntropy(targets(), -torch.ones(BATCH, LENGTH))
    with pytest.raises(ValueError, match="weights must have the shape"):
        TokenCrossEntropy(targets(), torch.ones(BATCH, 1))
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        backward_in_pieces(frozen, tokens(), loss)


def test_models_that_break_the_law_are_refused():
    mixer, sequence = build_mixer(WIDTH, "selective").double(), torch.randn(BATCH, 8, WIDTH).double()
    loss = lambda outputs, positions: outputs.square().sum()  # noqa: E731
    calls = []

    def in_place(piece, state):
        outputs, new = mixer(piece, state)
        if state is not None and not torch.is_grad_enabled():
            state.scan.zero_()
        return outputs, new

    def other_state(piece, state):
        calls.append(1)
        outputs, new = mixer(piece, None)
        return outputs, new if len(calls) < 3 else (new, new.scan)

    with pytest.raises(RuntimeError, match="in place"):
        backward_in_pieces(in_place, sequence, loss, piece_length=2)
    with pytest.raises(RuntimeError, match="another state"):
        backward_in_pieces(other_state, sequence, loss, piece_length=3)


PEAK_OF_LENGTH = """
import json, pathlib, resource, sys
import torch
from mambacore.layers import ResidualStack
from mambacore.longsequence import backward_in_pieces, next_token_cross_entropy

torch.set_num_threads(1)
embedding, stack = torch.nn.Embedding(256, 32), ResidualStack(32, ["selective"])
head = torch.nn.Linear(32, 256)

def model(piece, state):
    hidden, state = stack(embedding(piece), state)
    return head(hidden), state

def peak_bytes():
    # On Linux the resource usage of a process begins with the peak of the one that started it; the status does not.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

peaks = []
for length in map(int, sys.argv[1:]):
    tokens = torch.randint(256, (1, length))
    backward_in_pieces(model, tokens, next_token_cross_entropy(tokens), piece_length=512)
    peaks.append(peak_bytes())
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_length():
    """In one piece the longer one takes 200 MB more, 33 of them for its logits."""
    command = [sys.executable, "-c", PEAK_OF_LENGTH, "512", "2048", "32768"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    _, short, long = json.loads(finished.stdout)
    assert long - short < 24 * 2**20


def test_backward_of_what_autocast_leaves_alone_is_not_lowered():
    """A layer that computes in float32 under autocast has gradients in float32, though pieces are run under it."""
    torch.manual_seed(0)
    layer, sequence = torch.nn.Linear(7, 5), torch.randn(2, 30, 7, requires_grad=True)

    def exact(piece, state):
        with torch.autocast("cpu", enabled=False):
            return layer(piece), state

    with torch.autocast("cpu", torch.bfloat16):
        backward_in_pieces(exact, sequence, lambda outputs, _: outputs.square().sum(), piece_length=10)
    found = {"inputs": sequence.grad, "weight": layer.weight.grad}
    wide, inputs = copy.deepcopy(layer).double(), sequence.detach().double().requires_grad_()
    wide.zero_grad()
    wide(inputs).square().sum().backward()
    assert relative_error(found["inputs"], inputs.grad) < FLOAT32
    assert relative_error(found["weight"], wide.weight.grad) < FLOAT32


def test_an_initial_state_that_hides_tensors_is_refused():
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"a state must be nested tuples .* but holds a dict; make it a tuple"):
        backward_in_pieces(
            lambda piece, state: (weight * piece, None), torch.ones(1, 4, 2), lambda outputs, _: outputs.sum(),
            piece_length=2, state={"hidden": torch.ones(1)},
        )  # fmt: skip
