"""A sequence over several ranks equals the sequence in one process: outputs, states, losses and all gradients."""

import datetime
import time

import pytest
import torch
from torch import distributed

import context_parallel_cases as cases
import ranks
from mambacore.layers import MeanPooling, ResidualStack
from mambacore.parallel import active_ranks, context_parallel, part_of_mean, stretch_of, sum_gradients
from tolerances import COMPLEX_FLOAT32, PIECES_FLOAT64


@pytest.fixture(scope="module", params=[2, 4])
def answers(request, tmp_path_factory):
    """What the ranks found, all cases in one start of the processes."""
    found = ranks.run_ranks(cases.compare_all, request.param, tmp_path_factory.mktemp("ranks"))
    broken = [answer["error"] for answer in found if "error" in answer]
    assert not broken, "\n".join(broken)
    return [answer["result"] for answer in found]


@pytest.mark.parametrize("name", cases.CASES)
def test_ranks_equal_one_process_with_all_gradients(answers, name):
    tolerance = COMPLEX_FLOAT32 if cases.CASES[name].dtype == torch.float32 else PIECES_FLOAT64
    for rank, answer in enumerate(answers):
        assert cases.CASES[name].frozen or any(quantity.startswith("gradient of") for quantity in answer[name])
        wrong = {quantity: error for quantity, error in answer[name].items() if not error < tolerance}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize("check", [check.__name__ for check in cases.CHECKS])
def test_other_promises(answers, check):
    assert [answer[check] for answer in answers] == [[]] * len(answers)


def test_a_rank_that_raises_stops_the_others(tmp_path):
    begin = time.monotonic()
    found = ranks.run_ranks(cases.one_raises, 2, tmp_path)
    assert "this rank is broken" in found[1]["error"]
    assert "RuntimeError" in found[0]["error"] or "DistBackendError" in found[0]["error"], found[0]
    assert time.monotonic() - begin < ranks.TEST_SECONDS


def whole_and_in_context():
    torch.manual_seed(0)
    stack, sequence = ResidualStack(6, ["selective", "attention"]), torch.randn(2, 9, 6)
    results = []
    for inside in (False, True):
        stack.zero_grad()
        if inside:
            with context_parallel():
                assert active_ranks() is None
                pooled, _ = MeanPooling()(stack(sequence)[0])
        else:
            pooled, _ = MeanPooling()(stack(sequence)[0])
        part_of_mean(pooled.square()).backward()
        sum_gradients(stack.parameters())
        results.append([pooled, *(parameter.grad.clone() for parameter in stack.parameters())])
    return zip(*results, strict=True)


def test_without_a_process_group_nothing_changes():
    assert all(torch.equal(*pair) for pair in whole_and_in_context())


def test_in_a_group_of_one_nothing_changes(tmp_path):
    distributed.init_process_group(
        "gloo",
        init_method=(tmp_path / "store").as_uri(),
        rank=0,
        world_size=1,
        timeout=datetime.timedelta(seconds=ranks.COLLECTIVE_SECONDS),
    )
    try:
        assert all(torch.equal(*pair) for pair in whole_and_in_context())
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 100])
def test_stretches_follow_each_other_and_differ_by_one_position_at_most(length):
    parts = [list(range(length))[stretch_of(length, rank, 4)] for rank in range(4)]
    assert [position for part in parts for position in part] == list(range(length))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("length", "rank", "count"), [(-1, 0, 2), (5, 2, 2), (5, -1, 2)])
def test_a_stretch_that_cannot_be_is_refused(length, rank, count):
    with pytest.raises(ValueError, match="no stretch"):
        stretch_of(length, rank, count)


def test_layers_compile_without_a_break_outside_of_a_block():
    stack, sequence = ResidualStack(6, ["selective"] * 2), torch.randn(1, 5, 6)
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(sequence)[0], stack(sequence)[0], atol=1e-6)
