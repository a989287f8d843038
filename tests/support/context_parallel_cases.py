"""What each rank of a test of context parallelism does: its stretch against the whole sequence in one process."""

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from mambacore import InputError
from mambacore.layers import BidirectionalStack, ContextEmbedding, LastPooling, MeanPooling, ResidualStack, build_mixer
from mambacore.layers import stack as stack_module
from mambacore.parallel import context_parallel, part_of_mean, stretch_of, sum_gradients
from mambacore.state import detached, map_state, state_tensors
from scan_cases import random_starts
from tolerances import PIECES_FLOAT64, relative_error

BATCH, WIDTH, CLASSES = 2, 6, 3

SELECTIVE = {"name": "selective", "state_size": 3}
WIDE = {"name": "selective", "state_size": 2, "kernel_width": 7}
COMPLEX = {"name": "selective", "state_size": 3, "complex_state": True}
S4D = {"name": "s4d", "state_size": 4}
ATTENTIONS = [{"name": "linear_attention", "heads": 2}, {"name": "retention", "heads": 1}]
MAMBA2 = {"name": "mamba2", "state_size": 3, "head_width": 4}
MAMBA3 = {"name": "mamba3", "state_size": 4, "head_width": 4}
HYBRID = [SELECTIVE, {"name": "s4d", "state_size": 3, "complex_state": False, "convolution": False}, COMPLEX, WIDE]

# Lengths of the ranks' stretches, for 2 and for 4 ranks.
UNEVEN = {2: [97, 53], 4: [60, 1, 3, 86]}
EMPTY_FIRST = {2: [0, 40], 4: [0, 30, 0, 10]}
EMPTY_LAST = {2: [40, 0], 4: [20, 0, 20, 0]}
SHORT = {2: [2, 3], 4: [2, 1, 0, 2]}


@dataclass(frozen=True)
class Case:
    """A model over a sequence that is cut into stretches."""

    mixers: list[dict[str, Any]]
    stretches: dict[int, list[int]]
    dtype: torch.dtype = torch.float64
    share_of_starts: float | None = None
    starts_at_boundaries: bool = False
    frozen: bool = False
    reverse: bool = False
    bidirectional: bool = False
    calls: int = 1
    initial_state: bool = False
    pooling: Callable[[], nn.Module] | None = None


