"""The files of a foreign checkpoint: read with every mistake named, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambacore.checkpoints.names import CONFIG_NAME, INDEX_KEY, INDEX_NAME, PICKLE_NAMES, TENSORS_NAME
from mambacore.errors import InputError


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint.

    Raises:
        InputError: no such folder, no such file in it, or one that is not a JSON object.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: name the folder of a downloaded checkpoint.")
    return _read_json(folder / CONFIG_NAME)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their foreign names, from one file or from several with an index.

    Raises:
        InputError: there are none, only pickled ones, or a file is missing, damaged, or outside the folder.
    """
    if (folder / TENSORS_NAME).is_file():
        return _read_file(folder / TENSORS_NAME)
    if (folder / INDEX_NAME).is_file():
        return _read_shards(folder)
    pickled = [name for name in PICKLE_NAMES if (folder / name).exists()]
    if pickled:
        raise InputError(
            f"{folder} has its tensors in {pickled[0]} only, a pickle that can run any program when it is read: "
            f"convert it to {TENSORS_NAME} where it is from, with `save_pretrained(folder, safe_serialization=True)` "
            "of transformers or `safetensors.torch.save_file`."
        )
    raise InputError(f"{folder} has neither {TENSORS_NAME} nor {INDEX_NAME}: download the checkpoint again.")


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint under a temporary name beside its place and put it there when it is whole.

    Raises:
        InputError: the place is taken, or cannot be written to.
    """
    folder = Path(folder).resolve()
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is not an empty folder: choose another place for the checkpoint.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")
        save_file(dict(tensors), temporary / TENSORS_NAME, metadata={"format": "pt"})
        shutil.copymode(temporary / CONFIG_NAME, temporary / TENSORS_NAME)  # safetensors writes for the owner only
        os.replace(temporary, folder)
    except OSError as error:
        raise InputError(
            f"the checkpoint {folder} cannot be written ({error.strerror or error}): check its place and the disk."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_shards(folder: Path) -> dict[str, Tensor]:
    path = folder / INDEX_NAME
    places = _read_json(path).get(INDEX_KEY)
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{path} has no {INDEX_KEY} from tensors to files: download the checkpoint again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise InputError(f"{path} names the file {name!r}, which is not in its folder: download it again.")
        tensors |= _read_file(folder / name)
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: download the checkpoint again.") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): download it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: name the folder of a downloaded checkpoint.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): download it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object: download it again.")
    return document
