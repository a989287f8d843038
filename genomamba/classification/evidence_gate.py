"""A selective stack that weights the evidence of the Markov models base by base.

The combination of a classifier's parts gives each order of the Markov models one coefficient per length. The gate
reads, at every base, how the log-probabilities of the classes lie under each order (their mean and their standard
deviation, not which class is which) and the base, and returns a weight for each order:

    evidence(c) = sum_t sum_k w_k (1 + gate_k(t)) log P_k(t | c)

It treats all classes alike, so it cannot memorise which class a stretch belongs to: it learns where evidence of this
kind is reliable, as in coding sequence, and where it repeats itself, as in repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genomamba.baselines.words import BASES, FIRST_BASE_TOKEN
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambacore.layers import ResidualStack
from mambacore.layers.stack import StackState

GATE: Final = "gate"
"""Name and kind of the part."""
GATED_ORDERS: Final = (1, 3, 5, 7, 8, 9, 10)
WIDTH: Final = 32
LAYERS: Final = 1
STATE_SIZE: Final = 4
FIRST_WEIGHT: Final = 0.15
"""Of every order before training: evidence of neighbouring bases and orders overlaps."""
STATISTICS: Final = 2
"""Per order: standard deviation and mean over the classes."""
SPREAD_SCALE: Final = 3.0
"""Brings the standard deviation over the classes, about 0.3 nats, to the order of one."""
LARGEST_SHAPE: Final = 1024
"""Width, layers and state size of a gate that is read from a folder."""
SETTINGS: Final = "settings"


class GateState(NamedTuple):
    """State of the gate between pieces of a batch of records."""

    history: Tokens  # (batch, bases): the last bases, as many as the highest order at most
    stack: StackState


class EvidenceGate(nn.Module):
    """Weights for every order at every base: a function `(sequence, state) -> (sequence, state)`.

    Args:
        orders: orders of the Markov models that are weighted, ascending.
        width, layers, state_size: of the selective stack.
    """

    def __init__(
        self, orders: Sequence[int], width: int = WIDTH, layers: int = LAYERS, state_size: int = STATE_SIZE
    ) -> None:
        super().__init__()
        self.orders, self.state_size = tuple(orders), state_size
        self.inputs = nn.Linear(STATISTICS * len(self.orders) + BASES + 1, width)
        self.stack = ResidualStack(width, [{"name": "selective", "state_size": state_size}] * layers)
        self.gate = nn.Linear(width, len(self.orders))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.order_weights = nn.Parameter(torch.full((len(self.orders),), FIRST_WEIGHT))
        self._copies: dict[torch.device, EvidenceGate] = {}

    def forward(self, statistics: Tensor, tokens: Tensor, state: StackState | None = None) -> tuple[Tensor, StackState]:
        """Weight the orders at every base of a piece.

        Args:
            statistics: (batch, length, orders, 2), from `statistics_table`; 0 where the context is not known.
            tokens: (batch, length) token ids.
            state: state of the stack after the previous piece; None at the start.

        Returns:
            Weights (batch, length, orders), and the state.
        """
        with torch.autocast(statistics.device.type, enabled=False):
            bases = F.one_hot((tokens.long() - FIRST_BASE_TOKEN + 1).clamp(0, BASES), BASES + 1)
            hidden = self.inputs(torch.cat([statistics.flatten(2), bases.to(statistics.dtype)], dim=-1))
            hidden, state = self.stack(hidden, state)
            return self.order_weights * (1 + self.gate(hidden)), state

    def on(self, device: torch.device) -> EvidenceGate:
        """Return the gate for inference on a device; a copy unless that is where it is."""
        if self.order_weights.device == device:
            return self
        if device not in self._copies:
            copy = deepcopy(self)
            copy._copies = {}
            self._copies[device] = copy.to(device).eval()
        return self._copies[device]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the weights and the shape, as tensors for a model folder."""
        settings = [self.inputs.out_features, len(self.stack.blocks), self.state_size, *self.orders]
        return {SETTINGS: torch.tensor(settings), **self.state_dict()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> EvidenceGate | None:
        """Inverse of `to_tensors`, in evaluation mode; None without tensors.

        Raises:
            InputError: if the tensors are damaged.
        """
        if not tensors:
            return None
        damaged = InputError("the evidence gate in the model folder is damaged: train or copy it again.")
        weights = {name: value for name, value in tensors.items() if name != SETTINGS}
        settings, inputs = tensors.get(SETTINGS), tensors.get("inputs.weight")
        if settings is None or inputs is None or settings.dim() != 1 or settings.is_floating_point():
            raise damaged
        shape, orders = settings[:3].tolist(), settings[3:].tolist()
        # The shape is checked before memory is taken for it.
        if not orders or min(shape) < 1 or max(shape) > LARGEST_SHAPE:
            raise damaged
        if tuple(inputs.shape) != (shape[0], STATISTICS * len(orders) + BASES + 1):
            raise damaged
        gate = cls(orders, *shape)
        try:
            gate.load_state_dict(weights)
        except RuntimeError as error:
            raise damaged from error
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise damaged
        return gate.eval().requires_grad_(False)


def statistics_table(table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the gate's inputs (words, 2) for a table of log-probabilities (words, classes), of the order of one."""
    # log 4 is minus the log-probability of a base about which nothing is known.
    return np.stack([SPREAD_SCALE * table.std(axis=1), table.mean(axis=1) + np.float32(np.log(BASES))], axis=1)
