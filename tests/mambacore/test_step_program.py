"""Programs of native steps equal the layers they were made from, and a sequence is the same in any company."""

import pytest
import torch
from torch.nn import functional as F

from mambacore.layers import (
    Mamba2Mixer,
    Mamba3Mixer,
    ResidualBlock,
    RootMeanSquareNorm,
    S4DMixer,
    SelectiveMixer,
    step_program,
)
from mambacore.layers.step_program import COPY, EMBED, StepProgram
from mambacore.models.sampling import sample_tokens
from mambacore.native_library import native_library
from tolerances import COMPLEX_FLOAT32, FLOAT64, relative_error

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without the native library")

CLASSES, LENGTH = 23, 12
MIXERS = {
    "selective": SelectiveMixer,
    "selective, odd sizes": lambda width: SelectiveMixer(width, state_size=5, kernel_width=3, expansion=3, step_rank=3),
    "selective, no history": lambda width: SelectiveMixer(width, state_size=18, kernel_width=1, linear_bias=True),
    "selective, complex": lambda width: SelectiveMixer(width, state_size=7, complex_state=True, convolution_bias=False),
    "mamba2": lambda width: Mamba2Mixer(width, state_size=20),
    "mamba2, groups and limits": lambda width: Mamba2Mixer(
        width,
        state_size=5,
        head_width=1,
        expansion=2,
        groups=2,
        kernel_width=3,
        linear_bias=True,
        step_limits=(0.01, 0.05),
    ),
    "mamba3": lambda width: Mamba3Mixer(width, state_size=20),
    "mamba3 of rank 3": lambda width: Mamba3Mixer(
        width, state_size=12, head_width=width, groups=2, rank=3, output_norm=True, rotated_share=1.0
    ),
    "mamba3, real": lambda width: Mamba3Mixer(width, state_size=5, rotated_share=0, trapezoidal=False),
    "s4d": lambda width: S4DMixer(width, state_size=6),
    "s4d, real": lambda width: S4DMixer(width, state_size=5, complex_state=False, sampling_rate_factor=2.0),
}
DTYPES = {"float64": (torch.float64, FLOAT64), "float32": (torch.float32, COMPLEX_FLOAT32)}


def layers_of(mixer, width, dtype):
    torch.manual_seed(0)
    block = ResidualBlock(width, MIXERS[mixer](width))
    embedding, head = torch.nn.Embedding(CLASSES, width), torch.nn.Linear(width, CLASSES)
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 1.5)
        head.weight.mul_(5)
        if isinstance(
            block.mixer, Mamba2Mixer | Mamba3Mixer
        ):  # whose own norms and weights of ranks start as constants
            for parameter in block.mixer.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter))
    return tuple(layer.to(dtype) for layer in (embedding, block, head))


def program_of(embedding, block, head, dtype):
    program = StepProgram(dtype)
    width = embedding.weight.shape[1]
    hidden, logits = program.place(width), program.place(CLASSES)
    program.add(EMBED, [embedding.weight], target=hidden, width=width)
    state = program.block(block, hidden)
    program.linear(head, hidden, logits)
    return program, logits, state


