"""The fuzz harness notices what it is there for."""

from pathlib import Path

import pytest

from fuzzing import run_cases


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fine", None),
        ("refused", None),
        ("traceback", "KeyError: 'on purpose'"),
        ("printed traceback", "Traceback"),
        ("status", "status 1"),
        ("hang", "more than 1 seconds"),
        ("endless loop", "more than 1 seconds"),
        ("memory", "GB of memory"),
        ("killed", "the process ended with -9"),
        ("left behind", "['out'] left behind"),
    ],
)
def test_misdeeds_are_noticed(name: str, words: str | None, tmp_path: Path) -> None:
    failures = run_cases("fuzz_limits", tmp_path, name, [0], hang_seconds=1 if words == "more than 1 seconds" else 20)
    assert len(failures) == (words is not None)
    assert words is None or words in failures[0].what


def test_cases_after_a_failure_are_run(tmp_path: Path) -> None:
    """A case that hangs or dies takes neither the cases after it nor their verdicts with it."""
    assert [failure.index for failure in run_cases("fuzz_limits", tmp_path, "killed", [0, 1, 0])] == [0, 0]
