"""Many positions of a selective block in one call of the native library are what its operators compute."""

import pytest
import torch

from mambacore import use_backend
from mambacore.layers import ResidualBlock, ResidualStack, SelectiveMixer, selective
from mambacore.layers.selective_block import run_block
from mambacore.native_library import native_library
from tolerances import FLOAT32, ONE_BFLOAT16_LAYER, relative_error

WIDTH = 20
OPTIONS = {
    "defaults": {},
    "odd sizes": {"state_size": 5, "kernel_width": 3, "step_rank": 3, "linear_bias": True},
    "no history": {"state_size": 3, "kernel_width": 1, "convolution_bias": False, "expansion": 1},
}


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the sequences that the library has computed, with one thread."""
    shapes, before = [], torch.get_num_threads()

    def counted(norm, mixer, sequence, state):
        found = run_block(norm, mixer, sequence, state)
        if found is not None:
            shapes.append(tuple(sequence.shape))
        return found

    monkeypatch.setattr(selective, "run_block", counted)
    torch.set_num_threads(1)
    yield shapes
    torch.set_num_threads(before)


def block_of(width=WIDTH, **options):
    torch.manual_seed(0)
    return ResidualBlock(width, SelectiveMixer(width, **options)).eval()


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state_of(block, batch):
    mixer = block.mixer
    history = mixer.convolution_weight.shape[1] - 1
    return selective.SelectiveState(
        normal(batch, history, mixer.inner_width), normal(batch, mixer.inner_width, mixer.state_size, seed=2)
    )


def by_operators(block, sequence, state):
    mixed, state = block.mixer(block.norm(sequence), state)
    return sequence + mixed, state


def root_mean_square_error(found, expected):
    return float((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [2, 33, 100])
@torch.no_grad()
def test_every_instruction_set_equals_the_operators(instruction_set, options, length, calls):
    native = native_library()
    before = native.instruction_set
    try:
        native.use_instruction_set(instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    block = block_of(**OPTIONS[options])
    sequence, state = normal(3, length, WIDTH), state_of(block, 3)
    try:
        for incoming in (None, state):
            expected, outgoing = by_operators(block, sequence, incoming)
            found, after = block(sequence, incoming)
            assert relative_error(found, expected) < FLOAT32
            assert relative_error(after.scan, outgoing.scan) < FLOAT32
            assert relative_error(after.convolution, outgoing.convolution) < FLOAT32
            with torch.autocast("cpu", torch.bfloat16):
                narrow, _ = block(sequence, incoming)
            assert narrow.dtype == torch.float32
            # What the block adds; rounded to bfloat16 before each product, and nowhere else.
            assert root_mean_square_error(narrow - sequence, (expected - sequence).double()) < ONE_BFLOAT16_LAYER
    finally:
        native.use_instruction_set(before)
    assert len(calls) == 4


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_pieces_and_rows_of_a_batch_are_the_whole_to_the_bit(autocast, calls):
    stack, sequence = ResidualStack(WIDTH, ["selective"] * 2).eval(), normal(4, 90, WIDTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, last = stack(sequence)
        state, begin = None, 0
        for end in (2, 35, 36, 37, 90):
            if end - begin > 1:
                piece, state = stack(sequence[:, begin:end], state)
                assert torch.equal(piece, expected[:, begin:end])
                begin = end
        assert torch.equal(stack(sequence[2:3])[0], expected[2:3])
    for one, other in zip(state, last, strict=True):
        assert torch.equal(one.scan, other.scan) and torch.equal(one.convolution, other.convolution)
    assert len(calls) > 8


@torch.no_grad()
def test_threads_take_whole_sequences_and_change_nothing(calls):
    block, sequence = block_of(), normal(9, 40, WIDTH)
    expected, _ = block(sequence)
    spread = torch.stack([sequence, -sequence], dim=1)[:, 0]  # other strides
    torch.set_num_threads(3)
    assert torch.equal(block(spread)[0], expected)
    assert torch.equal(block(sequence[:2])[0], expected[:2])
    assert len(calls) == 3
    # One sequence would keep one thread of three busy, so the operators share it out.
    assert relative_error(block(sequence[:1])[0], expected[:1]) < FLOAT32
    assert len(calls) == 3


@torch.no_grad()
def test_what_is_not_finite_reaches_no_other_sequence_and_no_earlier_position(calls):
    block, sequence = block_of(state_size=3), normal(3, 70, WIDTH)
    expected, _ = block(sequence)
    sequence[1, 40, 3] = float("inf")
    found, _ = block(sequence)
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and torch.equal(found[1, :40], expected[1, :40])
    assert not found[1, 40:].isfinite().any()
    assert len(calls) == 2


def other_state(block):
    return state_of(block, 2)._replace(scan=normal(2, 1, 1))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda block: block.double(), {}),
        (lambda block: block.mixer.step_projection.register_forward_hook(lambda *_: None), {}),
        (lambda block: block.requires_grad_(False), {"complex_state": True}),
    ],
    ids=["float64", "hook", "complex states"],
)
@torch.no_grad()
def test_other_blocks_go_by_the_operators(change, options, calls):
    block = block_of(**options)
    change(block)
    sequence = normal(2, 9, WIDTH).to(block.norm.weight.dtype)
    assert torch.equal(block(sequence)[0], by_operators(block, sequence, None)[0])
    assert calls == []


def test_gradients_backends_starts_of_records_and_wrong_states_go_by_the_operators(calls):
    block, sequence = block_of(), normal(2, 9, WIDTH)
    block(sequence)[0].sum().backward()
    assert block.norm.weight.grad is not None
    with torch.no_grad():
        starts = torch.zeros(2, 9, dtype=torch.bool)
        starts[:, 4] = True
        block(sequence, None, starts)
        with use_backend("torch"):
            block(sequence)
        with torch.autocast("cpu", torch.float16):
            block(sequence)
        with pytest.raises(ValueError, match="must have shape"):
            block(sequence, other_state(block))
        assert block(sequence[:0])[0].shape == (0, 9, WIDTH)
        assert calls == []
        block(sequence)
    assert calls == [(2, 9, WIDTH)]
