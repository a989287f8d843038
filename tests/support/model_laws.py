"""A model on a device beside the same on the CPU: a step of training, what is saved, what it computes afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tolerances import BFLOAT16_LAYERS, DEVICE_FLOAT32, relative_error

PRECISIONS = {"float32": DEVICE_FLOAT32, "bfloat16": BFLOAT16_LAYERS}
# Gradients far smaller than this do not become whole steps of AdamW, which roundings would decide the direction of.
EPSILON = 1e-2

Loss = Callable[[nn.Module, torch.device], Tensor]


def trained(model: nn.Module, loss_of: Loss, place: torch.device, precision: str) -> dict[str, Tensor]:
    """The loss, all gradients and all parameters after a step of AdamW, each as one vector on the CPU."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPSILON)
    with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = loss_of(model, place)
    loss.backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    assert len(gradients) > 3 and all(one.device == place and one.dtype == torch.float32 for one in gradients)
    found = {"loss": loss.detach().reshape(1).cpu(), "gradients": torch.cat([one.flatten().cpu() for one in gradients])}
    optimiser.step()
    return found | {"parameters": torch.cat([one.detach().flatten().cpu() for one in model.parameters()])}


def train_alike(model: nn.Module, loss_of: Loss, device: torch.device, precision: str) -> nn.Module:
    """Train a model by one step on the device and on the CPU; the one on the device, if they are alike."""
    on_device = copy.deepcopy(model).to(device)
    found = trained(on_device, loss_of, device, precision)
    expected = trained(model, loss_of, torch.device("cpu"), precision)
    errors = {name: relative_error(found[name], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) < PRECISIONS[precision], errors
    return on_device
