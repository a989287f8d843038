"""The shared core of genomamba and audiomamba: selective state space models on CPUs and GPUs.

A causal model here is a function `(sequence, state) -> (sequence, state)`: every operator and layer takes an optional
incoming state and can return the outgoing one, both differentiable.
"""

import os

# Long sequences make large tensors, and on Linux the first touch of their 4 KiB pages takes as long as the scan itself.
# PyTorch reads this once, at its first large allocation; a user's own setting takes precedence.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from mambacore.backends import backends, use_backend
from mambacore.convolution import causal_convolution
from mambacore.errors import InputError
from mambacore.longsequence import backward_in_pieces
from mambacore.scan import selective_scan
from mambacore.ssd import ssd_scan

__all__ = [
    "InputError",
    "backends",
    "backward_in_pieces",
    "causal_convolution",
    "selective_scan",
    "ssd_scan",
    "use_backend",
]