CASES = {
    "selective": Case([SELECTIVE], UNEVEN),
    "selective float32": Case([SELECTIVE], UNEVEN, dtype=torch.float32),
    "complex": Case([COMPLEX], UNEVEN),
    "complex float32": Case([COMPLEX], UNEVEN, dtype=torch.float32),
    "no convolution": Case([SELECTIVE | {"kernel_width": 1}], UNEVEN),
    "s4d by recurrence": Case([S4D | {"convolution": False}], UNEVEN),
    "s4d by convolution": Case([S4D | {"convolution": True}], UNEVEN, initial_state=True),
    "mamba2": Case([MAMBA2] * 2, UNEVEN, share_of_starts=0.03, initial_state=True, calls=2),
    "mamba2 float32": Case([MAMBA2], UNEVEN, dtype=torch.float32),
    "mamba2, first stretch empty": Case([MAMBA2], EMPTY_FIRST, initial_state=True),
    "mamba2 in reverse": Case([MAMBA2], UNEVEN, reverse=True, share_of_starts=0.05, initial_state=True),
    "mamba3": Case([MAMBA3, MAMBA3 | {"rank": 2}], UNEVEN, share_of_starts=0.03, initial_state=True, calls=2),
    "mamba3 float32": Case([MAMBA3], UNEVEN, dtype=torch.float32),
    "mamba3, short stretches": Case([MAMBA3], SHORT, share_of_starts=0.2, initial_state=True),
    "mamba3, last stretch empty": Case([MAMBA3], EMPTY_LAST, initial_state=True),
    "mamba3 in reverse": Case([MAMBA3], UNEVEN, reverse=True, share_of_starts=0.05, initial_state=True),
    "mamba3 in reverse at boundaries": Case(
        [MAMBA3], SHORT, reverse=True, share_of_starts=0.0, starts_at_boundaries=True
    ),
    "linear attention and retention": Case(ATTENTIONS, UNEVEN, initial_state=True),
    "linear attention and retention, records, two calls": Case(ATTENTIONS, UNEVEN, share_of_starts=0.03, calls=2),
    "stack": Case([SELECTIVE] * 3, UNEVEN),
    "hybrid": Case(HYBRID, UNEVEN),
    "hybrid float32": Case(HYBRID, UNEVEN, dtype=torch.float32),
    "kernel wider than stretches": Case([WIDE] * 2, SHORT, initial_state=True),
    "first stretch empty": Case(HYBRID, EMPTY_FIRST, initial_state=True),
    "last stretch empty": Case(HYBRID, EMPTY_LAST),
    "initial state": Case(HYBRID, UNEVEN, initial_state=True),
    "records": Case(HYBRID, UNEVEN, share_of_starts=0.03),
    "records in short stretches": Case([WIDE] * 2, SHORT, share_of_starts=0.3, initial_state=True),
    "records with empty stretches": Case([WIDE], EMPTY_FIRST, share_of_starts=0.1),
    "two calls": Case(HYBRID, UNEVEN, calls=2),
    "reverse": Case([WIDE], UNEVEN, reverse=True, initial_state=True),
    "reverse complex": Case([COMPLEX], EMPTY_LAST, reverse=True),
    "reverse records": Case([WIDE], UNEVEN, reverse=True, share_of_starts=0.2),
    "reverse records in short stretches": Case([WIDE], SHORT, reverse=True, share_of_starts=0.3, initial_state=True),
    "reverse records with empty stretches": Case([WIDE], EMPTY_LAST, reverse=True, share_of_starts=0.9),
    "reverse records at boundaries": Case(
        [WIDE], UNEVEN, reverse=True, share_of_starts=0.0, starts_at_boundaries=True, initial_state=True
    ),
    "reverse records at boundaries of short stretches": Case(
        [WIDE], SHORT, reverse=True, share_of_starts=0.0, starts_at_boundaries=True
    ),
    "gradient of the initial state alone": Case(HYBRID, UNEVEN, frozen=True, initial_state=True),
    "bidirectional records": Case([WIDE] * 2, UNEVEN, bidirectional=True, share_of_starts=0.1),
    "bidirectional, first stretch empty": Case([COMPLEX] * 2, EMPTY_FIRST, bidirectional=True),
    "mean": Case([SELECTIVE] * 2, UNEVEN, pooling=MeanPooling),
    "mean, first stretch empty, two calls": Case([SELECTIVE] * 2, EMPTY_FIRST, pooling=MeanPooling, calls=2),
    "last": Case([SELECTIVE] * 2, UNEVEN, pooling=LastPooling),
    "last, last stretch empty, two calls": Case([SELECTIVE] * 2, EMPTY_LAST, pooling=LastPooling, calls=2),
}


class Model(nn.Module):
    """Layers, and a head for each position or one for what is pooled."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        if case.bidirectional:
            self.mixing = BidirectionalStack(WIDTH, len(case.mixers), case.mixers[0])
        elif case.reverse:
            self.mixing = build_mixer(WIDTH, case.mixers[0])
        else:
            self.mixing = ResidualStack(WIDTH, case.mixers)
        self.pooling = None if case.pooling is None else case.pooling()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, sequence: Tensor, state: Any, sequence_starts: Tensor | None) -> tuple[Tensor, Any]:
        stack_state, pooled = (None, None) if state is None else state
        if self.case.bidirectional:
            mixed = self.mixing(sequence, sequence_starts)
        else:
            options = {"reverse": True} if self.case.reverse else {}
            mixed, stack_state = self.mixing(sequence, stack_state, sequence_starts, **options)
        if self.pooling is not None:
            mixed, pooled = self.pooling(mixed, pooled)
        return self.head(mixed), (stack_state, pooled)


def run(case: Case, stretches: list[int], rank: int | None) -> dict[str, Tensor]:
    """Outputs, final state and all gradients: of this rank's stretches, or of the whole sequence if rank is None."""
    torch.manual_seed(0)
    model = Model(case).to(case.dtype)
    generator = torch.Generator().manual_seed(1)
    length = sum(stretches)
    here = slice(0, length) if rank is None else slice(sum(stretches[:rank]), sum(stretches[: rank + 1]))
    entered = rank is None or rank == (len(stretches) - 1 if case.reverse else 0)
    inputs = [torch.randn(BATCH, length, WIDTH, generator=generator, dtype=torch.float64) for _ in range(case.calls)]
    targets = [torch.randint(CLASSES, (BATCH, length), generator=generator)[:, here] for _ in range(case.calls)]
    model.requires_grad_(not case.frozen)
    inputs = [sequence.to(case.dtype)[:, here].clone().requires_grad_(not case.frozen) for sequence in inputs]
    starts = None if case.share_of_starts is None else random_starts(BATCH, length, case.share_of_starts)
    if starts is not None and case.starts_at_boundaries:
        starts[0, [sum(stretches[:number]) for number in range(1, len(stretches))]] = True
    starts = None if starts is None else starts[:, here]

    state, leaves = None, []
    if case.initial_state:
        _, like = model(
            torch.randn(BATCH, 20, WIDTH, generator=generator, dtype=torch.float64).to(case.dtype), None, None
        )
        # Given where the sequence is entered only: the other ranks have nothing to say about it.
        state = map_state(lambda tensor: tensor.requires_grad_(), detached(like)) if entered else None
        leaves = list(state_tensors(state))

    losses, answers = [], {}
    with contextlib.nullcontext() if rank is None else context_parallel():
        for call in range(case.calls):
            outputs, state = model(inputs[call], state, starts)
            shared = outputs.dim() == 2
            logits, labels = (outputs, targets[call].new_zeros(BATCH)) if shared else (outputs.mT, targets[call])
            values = F.cross_entropy(logits, labels, reduction="none")
            losses.append(values.mean() if rank is None else part_of_mean(values))
            answers[f"outputs {call}"] = outputs
    # Only the last call's loss: what the first one is for comes through the state alone.
    loss = losses[-1]
    for tensor in state_tensors(state):
        loss = loss + tensor.abs().square().sum() / (1 if rank is None else len(stretches))
    loss.backward()
    if rank is not None:
        sum_gradients(model.parameters())
    answers |= {f"state {number}": tensor for number, tensor in enumerate(state_tensors(state))}
    wanting = {f"inputs {call}": sequence for call, sequence in enumerate(inputs)}
    wanting |= {f"initial state {number}": leaf for number, leaf in enumerate(leaves)} | dict(model.named_parameters())
    return answers | {f"gradient of {name}": leaf.grad for name, leaf in wanting.items() if leaf.requires_grad}


