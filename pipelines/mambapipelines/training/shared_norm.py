"""Batch normalisation over all processes of a run, so that several train as one does."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation (Ioffe & Szegedy, arXiv 1502.03167) whose means are over the rows of all processes.

    PyTorch's `SyncBatchNorm` is for CUDA alone; this one computes on any device, with the same parameters and buffers
    as `nn.BatchNorm2d`. In evaluation mode it is that.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, height, width) of this process to the same shape."""
        if not self.training:
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        # Sums of all processes, and gradients that come back from all of them.
        shape = (1, -1, 1, 1)
        count = _sum(torch.full((1,), values.numel() / values.shape[1], device=values.device))
        mean = _sum(values.sum((0, 2, 3))) / count
        centred = values - mean.view(shape)
        variance = _sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self._remember(mean, variance * count / (count - 1).clamp(min=1))
        normalised = centred * torch.rsqrt(variance.view(shape) + self.eps)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running means towards those of this batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


def _sum(tensor: Tensor) -> Tensor:
    summed: Tensor = all_reduce(tensor, group=distributed.group.WORLD)
    return summed


def share_batch_norms(model: nn.Module) -> None:
    """Let every batch normalisation of a model take its means over all processes; its state stays as it is."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d
