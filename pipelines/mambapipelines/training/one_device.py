"""Lightning's trainer on the one device of this process, whatever kind of device that is.

Gradients and states of several processes are added up by the training module, so the trainer knows of one process.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy


class OneDevice(SingleDeviceStrategy):
    """A strategy that leaves the model on its device afterwards: what follows training runs there as well."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, accelerator=PlacedAccelerator())

    def teardown(self) -> None:
        """Release what the trainer holds, and move nothing."""
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


class PlacedAccelerator(Accelerator):
    """A device that was chosen before (`mambapipelines.device`): nothing is parsed, set up or counted."""

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
