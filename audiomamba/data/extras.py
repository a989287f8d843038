"""Imports of the packages that only audio needs, done where they are used."""

from importlib import import_module
from typing import Any

from mambacore.errors import InputError


def audio_package(name: str) -> Any:
    """Import a package of the extra `audio`.

    Args:
        name: `soundfile`, `torchaudio` or a module of it.

    Raises:
        InputError: if it is not installed, or does not match the installed torch.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library built for another torch
        package = name.partition(".")[0]
        raise InputError(
            f"audio needs the package {package}, which cannot be imported ({error}); install genomamba[audio], as in "
            "pip install 'genomamba[audio]'"
        ) from error
