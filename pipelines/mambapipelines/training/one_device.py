"""Support for Lightning's trainer on the single device of this process, of any kind.

Gradients and states of several processes are reduced by the training module, so the trainer sees one process.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy


class OneDevice(SingleDeviceStrategy):
    """A strategy that leaves the model on its device after training, for subsequent work."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, accelerator=PlacedAccelerator())

    def teardown(self) -> None:
        """Release the trainer's resources without moving the model."""
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


class PlacedAccelerator(Accelerator):
    """An accelerator for an already chosen device (`mambapipelines.device`)."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing: the device is current already."""

    def teardown(self) -> None:
        """Nothing."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Nothing."""
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """As they are."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Asked for by strategies of several devices alone."""
        return []

    @staticmethod
    def auto_device_count() -> int:
        """One device for each process."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """It has been chosen."""
        return True

    @staticmethod
    def name() -> str:
        """Of the accelerator."""
        return "placed"
