"""Damaged inputs of the audio commands: a sentence or a result, never an exception, a hang or a full memory."""

import os
from pathlib import Path

import pytest

import fuzz_audio
from fuzzing import run_case, run_cases

NAMES = (
    "clip to continue",
    "clip to train on",
    "list of a split",
    "configuration of a waveform model",
    "weights of a waveform model",
)
SLOW_TRAINING = ("clip to train on", "list of a split")
SLOW_CASES = int(os.environ.get("FUZZ_CASES", "870"))
FAST_CASES = 6


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz_audio.prepare(tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_tried(material: Path) -> None:
    assert set(fuzz_audio.targets(material)) == set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW_TRAINING])
def test_some_damaged_inputs(name: str, material: Path) -> None:
    target = fuzz_audio.targets(material)[name]
    failures = [f"case {index}: {what}" for index in range(FAST_CASES) if (what := run_case(target, index))]
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_inputs(name: str, material: Path) -> None:
    failures = run_cases("fuzz_audio", material, name, range(SLOW_CASES))
    assert not failures, f"{len(failures)} of {SLOW_CASES}:\n" + "\n".join(map(str, failures[:5]))
