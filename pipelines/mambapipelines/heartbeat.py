"""Processes that work together notice when one of them is stopped or hangs, instead of waiting for it.

A thread of every process counts in the store that `torchrun` (or the first process) keeps for all, and looks at what
the others have counted. A process that is stopped counts no longer, however long a collective operation may wait for
it; one that merely works for long still counts.
"""

from __future__ import annotations

import math
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from mambacore.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import Store

TIMEOUT_VARIABLE = "MAMBAPIPELINES_RANK_TIMEOUT"
DEFAULT_TIMEOUT_SECONDS = 300.0
LONGEST_INTERVAL_SECONDS = 5.0
# Added when a process ends as it should.
_FINISHED = 1 << 40


def rank_timeout_seconds() -> float:
    """How long a process may be silent: `MAMBAPIPELINES_RANK_TIMEOUT`, or five minutes.

    Raises:
        InputError: the variable is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    if not text:
        return DEFAULT_TIMEOUT_SECONDS
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise InputError(f"{TIMEOUT_VARIABLE} is {text!r}: give the seconds that a process may be silent.")


class Heartbeat:
    """Counts for this process, and watches the others, while the block runs.

    Args:
        store: shared by all processes; no other thread may use it.
        rank: of this process.
        count: of all processes.
        timeout_seconds: how long another process may be silent.
        leave: whether to print the sentence and end this process, which waits inside a library, when another is silent;
            else `check` raises.
    """

    def __init__(self, store: Store, rank: int, count: int, timeout_seconds: float, leave: bool = False) -> None:
        self._store = store
        self._rank, self._count = rank, count
        self._timeout_seconds = timeout_seconds
        self._leave = leave
        self._interval_seconds = min(LONGEST_INTERVAL_SECONDS, timeout_seconds / 4)
        self._silent: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        # A store outlives the processes that torchrun starts again.
        self._prefix = f"heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def check(self) -> None:
        """Raise if another process is silent.

        Raises:
            InputError: names the process.
        """
        if self._silent:
            raise InputError(self._sentence())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(self._timeout_seconds)

    def _run(self) -> None:
        counts = [-1] * self._count
        heard_seconds = [time.monotonic()] * self._count
        while not self._ended.wait(self._interval_seconds):
            try:
                self._store.add(f"{self._prefix}/{self._rank}", 1)
                now_counts = [self._store.add(f"{self._prefix}/{rank}", 0) for rank in range(self._count)]
            except RuntimeError as error:
                # The first process may keep the store: it is stopped, or has ended, which collectives notice earlier.
                if not self._leave or "timeout" in str(error).lower() or "timed out" in str(error):
                    self._tell([0])
                return
            now = time.monotonic()
            for rank, count in enumerate(now_counts):
                if count != counts[rank] or count >= _FINISHED:
                    counts[rank], heard_seconds[rank] = count, now
            silent = [rank for rank in range(self._count) if now - heard_seconds[rank] > self._timeout_seconds]
            if silent:
                self._tell(silent)
                return
        with suppress(RuntimeError):
            self._store.add(f"{self._prefix}/{self._rank}", _FINISHED)

    def _tell(self, silent: list[int]) -> None:
        self._silent = silent
        if self._leave:
            # The first process that still answers speaks for all, and the others let it.
            if self._rank == min(set(range(self._count)) - set(silent)):
                os.write(2, f"error: {self._sentence()}\n".encode())
            else:
                time.sleep(self._interval_seconds)
            os._exit(2)

    def _sentence(self) -> str:
        names = " and ".join(str(rank + 1) for rank in self._silent)
        return (
            f"process {names} of {self._count} has not answered for {self._timeout_seconds:g} seconds: end all, and "
            f"start them again (a training continues with --resume; {TIMEOUT_VARIABLE} is the longest silence)."
        )
