"""Settings of all tests."""

import os
import re
from pathlib import Path

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
