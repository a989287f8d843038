"""A program that does on purpose what the fuzz harness has to notice."""

import os
import signal
import sys
import time
from functools import cache
from pathlib import Path

from fuzzing import Target

MISDEEDS = (
    "fine",
    "refused",
    "traceback",
    "printed traceback",
    "status",
    "hang",
    "endless loop",
    "memory",
    "killed",
    "left behind",
)


def main(arguments: list[str]) -> int:
    """Do what the first argument names; the second is a folder."""
    match arguments[0]:
        case "refused":
            return 2
        case "traceback":
            raise KeyError("on purpose")
        case "printed traceback":
            print("Traceback (most recent call last):", file=sys.stderr)
            return 2
        case "status":
            return 1
        case "hang":
            time.sleep(600)
        case "endless loop":
            while True:
                pass
        case "memory":
            # Every page is touched.
            assert len(bytearray(b"x") * 2_000_000_000) == 2_000_000_000
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "left behind":
            (Path(arguments[1]) / "out").touch()
            return 2
    return 0


@cache
def targets(material: Path) -> dict[str, Target]:
    """Name -> target; a misdeed is done by every case but the undamaged one."""

    def target(name: str) -> Target:
        return Target(
            name,
            (b"whole",),
            lambda path, place: [name if path.read_bytes() == name.encode() else "fine", str(place)],
            "fuzz_limits",
            found=(name.encode(),),
        )

    return {name: target(name) for name in MISDEEDS}
