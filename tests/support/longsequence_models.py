"""Models, data and comparisons for tests of backpropagation in pieces (`mambacore.longsequence`)."""

import torch
from torch import nn

from mambacore.layers import MIXERS, POOLINGS, ContextEmbedding, ResidualStack
from mambacore.longsequence import (
    TokenCrossEntropy,
    backward_at_once,
    backward_in_pieces,
    pooled_cross_entropy,
)
from mambacore.state import state_tensors
from tolerances import relative_error

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
