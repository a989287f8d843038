"""Sharding of parameters over processes (FSDP2), and reduction of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mambacore.layers.stack import ResidualBlock
from mambacore.parallel import sum_gradients
from mambapipelines.training.ranks import Ranks


class WholeStep(nn.Module):
    """Inside its forward pass all parameters of the model that are not in a block are whole, those of blocks in turn.

    A task's loss calls whatever methods of the model it likes, and only a module's forward pass brings the parts of its
    parameters together.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the result of `function`."""
        return function()


def shard(model: nn.Module, device: torch.device) -> WholeStep:
    """Shard the parameters of a model over all processes along their first dimension, block by block.

    Scalar parameters are replicated; `add_gradients` sums their gradients.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    whole = WholeStep(model)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    fully_shard(whole, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    return whole


@torch.no_grad()
def copy_whole(divided: nn.Module, whole: nn.Module) -> None:
    """Copy the parameters and buffers of a sharded model to a whole one; a collective operation."""
    tensors = divided.state_dict()
    for name, tensor in whole.state_dict().items():
        source = tensors[name]
        tensor.copy_(source.full_tensor() if isinstance(source, DTensor) else source)


@torch.no_grad()
def add_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Sum every gradient over the processes."""
    sum_gradients((parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)), _everyone())
    for parameter in model.parameters():
        # FSDP takes the mean.
        if isinstance(parameter, DTensor) and parameter.grad is not None:
            parameter.grad.mul_(ranks.count)


@torch.no_grad()
def clip_gradients(model: nn.Module, largest_norm: float, ranks: Ranks) -> Tensor:
    """Clip the gradients by their norm over all parameters; return the previous norm, equal in all processes."""
    if not ranks.sharded:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    divided = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norm = (ranks.sums([_sum_of_squares(divided)])[0] + _sum_of_squares(whole)) ** 0.5
    # As torch.nn.utils.clip_grad_norm_ does it.
    factor = norm if math.isnan(norm) else min(1.0, largest_norm / (norm + 1e-6))
    for gradient in gradients:
        gradient.mul_(factor)
    return torch.tensor(norm)


def _sum_of_squares(gradients: list[Tensor]) -> float:
    """Return the sum of squares of all elements."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    return math.fsum(norm**2 for norm in torch.stack(norms).tolist()) if norms else 0.0


def _everyone() -> distributed.ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None
    return group
