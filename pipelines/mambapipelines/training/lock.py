"""Locking of a run folder, so that only one process at a time uses it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Final

from mambacore.errors import InputError

LOCK_NAME: Final = "lock"


class RunLock:
    """An exclusive lock on a run folder (flock), which the system releases however the process ends.

    The file `lock` in the folder identifies the process that holds it. File systems without locks are not protected.

    Args:
        folder: of the run; made, with its parents, where it is missing, and removed again if nothing came into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / LOCK_NAME
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def refuse_if_held(self) -> None:
        """Raise if another process holds the lock, without creating or acquiring anything.

        Raises:
            InputError: if so; the message identifies the process.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except OSError:
            return
        try:
            self._lock(descriptor)
        finally:
            os.close(descriptor)

    def acquire(self) -> None:
        """Acquire the lock.

        Raises:
            InputError: if another process holds it; the message identifies the process.
            OSError: if the folder or the file cannot be created.
        """
        missing = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = missing
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(descriptor)
            except InputError:
                os.close(descriptor)
                raise
            # A process that ended in between may have removed the file that was just locked.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self._path.stat()):
                    break
            os.close(descriptor)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "started": started}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lock, and remove the folders created for it if they are empty."""
        if self._descriptor is None:
            return
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        with contextlib.suppress(OSError):
            for place in self._made:
                place.rmdir()

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.folder.parent} is in use by {_holder(descriptor)}: wait until it has ended, or choose another "
                "--output."
            ) from None
        except OSError:
            return


def _holder(descriptor: int) -> str:
    """Describe the process that holds a lock."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(holder['process'])} on {holder['host']}, started {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
