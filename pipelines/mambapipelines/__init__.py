"""The commands of genomamba and audiomamba, and what they are made of."""

import os

# Threads of a team that wait for work sleep instead of spinning. On cores that others use too, spinning took half of
# a training run's processor time (pipelines/benchmarks/shared_machine.py). OpenMP reads this when torch is imported,
# which is after this package; a setting of the user's wins.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# How much commands say: `quiet` (only warnings and errors), `verbose`, or anything else for the usual. It is a variable
# of the environment so that processes started by a command inherit it.
VERBOSITY_VARIABLE = "MAMBA_VERBOSITY"
