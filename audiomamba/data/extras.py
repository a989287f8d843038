"""The packages that only audio needs, imported where they are used."""

from importlib import import_module
from typing import Any

from mambacore.errors import InputError


def audio_package(name: str) -> Any:
    """Import a package of the extra `audio`.

    Args:
        name: `soundfile`, or `torchaudio` and modules of it.

    Raises:
        InputError: it is not installed, or does not fit the torch that is.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library of another torch
        package = name.partition(".")[0]
        raise InputError(
            f"audio needs the package {package}, which cannot be imported ({error}); install genomamba[audio], as in "
            "pip install 'genomamba[audio]'"
        ) from error
