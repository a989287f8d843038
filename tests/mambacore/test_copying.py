"""Every mixer learns the copy task from one configuration that differs in one word."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mambacore.layers import MIXERS

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture(scope="module")
def copying():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        specification = importlib.util.spec_from_file_location("copying", BENCHMARKS / "copying.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def configuration():
    whole = yaml.safe_load((BENCHMARKS / "copying.yaml").read_text())
    whole["task"] |= {"length": 6, "symbols": 2, "kinds": 4}
    whole["model"] |= {"width": 32}
    whole["training"] |= {"steps": 120, "batch": 32, "learning_rate": 0.01}
    return whole


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer_learns_to_copy(mixer, copying, configuration):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = configuration["model"] | {"mixer": mixer}
        first_loss, accuracy, _ = copying.train(configuration | {"model": model})
    finally:
        torch.set_num_threads(before)
    assert 1.0 < first_loss < 3.0  # about log(4): nothing is known in the beginning
    assert accuracy > 0.9  # chance is 0.25


def test_rows_are_functions_of_seed_and_number_and_hold_what_is_asked_for(copying):
    task = {"selective": True, "length": 9, "symbols": 3, "kinds": 5}
    tokens, symbols = copying.copying_rows(task, 4, seed=1, first=0)
    again, _ = copying.copying_rows(task, 4, seed=1, first=0)
    other, _ = copying.copying_rows(task, 4, seed=1, first=4)
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)
    for row, wanted in zip(tokens, symbols, strict=True):
        assert row[:9][row[:9] < 5].tolist() == wanted.tolist()
        assert (row[9:] == 6).all()
