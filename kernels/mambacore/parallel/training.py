"""Losses and gradients if every rank has a part of the sequence and a copy of the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from mambacore.devices import wide_dtype, widened
from mambacore.parallel.context import ranks_of


def part_of_mean(
    values: Tensor, weights: Tensor | None = None, group: distributed.ProcessGroup | None = None
) -> Tensor:
    """Return this rank's share of the mean over the values of all ranks; the shares sum to the mean.

    Call backward on the part. For a loss per position, `values` are those of this rank's stretch. For a loss that all
    ranks compute alike, such as that of a pooled result, it is what all of them have, of which each part is its share.

    Args:
        values: any shape, which may differ from rank to rank, and be empty.
        weights: weight of each value, for example 0 for padding; by default 1. They get no gradient.
        group: the process group; None for that of the block around the call, or for all processes.

    Returns:
        A scalar: sum(values * weights) of this rank divided by the sum of the weights of all ranks.

    Raises:
        ValueError: if the weights have another shape, or sum to zero over all ranks.
    """
    if weights is None:
        count = torch.full((), values.numel(), dtype=wide_dtype(values.device), device=values.device)
        total = values.sum()
    elif weights.shape != values.shape:
        raise ValueError(
            f"weights must have the shape of the values {tuple(values.shape)} but have {tuple(weights.shape)}"
        )
    else:
        count = widened(weights.detach()).sum()
        total = (values * weights.detach()).sum()
    ranks = ranks_of(group)
    if ranks is not None:
        distributed.all_reduce(count, group=ranks.group)
    if count == 0:
        raise ValueError("there is nothing to average: no rank has a value with a weight; check the weights")
    return total / count.to(total.dtype)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], group: distributed.ProcessGroup | None = None) -> None:
    """Replace every gradient by its sum over the ranks.

    One exchange per dtype and device, in the order of the parameters. A gradient that is None on some ranks counts as
    zero there; where it is None on all ranks it stays so. Results are the same on every rank and repeat.

    Args:
        parameters: the same on every rank, in the same order.
        group: the process group; None for that of the block around the call, or for all processes.

    Raises:
        InputError: this process is not a member of the group.
    """
    ranks = ranks_of(group)
    if ranks is None:
        return
    alike: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            alike.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in alike.values():
        parts = [torch.zeros_like(member) if member.grad is None else member.grad for member in members]
        present = members[0].new_tensor([member.grad is not None for member in members])
        message = torch.cat([part.reshape(-1) for part in parts] + [present])
        numbers = torch.view_as_real(message) if message.is_complex() else message
        distributed.all_reduce(numbers, group=ranks.group)
        *sums, present = message.split([part.numel() for part in parts] + [len(members)])
        for member, total, ranks_with in zip(members, sums, present.tolist(), strict=True):
            if ranks_with:
                member.grad = total.view_as(member).clone()
