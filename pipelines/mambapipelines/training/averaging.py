"""An exponential moving average of the weights (Polyak & Juditsky 1992, with the decay of TensorFlow's EMA warm-up)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mambacore.errors import InputError
from mambapipelines.training.state import divided_like


class AveragedWeights:
    """The average of a model's parameters over the steps.

    After update t (1-based) the average is `decay_t * average + (1 - decay_t) * weights` with
    `decay_t = min(decay, (1 + t) / (10 + t))`, so that the random initial weights are soon forgotten.

    Args:
        model: the model whose parameters are averaged; buffers are not.
        decay: decay of late updates, between 0 and 1.
        tensors: `tensors` of an average to continue; by default it starts from the model.

    Raises:
        InputError: if the tensors are not those of the model.
    """

    def __init__(self, model: nn.Module, decay: float, tensors: dict[str, Tensor] | None = None) -> None:
        self.model = model
        self.decay = decay
        current = dict(model.named_parameters())
        if tensors is not None and tensors.keys() != current.keys():
            raise InputError("the averaged weights of the run are not those of the model: start with another --output")
        source = current if tensors is None else tensors
        self.tensors = {
            name: divided_like(tensor.detach(), current[name].detach()).to(current[name].device)
            for name, tensor in source.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after update number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.model.named_parameters():
            self.tensors[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the average as the model's weights inside the block."""
        trained = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self._copy(self.tensors)
        try:
            yield
        finally:
            self._copy(trained)

    def keep(self) -> None:
        """Make the average the model's weights permanently."""
        self._copy(self.tensors)

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[name])
