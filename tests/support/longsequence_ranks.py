"""What each rank of a test of data parallelism does: pieces under DistributedDataParallel against other ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mambacore.layers import ResidualStack
from mambacore.longsequence import (
    average_gradients,
    backward_at_once,
    backward_in_pieces,
    next_token_cross_entropy,
    pooled_cross_entropy,
)
from mambacore.longsequence import distributed as longsequence_distributed
from tolerances import relative_error

VOCABULARY, WIDTH, CLASSES, LENGTH, PIECE_LENGTH = 6, 8, 3, 21, 5
Gradients = dict[str, Tensor | None]


class Model(nn.Module):
    """A language model whose hidden outputs a classifier reads as well; ``spare`` is used by neither."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.stack = ResidualStack(WIDTH, ["selective", "retention"])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.spare = nn.Linear(2, 2)

    def forward(self, tokens: Tensor, state=None):
        hidden, state = self.stack(self.embedding(tokens), state)
        return self.head(hidden), state


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def tokens(seed: int, length: int = LENGTH) -> Tensor:
    """One row, another for every seed."""
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module) -> Gradients:
    return {name: None if tensor.grad is None else tensor.grad.clone() for name, tensor in module.named_parameters()}


def worst(found: Gradients, expected: Gradients) -> float:
    """The largest relative error; infinite where only one side has a gradient."""
    pairs = [(found[name], value) for name, value in expected.items() if value is not None or found[name] is not None]
    assert len(pairs) > 10
    return max(float("inf") if one is None or two is None else relative_error(one, two) for one, two in pairs)


def wrapped(**options) -> DistributedDataParallel:
    return DistributedDataParallel(model(), find_unused_parameters=True, **options)


def language_model(rank: int, count: int) -> dict[str, float]:
    """Against one process with the whole batch, and against DistributedDataParallel on whole sequences."""
    rows = [tokens(seed) for seed in range(count)]
    single = model()
    everything = torch.cat(rows)
    backward_at_once(single, everything, next_token_cross_entropy(everything))
    ordinary = wrapped()
    backward_at_once(ordinary, rows[rank], next_token_cross_entropy(rows[rank]))
    errors = {}
    for name, options in (("plain", {}), ("bucket views", {"gradient_as_bucket_view": True})):
        pieces = wrapped(**options)
        backward_in_pieces(pieces, rows[rank], next_token_cross_entropy(rows[rank]), piece_length=PIECE_LENGTH)
        found = gradients(pieces.module)
        errors[f"{name}, single process"] = worst(found, gradients(single))
        errors[f"{name}, ordinary"] = worst(found, gradients(ordinary.module))
    return errors


def classification(rank: int, count: int) -> dict[str, float]:
    """Mean pooling; the ranks' sequences have different lengths, and so different numbers of pieces."""
    row, labels = tokens(rank, LENGTH + 9 * rank), torch.tensor([rank % CLASSES])
    ordinary, pieces = wrapped(), wrapped()
    backward_at_once(ordinary, row, pooled_cross_entropy(labels))
    backward_in_pieces(pieces, row, pooled_cross_entropy(labels), piece_length=PIECE_LENGTH)
    return {"ordinary": worst(gradients(pieces.module), gradients(ordinary.module))}


def accumulation(rank: int, count: int) -> dict[str, float]:
    """Several calls of which the last one synchronises, against no_sync; then once more on top of that."""
    ordinary, pieces = wrapped(), wrapped()
    errors = {}
    for round_number in range(2):
        rows = [tokens(100 * round_number + 10 * step + rank) for step in range(3)]
        with ordinary.no_sync():
            for row in rows[:-1]:
                backward_at_once(ordinary, row, next_token_cross_entropy(row), scale=1 / 3)
        backward_at_once(ordinary, rows[-1], next_token_cross_entropy(rows[-1]), scale=1 / 3)
        for step, row in enumerate(rows):
            backward_in_pieces(
                pieces,
                row,
                next_token_cross_entropy(row),
                piece_length=PIECE_LENGTH,
                scale=1 / 3,
                synchronise=step == 2,
            )
        errors[f"round {round_number}"] = worst(gradients(pieces.module), gradients(ordinary.module))
    return errors


def mixed_with_ordinary_steps(rank: int, count: int) -> dict[str, float]:
    """Ordinary steps of the same wrapper before and after, as in training that has both kinds of batches."""
    pieces, row = wrapped(), tokens(rank)
    loss = next_token_cross_entropy(row)
    backward_at_once(pieces, row, loss)
    before = gradients(pieces.module)
    pieces.zero_grad()
    backward_in_pieces(pieces, row, loss, piece_length=PIECE_LENGTH)
    between = gradients(pieces.module)
    pieces.zero_grad()
    backward_at_once(pieces, row, loss)
    return {"pieces": worst(between, before), "after": worst(gradients(pieces.module), before)}


def unsynchronised(rank: int, count: int) -> dict[str, float]:
    """Without synchronisation a rank's gradients are its own."""
    pieces, alone, row = wrapped(), model(), tokens(rank)
    loss = next_token_cross_entropy(row)
    backward_in_pieces(pieces, row, loss, piece_length=PIECE_LENGTH, synchronise=False)
    backward_at_once(alone, row, loss)
    return {"alone": worst(gradients(pieces.module), gradients(alone))}


def uneven_use(rank: int, count: int) -> dict[str, float]:
    """Parameters that only some ranks use, or that are to be ignored; exchanged in more than one bucket."""
    module = model()
    names = [name for name, _ in module.named_parameters()]
    for number, parameter in enumerate(module.parameters()):
        if number != rank + 3:
            parameter.grad = torch.full_like(parameter, float(number * (rank + 1)))
    module.spare.zero_grad()
    size, longsequence_distributed.BUCKET_BYTES = longsequence_distributed.BUCKET_BYTES, 1000
    average_gradients(module)
    longsequence_distributed.BUCKET_BYTES = size
    expected: Gradients = {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        present = [other + 1 for other in range(count) if number != other + 3]
        expected[name] = torch.full_like(parameter, float(number * sum(present) / count))
    expected |= {name: None for name in names if name.startswith("spare")}
    errors = {"averages": worst(gradients(module), expected)}

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["head.bias"])
    module.head.bias.grad = torch.full_like(module.head.bias, float(rank))
    average_gradients(DistributedDataParallel(module))
    errors["ignored"] = float((module.head.bias.grad - rank).abs().max())
    return errors


SCENARIOS: dict[str, Callable[[int, int], dict[str, float]]] = {
    scenario.__name__: scenario
    for scenario in (
        language_model, classification, accumulation, mixed_with_ordinary_steps, unsynchronised, uneven_use,
    )
}  # fmt: skip


def run_all(rank: int, count: int) -> dict[str, dict[str, float]]:
    """The errors of every scenario."""
    answers = {}
    for name, scenario in SCENARIOS.items():
        answers[name] = scenario(rank, count)
        distributed.barrier()
    return answers
