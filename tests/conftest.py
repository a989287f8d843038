"""Settings of all tests."""

import os
import re
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# Under nohup SIGHUP is ignored, and so it would be by the commands that the tests stop with it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

WITHOUT_AUDIO = "TESTS_WITHOUT_AUDIO"
"""Environment variable of `make test-torch`: leave out test files that import packages of the extra `audio`."""

AUDIO_IMPORT = re.compile(
    r"^\s*(?:from|import) (?:audiomamba|soundfile|torchaudio|waveform_runs|fuzz_audio)\b", re.MULTILINE
)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out a file of tests of audio where that was asked for."""
    if WITHOUT_AUDIO not in os.environ or collection_path.suffix != ".py":
        return None
    return True if AUDIO_IMPORT.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_report_header() -> str | None:
    """Say so when tests are left out."""
    return f"{WITHOUT_AUDIO}: tests of audio are left out" if WITHOUT_AUDIO in os.environ else None


ON_PRETEND = "TESTS_ON_PRETEND"
"""Environment variable of processes whose tests run on the pretended device.

PyTorch has to know a device before the first backward pass of a process, and other tests are not to know it.
"""

if ON_PRETEND in os.environ:
    import pretend_device
    import pretend_process  # noqa: F401 - before modules that are patched


@pytest.fixture(params=["cpu", "pretend", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device to compute on: the CPU, one that refuses what CUDA refuses (`pretend_device`), and a GPU if there is.

    A file of tests that takes it runs itself once more, with `TESTS_ON_PRETEND`, in a process of its own.
    """
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if request.param == "cpu":
        return torch.device("cpu")
    if request.param == "pretend":
        if ON_PRETEND not in os.environ:
            pytest.skip("the pretended device has a process of its own")
        monkeypatch.setattr(torch, "tensor", pretend_device.tensor_from_values)
    return torch.device(request.param, 0)
