"""The files of a foreign checkpoint: validated on reading, written atomically."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambacore.checkpoints.names import (
    CONFIG_NAME,
    INDEX_KEY,
    INDEX_NAME,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    PICKLED_FILES,
    SAFE_FILES,
    TENSORS_NAME,
)
from mambacore.errors import InputError
from mambacore.hub import download, is_on_hub
from mambacore.model_folder import require_finite


def find_checkpoint(reference: Path | str) -> Path:
    """Return the folder of a checkpoint: a path itself, or the download of `hf://owner/name@revision`.

    Raises:
        InputError: if the model or revision does not exist, the name is malformed, or it is neither reachable nor
            cached.
    """
    if not is_on_hub(reference):
        return Path(reference)
    folder = download(reference, SAFE_FILES)
    return folder if any(folder.glob("*.safetensors")) else download(reference, (CONFIG_NAME, *PICKLED_FILES))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a checkpoint.

    Raises:
        InputError: if the folder or file does not exist, or the file is not a JSON object.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: name the folder of a downloaded checkpoint.")
    return _read_json(folder / CONFIG_NAME)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint by their foreign names, from one file or from several with an index.

    Safetensors are preferred. A pickle by PyTorch is read in the restricted mode that loads only tensors and runs no
    code (`torch.load(weights_only=True)`).

    Raises:
        InputError: if there are none, or a file is missing, damaged, outside the folder, or holds more than tensors.
    """
    if (folder / TENSORS_NAME).is_file():
        return _read_file(folder / TENSORS_NAME)
    if (folder / INDEX_NAME).is_file():
        return _read_shards(folder, INDEX_NAME, _read_file)
    if (folder / PICKLE_NAME).is_file():
        return _read_pickle(folder / PICKLE_NAME)
    if (folder / PICKLE_INDEX_NAME).is_file():
        return _read_shards(folder, PICKLE_INDEX_NAME, _read_pickle)
    raise InputError(
        f"{folder} has neither {TENSORS_NAME} nor {INDEX_NAME} nor {PICKLE_NAME}: download the checkpoint again."
    )


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint to a temporary folder and rename it when complete.

    Raises:
        InputError: if the folder is in use, or cannot be written.
    """
    folder = Path(folder).resolve()
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is not an empty folder: choose another location for the checkpoint.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")
        save_file(dict(tensors), temporary / TENSORS_NAME, metadata={"format": "pt"})
        shutil.copymode(
            temporary / CONFIG_NAME, temporary / TENSORS_NAME
        )  # safetensors creates files readable by their owner only
        os.replace(temporary, folder)
    except OSError as error:
        raise InputError(
            f"the checkpoint {folder} cannot be written ({error.strerror or error}): check its location and the disk."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_shards(folder: Path, index: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    path = folder / index
    places = _read_json(path).get(INDEX_KEY)
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{path} has no {INDEX_KEY} from tensors to files: download the checkpoint again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise InputError(f"{path} names the file {name!r}, which is not in its folder: download it again.")
        tensors |= read(folder / name)
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: download the checkpoint again.") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): download it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error
    require_finite(tensors, path)
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: download the checkpoint again.") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is damaged or holds more than tensors, which is not loaded because it could run arbitrary code: "
            f"convert it to {TENSORS_NAME} where it is from, with `save_pretrained(folder, safe_serialization=True)` "
            "of transformers or `safetensors.torch.save_file`."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is truncated or damaged ({_first_line(error)}): download it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise InputError(f"{path} is not a table of tensors by name: save the model's state_dict().")
    require_finite(found, path)
    return dict(found)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: name the folder of a downloaded checkpoint.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): download it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object: download it again.")
    return document
