"""Registered operators under `torch.func.vmap`: one item after the other, since each has a batch of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.library import CustomOpDef, Library


def vmap_by_loop(operator: CustomOpDef | OpOverload, library: Library | None = None) -> None:
    """Let an operator be mapped by `torch.func.vmap`: it is called for every item and the results are stacked.

    Args:
        operator: takes tensors and plain values, returns a tensor or several.
        library: what defined it, if that was not `torch.library.custom_op`.
    """

    def over_items(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        items = [
            operator(
                *(
                    # A list of numbers has a list of None.
                    argument.select(dim, item) if isinstance(dim, int) else argument
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for item in range(info.batch_size)
        ]
        if isinstance(items[0], torch.Tensor):
            return torch.stack(items), 0
        return tuple(torch.stack(parts) for parts in zip(*items, strict=True)), (0,) * len(items[0])

    torch.library.register_vmap(operator, over_items, lib=library)
