"""Backpropagation in pieces takes states of any kind and bounded memory, and says what it cannot do."""

import copy
import json
import subprocess
import sys
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn

from longsequence_models import BATCH, LABELS, LENGTH, WIDTH, Classifier, build, targets, tokens
from mambacore.errors import InputError
from mambacore.layers import build_mixer
from mambacore.longsequence import (
    PooledLoss,
    TokenCrossEntropy,
    backward_in_pieces,
    pooled_cross_entropy,
)
from tolerances import FLOAT32, PIECES_FLOAT64, relative_error


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