def compare(case: Case, rank: int, count: int) -> dict[str, float]:
    """The error of everything that this rank has, relative to the largest value of the whole."""
    stretches = case.stretches[count]
    here = slice(sum(stretches[:rank]), sum(stretches[: rank + 1]))
    found, whole = run(case, stretches, rank), run(case, stretches, None)
    along_the_sequence = ("gradient of inputs", "outputs") if case.pooling is None else ("gradient of inputs",)
    errors = {}
    for name, expected in whole.items():
        if name in found or "initial state" not in name:
            # What lies outside of a stretch is filled with the expected: a stretch may have next to no part in it.
            filled = expected.detach().clone()
            (filled[:, here] if name.startswith(along_the_sequence) else filled)[:] = found[name].detach()
            errors[name] = relative_error(filled, expected)
    return errors


def refusals(rank: int, count: int) -> list[str]:
    """Mistakes that every rank is told of, instead of waiting for the others."""
    sequence = torch.randn(BATCH, 5, WIDTH)
    stack = ResidualStack(WIDTH, ["selective"])

    def gradients_on_the_first_rank_only() -> None:
        with torch.set_grad_enabled(rank == 0):
            stack(sequence)

    mistakes = {
        "attention": lambda: build_mixer(WIDTH, "attention")(sequence),
        "messages of": lambda: stack(sequence[: rank + 1]),
        "some ranks compute gradients": gradients_on_the_first_rank_only,
    }
    problems = []
    for words, mistake in mistakes.items():
        try:
            with context_parallel():
                mistake()
            problems.append(f"no error: {words}")
        except InputError as error:
            if words not in str(error):
                problems.append(str(error))
    return problems


def without_gradients(rank: int, count: int) -> list[str]:
    """Stretches longer than a stack's pieces, and of one position, which a native step takes alone."""
    torch.manual_seed(0)
    stack, problems = ResidualStack(WIDTH, [SELECTIVE] * 2).double(), []
    stack_module.PIECE_POSITIONS_OF_CALLS = 8
    with torch.inference_mode():
        for length in (50, count):
            sequence = torch.randn(BATCH, length, WIDTH, dtype=torch.float64)
            whole, state = stack(sequence)
            here = stretch_of(length, rank, count)
            with context_parallel():
                found, found_state = stack(sequence[:, here])
            pairs = [(found, whole[:, here]), *zip(state_tensors(found_state), state_tensors(state), strict=True)]
            errors = [relative_error(mine, expected) for mine, expected in pairs]
            if max(errors) > PIECES_FLOAT64:
                problems.append(f"length {length}: {errors}")
    return problems


