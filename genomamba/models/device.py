"""Where a model lies: everything that feeds a model follows its parameters."""

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters."""
    return next(module.parameters()).device
