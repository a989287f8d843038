"""Standard streams that are closed, as by `<&-` in a shell or by a scheduler."""

import sys

import pytest

from mambapipelines.cli.program import replace_closed_streams


def test_closed_streams_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    replace_closed_streams()
    assert sys.stdin.buffer.read() == b""
    print("nowhere", file=sys.stderr, flush=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sys.stdout.buffer.raw.write(b"a result")
    assert not sys.stdout.isatty()
