"""The commands of genomamba and audiomamba, and their building blocks."""

import os

# Idle threads of a team sleep instead of spinning. On shared cores, spinning took half of a training run's CPU time
# (pipelines/benchmarks/shared_machine.py). OpenMP reads this when torch is imported, which is after this package; a
# user's own setting takes precedence.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Verbosity of the commands: `quiet` (only warnings and errors), `verbose`, or anything else for the default. It is an
# environment variable so that processes started by a command inherit it.
VERBOSITY_VARIABLE = "MAMBA_VERBOSITY"

# Limits of options: PyTorch's of seeds, and more threads than any machine has cores for, which would only take memory.
LARGEST_SEED = 2**64 - 1
MOST_THREADS = 4096
