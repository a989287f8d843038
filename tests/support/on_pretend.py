"""Tests of a file run once more on the pretended device, which PyTorch has to know before anything else is computed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

first_process = pytest.mark.skipif("TESTS_ON_PRETEND" in os.environ, reason="this is the process of its own")


def passed_on_pretend(file: str, timeout: int = 280, marker: str = "not slow") -> int:
    """How many tests of a file pass on the pretended device; an `AssertionError` if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", "pretend", "-m", marker]
    done = subprocess.run(
        command,
        env=os.environ | {"TESTS_ON_PRETEND": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found.group(1)) if found else 0
