"""Trained models of raw audio that ship with the package: `audiomamba models` lists them, any MODEL takes a name.

`pipelines/ship_model.py` puts a model here and writes its row of `models.json`.
"""

from pathlib import Path
from typing import Final

from mambacore.shipped import ShippedModels

MODELS: Final = ShippedModels(Path(__file__).parent)


def find_model(reference: str | Path) -> Path:
    """The folder that is meant: a path, a shipped model's name, or where the Hub's model has been downloaded to.

    Args:
        reference: see `mambacore.shipped.ShippedModels.find`.

    Raises:
        InputError: there is no such model, or it is damaged.
    """
    return MODELS.find(reference)
