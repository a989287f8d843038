"""Initial state matrices of state space models.

S4D-Real, S4D-Lin and S4D-Inv are those of Gu, Gupta, Goel & Ré (arXiv 2206.11893, section 4); the others are the rows
of the Mamba paper's ablation (arXiv 2312.00752, table 8). Each element of a complex state stands for itself and its
conjugate, which is not stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

REAL_STARTS = ("s4d-real", "constant", "random")
COMPLEX_STARTS = ("s4d-lin", "s4d-inv", "constant", "random")


def initial_state_matrix(name: str, channels: int, state_size: int, complex_state: bool) -> Tensor:
    """Return an initial state matrix (channels, state_size), float32 or complex64.

    Args:
        name: with n = 0, 1, ... over the N states: `s4d-real` -(n + 1); `s4d-lin` -1/2 + i pi n; `s4d-inv`
            -1/2 + i N / pi (N / (2 n + 1) - 1); `constant` -1/2, for a complex state with the frequency 1;
            `random` -exp(N(0, 1)), for a complex state with frequencies pi N times a uniform number.
        channels: rows.
        state_size: N.
        complex_state: whether the state is complex.

    Raises:
        ValueError: if the name is unknown or not for this kind of state.
    """
    known = COMPLEX_STARTS if complex_state else REAL_STARTS
    if name not in known:
        kind = "complex" if complex_state else "real"
        raise ValueError(f"a {kind} state cannot be initialised with {name!r}; choose {', '.join(known)}")
    number = torch.arange(state_size, dtype=torch.float32)
    rate, frequency = torch.full((channels, state_size), 0.5), torch.ones(channels, state_size)
    if name == "s4d-real":
        rate = (number + 1).expand(channels, -1)
    elif name == "s4d-lin":
        frequency = (math.pi * number).expand(channels, -1)
    elif name == "s4d-inv":
        frequency = (state_size / math.pi * (state_size / (2 * number + 1) - 1)).expand(channels, -1)
    elif name == "random":
        rate = torch.randn(channels, state_size).exp()
        frequency = math.pi * state_size * torch.rand(channels, state_size)
    return torch.complex(-rate, frequency) if complex_state else -rate
