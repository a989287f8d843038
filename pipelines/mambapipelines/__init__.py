"""The commands of genomamba and audiomamba, and their building blocks."""

import contextlib
import ctypes
import os
import sys

# Idle threads of a team sleep instead of spinning. On shared cores, spinning took half of a training run's CPU time
# (pipelines/benchmarks/shared_machine.py). OpenMP reads this when torch is imported, which is after this package; a
# user's own setting takes precedence.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# glibc gives freed memory back to the system at once, and every training step then asks for the same tensors' pages
# anew: an eighth of a run's CPU time (pipelines/benchmarks/shared_machine.py). So the heap, one for all threads, keeps
# what was freed, but for blocks above 32 MiB. A user's own settings take precedence.
_KEEP_FREED, _OWN_MAPPING, _MOST_HEAPS = -1, -3, -8  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of malloc.h


def _keep_freed_memory() -> bool:
    """Set up the heap of this process; returns whether that was done."""
    if not sys.platform.startswith("linux") or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ
    ):
        return False
    with contextlib.suppress(OSError, AttributeError):  # another C library
        set_option = ctypes.CDLL(None).mallopt
        settings = ((_MOST_HEAPS, 1), (_OWN_MAPPING, 32 << 20), (_KEEP_FREED, 2**31 - 1))
        return all(set_option(option, value) for option, value in settings)
    return False


_keep_freed_memory()

# Verbosity of the commands: `quiet` (only warnings and errors), `verbose`, or anything else for the default. It is an
# environment variable so that processes started by a command inherit it.
VERBOSITY_VARIABLE = "MAMBA_VERBOSITY"

# Limits of options: PyTorch's of seeds, and more threads than any machine has cores for, which would only take memory.
LARGEST_SEED = 2**64 - 1
MOST_THREADS = 4096