def tokens(batch, length=LENGTH, seed=3):
    return torch.randint(CLASSES, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("before", [0, 5], ids=["from the start", "going on"])
@pytest.mark.parametrize("width", [16, 21])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_equal_the_layers(mixer, dtype, tolerance, width, before):
    embedding, block, head = layers_of(mixer, width, dtype)
    program, logits, place = program_of(embedding, block, head, dtype)
    known, given = tokens(3, before + 1), tokens(3, seed=4)
    with torch.no_grad():
        whole = torch.cat([known, given], dim=1)
        expected = torch.log_softmax(head(block(embedding(whole))[0]), -1)[:, before:-1].gather(2, given.unsqueeze(2))
        memory = torch.zeros(3, program.memory_size, dtype=dtype)
        if before:
            program.write_state(memory, place, block(embedding(known[:, :-1]))[1])
    drawn, found = program.run(
        native_library(), memory, known[:, -1].clone(), position=before, logits=logits, classes=CLASSES, given=given
    )
    assert torch.equal(drawn, given)
    assert relative_error(found, expected.squeeze(2)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("mixer", [name for name in MIXERS if not name.startswith("s4d")])
def test_a_program_steps_as_the_registered_operator_does(mixer, dtype, tolerance):
    width, known, given = 21, tokens(5, 1), tokens(5, 6, seed=4)
    embedding, block, head = layers_of(mixer, width, dtype)
    program, logits, place = program_of(embedding, block, head, dtype)
    memory = torch.zeros(5, program.memory_size, dtype=dtype)
    program.run(native_library(), memory, known[:, 0].clone(), position=0, logits=logits, classes=CLASSES, given=given)
    state = None
    with torch.no_grad():
        for column in torch.cat([known, given[:, :-1]], dim=1).split(1, dim=1):
            outputs, state = block(
                embedding(column), state
            )  # by the operator, as test_step.py and test_dual_step.py check
    assert relative_error(memory[:, :width], outputs.squeeze(1)) < tolerance
    for found, expected in zip(program.read_state(memory, place, block.mixer), state, strict=True):
        assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.values(), ids=DTYPES.keys())
def test_feed_forward_norm_and_copy_equal_the_layers(dtype, tolerance):
    width = 19
    torch.manual_seed(0)
    embedding, norm, head = (
        torch.nn.Embedding(CLASSES, width),
        RootMeanSquareNorm(width),
        torch.nn.Linear(width, CLASSES),
    )
    expand, contract = torch.nn.Linear(width, 45), torch.nn.Linear(45, width)
    for layer in (embedding, norm, head, expand, contract):
        layer.to(dtype)
    program = StepProgram(dtype)
    hidden, other, logits = program.place(width), program.place(width), program.place(CLASSES)
    program.add(EMBED, [embedding.weight], target=other, width=width)
    program.add(COPY, source=other, target=hidden, width=width)
    program.feed_forward(norm, expand, contract, hidden)
    program.norm(norm, hidden, hidden)
    program.linear(head, hidden, logits)
    read, given = tokens(2, 1), tokens(2, 1, seed=4)
    with torch.no_grad():
        sequence = embedding(read)
        expected = head(norm(sequence + contract(F.gelu(expand(norm(sequence))))))
    memory = torch.zeros(2, program.memory_size, dtype=dtype)
    program.run(native_library(), memory, read[:, 0].clone(), position=0, logits=logits, classes=CLASSES, given=given)
    assert relative_error(memory[:, logits : logits + CLASSES], expected.squeeze(1)) < tolerance


def draw(batch, threads, instruction_set=None, **options):
    program, logits, _ = program_of(*layers_of("selective", 16, torch.float32), torch.float32)
    uniforms = torch.rand(16, LENGTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[:batch]
    before, library = torch.get_num_threads(), native_library()
    torch.set_num_threads(threads)
    try:
        return program.run(
            library, torch.zeros(batch, program.memory_size), torch.zeros(batch, dtype=torch.int64), position=0,
            logits=logits, classes=CLASSES, uniforms=uniforms, **options,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


def test_a_sequence_is_the_same_in_any_batch_and_on_any_number_of_threads():
    drawn, likelihoods = draw(16, 1)
    assert drawn.unique().numel() > 5
    for batch in (1, 2, 3, 5, 7, 16):
        for threads in (1, 3):
            found, found_likelihoods = draw(batch, threads)
            assert torch.equal(found, drawn[:batch]) and torch.equal(found_likelihoods, likelihoods[:batch])


@pytest.mark.parametrize("guidance", [None, 1.5])
@pytest.mark.parametrize("layers", [3, 9], ids=["two caches hold the weights", "two caches do not"])
def test_two_threads_that_relay_halves_of_a_stack_change_nothing(layers, guidance, monkeypatch):
    """A stack without poolings is split by its layers where the caches of two cores hold it."""
    width, library = 128, native_library()
    torch.manual_seed(0)
    program, embedding, head = (
        StepProgram(torch.float32),
        torch.nn.Embedding(CLASSES, width),
        torch.nn.Linear(width, CLASSES),
    )
    hidden, logits = program.place(width), program.place(CLASSES)
    program.add(EMBED, [embedding.weight], target=hidden, width=width)
    for _ in range(layers):
        program.block(ResidualBlock(width, SelectiveMixer(width)), hidden)
    program.linear(head, hidden, logits)
    before = torch.get_num_threads()

    def found(batch, threads):
        rows = batch * (1 if guidance is None else 2)
        memory, read = torch.zeros(rows, program.memory_size), torch.arange(rows) % CLASSES
        uniforms = torch.rand(7, LENGTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[:batch]
        monkeypatch.setattr(step_program, "processors", lambda: threads)
        torch.set_num_threads(threads)
        try:
            drawn, likelihoods = program.run(
                library, memory, read, position=0, logits=logits, classes=CLASSES, uniforms=uniforms, guidance=guidance
            )
        finally:
            torch.set_num_threads(before)
        return drawn, likelihoods, memory, read

    for batch in (2, 5, 7):
        for one, two in zip(found(batch, 1), found(batch, 2), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pairs", [1, 2, 5, 33, 70])
def test_pairs_follow_the_tokens_of_their_mixed_logits(pairs, threads):
    """In one call as step by step, the logits mixed in between; more pairs than go through the layers at once."""
    guidance, dtype = 2.5, torch.float64
    program, logits, place = program_of(*layers_of("selective", 16, dtype), dtype)
    uniforms = torch.rand(pairs, LENGTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    start = torch.zeros(2 * pairs, program.memory_size, dtype=dtype)
    # The two of a pair differ by what came before.
    start[:, place : place + 16] = torch.randn(2 * pairs, 16, generator=torch.Generator().manual_seed(6), dtype=dtype)
    options = {"logits": logits, "classes": CLASSES}
    before, memory, read = torch.get_num_threads(), start.clone(), torch.zeros(2 * pairs, dtype=torch.int64)
    torch.set_num_threads(threads)
    try:
        drawn, found = program.run(
            native_library(), memory, read, position=0, uniforms=uniforms, guidance=guidance, **options
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(read, drawn[:, -1].repeat(2))
    by_step, read = start.clone(), torch.zeros(2 * pairs, dtype=torch.int64)
    for step in range(LENGTH):
        program.run(native_library(), by_step, read.clone(), position=step, given=read.unsqueeze(1).clone(), **options)
        first, second = by_step[:, logits : logits + CLASSES].chunk(2)
        mixed = second + guidance * (first - second)
        assert torch.equal(sample_tokens(mixed, uniforms=uniforms[:, step]), drawn[:, step])
        expected = torch.log_softmax(first, -1).gather(1, drawn[:, step : step + 1]).squeeze(1)
        assert relative_error(found[:, step], expected) < FLOAT64
        read = drawn[:, step].repeat(2)
    assert torch.equal(by_step, memory)
    assert not torch.equal(first, second)


def test_pairs_need_two_memories_for_each_row_of_uniforms():
    program, logits, _ = program_of(*layers_of("selective", 16, torch.float32), torch.float32)
    with pytest.raises(ValueError, match="memory must have shape"):
        program.run(
            native_library(), torch.zeros(3, program.memory_size), torch.zeros(3, dtype=torch.int64), position=0,
            logits=logits, classes=CLASSES, uniforms=torch.rand(3, 1, dtype=torch.float64), guidance=2.0,
        )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_p": 0.4}, {"top_p": 1e-9}])
def test_tokens_are_drawn_by_their_cumulative_probabilities(options):
    """One step from the same token with uniform numbers on a grid: counts are the probabilities."""
    grid = 4000
    embedding, block, head = layers_of("selective", 16, torch.float64)
    program, logits, _ = program_of(embedding, block, head, torch.float64)
    uniforms = ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid).unsqueeze(1)
    drawn, _ = program.run(
        native_library(), torch.zeros(grid, program.memory_size, dtype=torch.float64),
        torch.zeros(grid, dtype=torch.int64), position=0, logits=logits, classes=CLASSES, uniforms=uniforms, **options,
    )  # fmt: skip
    with torch.no_grad():
        scores = head(block(embedding(torch.zeros(1, 1, dtype=torch.int64)))[0])[0, 0]
    temperature, top_p = options.get("temperature", 1.0), options.get("top_p", 1.0)
    expected = torch.softmax(scores / max(temperature, 1e-9), -1)
    ordered, order = expected.sort(descending=True)
    expected = torch.zeros_like(expected).scatter(0, order, ordered * (ordered.cumsum(0) - ordered < top_p))
    expected = expected / expected.sum()
    counts = torch.bincount(drawn[:, 0], minlength=CLASSES) / grid
    assert (counts - expected).abs().max() < 1.5 / grid
    assert torch.equal(drawn[:, 0], drawn[:, 0].sort().values)  # in the order of the classes


MISTAKES = {
    "unknown token": (
        {"tokens": torch.tensor([0, CLASSES])},
        ValueError,
        "tokens must lie from 0 to 22 but lie from 0",
    ),
    "token out of the world": ({"tokens": torch.tensor([0, 10**10])}, ValueError, "tokens must lie from 0 to 22"),
    "negative token": ({"given": torch.tensor([[0], [-1]])}, ValueError, "given must lie from 0 to 22 but lie from -1"),
    "unknown given token": ({"given": torch.tensor([[0], [10**10]])}, ValueError, "given must lie from 0 to 22"),
    "another batch": ({"tokens": torch.zeros(3, dtype=torch.int64)}, ValueError, r"tokens must have shape \(2,\)"),
    "memory of another program": ({"memory": torch.zeros(2, 16)}, ValueError, "memory must have shape"),
    "memory in another dtype": ({"memory": 64}, TypeError, "memory must be torch.float32 but is torch.float64"),
    "tokens in another dtype": ({"tokens": torch.zeros(2)}, TypeError, "tokens must be torch.int64"),
    "memory in columns": ({"memory": "columns"}, ValueError, "memory is written in place and must be contiguous"),
    "memory on another device": ({"memory": "meta"}, ValueError, "memory must be on the device"),
    "negative position": ({"position": -1}, ValueError, "position must not be negative"),
    "logits out of the memory": ({"logits": 10**9}, ValueError, "logits must be the place of 23 numbers"),
    "more classes than tokens": ({"classes": CLASSES + 1}, ValueError, "as many as the embedding has tokens"),
    "nothing to choose by": ({"given": None}, ValueError, "uniforms or given must be there"),
    "uniform 1": ({"given": None, "uniforms": torch.ones(2, 1, dtype=torch.float64)}, ValueError, "to below 1"),
}


@pytest.mark.parametrize(("changed", "error", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_does_not_fit_the_program_is_refused(changed, error, message):
    program, logits, _ = program_of(*layers_of("selective", 16, torch.float32), torch.float32)
    memory = {
        64: torch.zeros(2, program.memory_size, dtype=torch.float64),
        "columns": torch.zeros(program.memory_size, 2).t(),
        "meta": torch.zeros(2, program.memory_size, device="meta"),
    }
    arguments = {
        "memory": torch.zeros(2, program.memory_size), "tokens": torch.zeros(2, dtype=torch.int64), "position": 0,
        "logits": logits, "classes": CLASSES, "given": torch.zeros(2, 1, dtype=torch.int64),
    } | changed  # fmt: skip
    if not isinstance(arguments["memory"], torch.Tensor):
        arguments["memory"] = memory[arguments["memory"]]
    with pytest.raises(error, match=message):
        program.run(native_library(), **arguments)


def test_a_program_is_a_copy_of_what_it_was_made_from():
    layers = layers_of("selective", 16, torch.float32)
    program, logits, _ = program_of(*layers, torch.float32)

    def found():
        memory, given = torch.zeros(1, program.memory_size), torch.zeros(1, 3, dtype=torch.int64)
        return program.run(
            native_library(), memory, given[:, 0].clone(), position=0, logits=logits, classes=CLASSES, given=given
        )[1]

    before = found()
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.mul_(1.5)
    assert torch.equal(found(), before)
