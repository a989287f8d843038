"""Backpropagation in pieces under data parallelism leaves what DistributedDataParallel leaves on whole sequences."""

import pytest

import longsequence_ranks
import ranks
from tolerances import PIECES_FLOAT64

RANKS = 2


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return ranks.run_ranks(longsequence_ranks.run_all, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scenario", longsequence_ranks.SCENARIOS)
def test_two_ranks(answers, scenario):
    for answer in answers:
        assert "error" not in answer, answer["error"]
        errors = answer["result"][scenario]
        assert errors and max(errors.values()) < PIECES_FLOAT64, errors
