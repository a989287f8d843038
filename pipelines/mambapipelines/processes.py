"""Endings of processes: signals unwind, so that what is temporary is removed, and children end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by `SystemExit`, so that temporary folders and locks are removed.

    Only the first one counts: another must not interrupt the cleaning up. Signals that are handled or ignored already
    (`nohup`) are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]

    def leave(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def end_with_parent(folder: Path | None = None) -> None:
    """Let this child process of `multiprocessing` end when its parent is gone, killed too.

    A parent that is killed can remove nothing; the child does it instead.

    Args:
        folder: of temporary files, removed then.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="end with parent").start()
