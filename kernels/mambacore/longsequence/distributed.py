"""Data parallelism: averaging of gradients over ranks, once after all pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

# Gradients travel in buckets of about this size (25 MiB, as DistributedDataParallel's), so that what is gathered for
# one exchange stays small and there are few exchanges.
BUCKET_BYTES = 25 * 2**20


@torch.no_grad()
def average_gradients(model: nn.Module, process_group: distributed.ProcessGroup | None = None) -> None:
    """Replace every `.grad` of the model by its mean over the ranks, as DistributedDataParallel does.

    Every rank must call it, with the same parameters. A parameter without a gradient on this rank counts as zeros if
    another rank has one for it, and stays without if none has.

    Args:
        model: the model or the DistributedDataParallel around it, whose group and ignored parameters are then used.
        process_group: the ranks; by default the default group.

    Raises:
        ValueError: if gradients are sparse.
    """
    ignored: set[str] = set()
    if isinstance(model, DistributedDataParallel):
        process_group, ignored, model = model.process_group, model.parameters_to_ignore, model.module
    parameters = [tensor for name, tensor in model.named_parameters() if tensor.requires_grad and name not in ignored]
    ranks = distributed.get_world_size(process_group)
    if ranks == 1 or not parameters:
        return
    present = torch.tensor(
        [parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=parameters[0].device
    )
    distributed.all_reduce(present, group=process_group)
    gradients = []
    for parameter, count in zip(parameters, present.tolist(), strict=True):
        if count == 0:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad.layout != torch.strided:
            raise ValueError("sparse gradients cannot be averaged over ranks; build the embedding with sparse=False")
        gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        distributed.all_reduce(flat.div_(ranks), group=process_group)
        sizes = [gradient.numel() for gradient in bucket]
        for gradient, mean in zip(bucket, flat.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield buckets of consecutive gradients with the same dtype and device (large ones alone)."""
    bucket: list[Tensor] = []
    filled = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        alike = not bucket or (gradient.dtype, gradient.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or filled + size > BUCKET_BYTES):
            yield bucket
            bucket, filled = [], 0
        bucket.append(gradient)
        filled += size
    if bucket:
        yield bucket
