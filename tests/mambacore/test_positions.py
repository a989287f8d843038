"""What goes through a model at once without gradients: as much as a device's memory takes, with equal results."""

import pytest
import torch

from mambacore import devices
from mambacore.devices import POSITIONS_WITHOUT_GRADIENTS, halve_positions, in_fitting_batches, positions_at_once
from mambacore.errors import InputError
from mambacore.layers import ResidualStack
from tolerances import PIECES_FLOAT32, relative_error

CPU, OTHER = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(devices, "_fitting", {})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_positions_are_halved_until_nothing_is_left():
    assert positions_at_once(CPU, 4096) == 4096 and positions_at_once(OTHER, 4096) == POSITIONS_WITHOUT_GRADIENTS
    halve_positions(OTHER)
    assert positions_at_once(OTHER, 4096) == POSITIONS_WITHOUT_GRADIENTS // 2
    with pytest.raises(InputError, match=r"the memory of cuda:0 is too small for 262,144 positions at once: give"):
        halve_positions(OTHER, at_least=POSITIONS_WITHOUT_GRADIENTS)
    with pytest.raises(InputError, match="too small for 1,024 positions"):
        for _ in range(20):
            halve_positions(OTHER)


def test_batches_that_do_not_fit_are_halved():
    tried = []

    def compute(rows):
        tried.append(rows.stop - rows.start)
        if tried[-1] > 20:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return list(range(rows.start, rows.stop))

    found = in_fitting_batches(compute, 70, POSITIONS_WITHOUT_GRADIENTS // 64, OTHER, 0)
    assert [row for batch in found for row in batch] == list(range(70))
    assert tried == [64, 32, 16, 16, 16, 16, 6]  # and what fits is known from then on
    assert len(in_fitting_batches(compute, 30, POSITIONS_WITHOUT_GRADIENTS // 64, OTHER, 0)) == 2


def test_a_stack_halves_its_pieces_and_computes_the_same(monkeypatch):
    torch.manual_seed(0)
    stack, sequence = ResidualStack(8, ["selective", "s4d"]), torch.randn(2, 300, 8)
    starts = torch.rand(2, 300) < 0.02
    with torch.no_grad():
        expected, expected_state = stack(sequence, None, starts)
        # As on a device, whose memory takes 200 positions at most.
        monkeypatch.setattr("mambacore.layers.stack.PIECE_POSITIONS", 100)
        monkeypatch.setattr("mambacore.layers.stack.positions_at_once", lambda *_: positions_at_once(OTHER, 0))
        monkeypatch.setattr("mambacore.layers.stack.halve_positions", lambda _, at_least: halve_positions(OTHER, 1))
        monkeypatch.setattr(devices, "_fitting", {OTHER: 4096})
        walk, lengths = stack._walk, []

        def in_small_memory(piece, state, marks):
            lengths.append(piece.shape[1])
            if piece.numel() > 2 * 200 * 8:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            return walk(piece, state, marks)

        monkeypatch.setattr(devices, "SMALLEST_POSITIONS", 1)
        monkeypatch.setattr(stack, "_walk", in_small_memory)
        found, state = stack(sequence, None, starts)
    assert lengths[-3:] == [128, 128, 44]
    assert relative_error(found, expected) < PIECES_FLOAT32
    assert relative_error(state[0].scan, expected_state[0].scan) < PIECES_FLOAT32