def embedding(rank: int, count: int) -> list[str]:
    """Contexts of symbols that reach into the stretches before."""
    torch.manual_seed(0)
    module, problems = ContextEmbedding(4, (1, 3, 6), WIDTH).double(), []
    for length in (5, 40):
        symbols = torch.randint(-1, 5, (BATCH, length))
        here, handed = stretch_of(length, rank, count), torch.randint(4, (BATCH, 5))
        whole, state = module(symbols, handed)
        with context_parallel():
            found, found_state = module(symbols[:, here], handed)
        if not torch.equal(found, whole[:, here]) or not torch.equal(found_state, state):
            problems.append(f"length {length}")
    return problems


def losses_and_gradients(rank: int, count: int) -> list[str]:
    """Means with weights, gradients that some or all ranks do not have, and several dtypes."""
    torch.manual_seed(0)
    values, weights = torch.randn(3, 11, dtype=torch.float64), torch.rand(3, 11) > 0.3
    here, problems = stretch_of(11, rank, count), []
    part = part_of_mean(values[:, here], weights[:, here])
    distributed.all_reduce(part)
    if relative_error(part, values[weights].mean()) > PIECES_FLOAT64:
        problems.append("weighted mean")
    try:
        part_of_mean(values, torch.zeros_like(values))
        problems.append("a mean of nothing")
    except ValueError:
        pass
    some, none, double, frozen, turning = (
        nn.Parameter(torch.zeros(3, dtype=dtype))
        for dtype in (torch.float32, torch.float32, torch.float64, torch.float32, torch.complex64)
    )
    if rank == count - 1:
        some.grad = torch.arange(3.0)
    double.grad = torch.full((3,), rank + 1.0, dtype=torch.float64)
    turning.grad = torch.full((3,), 1j * (rank + 1))
    sum_gradients([some, none, double, frozen.requires_grad_(False), turning])
    total = count * (count + 1) / 2
    expected = [
        torch.arange(3.0),
        None,
        torch.full((3,), total, dtype=torch.float64),
        None,
        torch.full((3,), 1j * total),
    ]
    for parameter, value in zip((some, none, double, frozen, turning), expected, strict=True):
        if (parameter.grad is None) != (value is None) or (
            value is not None and not torch.equal(parameter.grad, value)
        ):
            problems.append(f"{parameter.grad} instead of {value}")
    return problems


def subgroups(rank: int, count: int) -> list[str]:
    """Two groups at once, each with a sequence of its own; and a group that this process is not in."""
    torch.manual_seed(0)
    stack, problems = ResidualStack(WIDTH, [SELECTIVE] * 2).double(), []
    members = [list(range(count // 2)), list(range(count // 2, count))]
    groups = [distributed.new_group(ranks) for ranks in members]
    mine = int(rank >= count // 2)
    sequence = torch.randn(2, BATCH, 12, WIDTH, dtype=torch.float64)[mine]
    whole, _ = stack(sequence)
    here = stretch_of(12, rank - members[mine][0], count // 2)
    with context_parallel(groups[mine]):
        found, _ = stack(sequence[:, here])
    if relative_error(found, whole[:, here]) > PIECES_FLOAT64:
        problems.append("a group's sequence")
    try:
        with context_parallel(groups[1 - mine]):
            problems.append("a stranger was let in")
    except InputError:
        pass
    return problems


def end_of_the_group(rank: int, count: int) -> list[str]:
    """Results that are kept do not keep the group, whose threads would go on; without it there is no backward."""
    with context_parallel():
        outputs, state = ResidualStack(WIDTH, [SELECTIVE])(torch.randn(BATCH, 5, WIDTH))
    group = weakref.ref(distributed.group.WORLD)
    distributed.destroy_process_group()
    problems = [] if group() is None else ["the group is kept"]
    try:
        (outputs.sum() + sum(tensor.abs().sum() for tensor in state_tensors(state))).backward()
        problems.append("backward without a group")
    except RuntimeError as error:
        if "destroy_process_group" not in str(error):
            problems.append(str(error))
    return problems


CHECKS = (refusals, without_gradients, embedding, losses_and_gradients, subgroups, end_of_the_group)


def compare_all(rank: int, count: int) -> dict[str, Any]:
    """The errors of all cases, and what went wrong in the other checks."""
    answers: dict[str, Any] = {name: compare(case, rank, count) for name, case in CASES.items()}
    return answers | {check.__name__: check(rank, count) for check in CHECKS}


def one_raises(rank: int, count: int) -> None:
    """The last rank fails between two layers, where the others wait for it."""
    with context_parallel():
        sequence, _ = ResidualStack(WIDTH, ["selective"])(torch.randn(BATCH, 5, WIDTH))
        if rank == count - 1:
            raise RuntimeError("this rank is broken")
        ResidualStack(WIDTH, ["selective"])(sequence)
