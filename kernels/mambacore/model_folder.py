"""A model is a folder: `config.json`, `model.safetensors` and `README.md` (the card).

The configuration has everything needed to rebuild the model. Reading a folder runs no code from it.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import secrets
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mambacore.errors import InputError
from mambacore.safe_text import safe_markdown

FORMAT_VERSION: Final = 1
"""Version of the model folder format; only this version can be read."""

CONFIG_NAME: Final = "config.json"
TENSORS_NAME: Final = "model.safetensors"
CARD_NAME: Final = "README.md"
_GIT_POINTER: Final = b"version https://git-lfs"
_MODEL_FILES: Final = (CONFIG_NAME, TENSORS_NAME, CARD_NAME)
_DISTRIBUTION: Final = "genomamba"
_LAYER_COUNTS: Final = ("layers", "mixer", "mixers")
_PLAIN_TYPES: Final = frozenset({bool, int, float, str, type(None)})
_CONFIGURATION_ERRORS: Final = (
    ArithmeticError,
    AttributeError,
    IndexError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def write_model_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], card: str) -> None:
    """Write a model folder atomically.

    `config` gets "format_version" and, unless it has one, "package_version". The folder is written under a temporary
    name beside its place and then put there; where the operating system can exchange two folders in one step (Linux,
    macOS), a model that was there before is never absent. Other files in that folder (reports, checkpoints) are kept.

    Raises:
        InputError: if the path is something other than a model folder, or cannot be written.
    """
    check_output_folder(folder)
    folder = Path(folder).resolve()
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        document = {"package_version": _package_version(), **config, "format_version": FORMAT_VERSION}
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")
        # Copies, because tied parameters share memory, which the format does not support.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(copies, temporary / TENSORS_NAME, metadata=_tensor_metadata(document))
        _sort_metadata(temporary / TENSORS_NAME)
        shutil.copymode(temporary / CONFIG_NAME, temporary / TENSORS_NAME)  # safetensors writes for the owner only
        (temporary / CARD_NAME).write_text(safe_markdown(card), encoding="utf-8")
        _put_in_place(temporary, folder)
    except OSError as error:
        raise InputError(
            f"the model folder {folder} cannot be written ({error.strerror or error}): check its location and the disk."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tensor_metadata(document: Mapping[str, Any]) -> dict[str, str]:
    """What `model.safetensors` says of itself, so that a file without its folder can still be told."""
    stated = ("kind", "objective", "model_type", "format_version", "package_version")
    return {"format": "pt"} | {key: str(document[key]) for key in stated if key in document}


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: the library writes them in an order that changes by chance."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(text) == length:
            stream.seek(8)
            stream.write(text)


def check_output_folder(folder: Path) -> None:
    """Check in advance whether `write_model_folder` may write to a folder.

    Raises:
        InputError: if the path is a file, or a folder that is neither empty nor a model folder.
    """
    folder = Path(folder)
    if folder.is_dir():
        try:
            is_empty = next(folder.iterdir(), None) is None
        except OSError as error:
            raise InputError(
                f"{folder} cannot be listed ({error.strerror or error}): choose another output folder."
            ) from error
        if not is_empty and not is_model_folder(folder):
            raise InputError(f"{folder} holds other files and is not a model folder: choose another output folder.")
    elif folder.exists():
        raise InputError(f"{folder} is a file, not a folder: choose another output folder.")


def is_model_folder(folder: Path) -> bool:
    """Check whether a folder was written by `write_model_folder`, in any version, damaged tensors included."""
    try:
        config = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "format_version" in config and (Path(folder) / TENSORS_NAME).is_file()


def read_model_folder(
    folder: Path, format_version: int = FORMAT_VERSION
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration and the tensors (on the CPU) of a model folder.

    Raises:
        InputError: if the folder is missing, incomplete, damaged or of another version.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"there is no model folder {folder}: check the path, or train a model.")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: name the model folder that holds {CONFIG_NAME} and {TENSORS_NAME}.")
    config = _read_config(folder, format_version)
    path = folder / TENSORS_NAME
    if not path.is_file():
        raise InputError(f"the model folder {folder} has no {TENSORS_NAME}: copy it again or train again.")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        _refuse_pointer(path)
        raise InputError(f"{path} is truncated or damaged ({error}): copy it again or train again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error
    require_finite(tensors, path)
    return config, tensors


def require_finite(tensors: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Check that all weights are finite.

    Raises:
        InputError: for the first tensor with NaN or infinity, with its origin.
    """
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            raise InputError(f"{source} has numbers in {name} that are not finite: copy it again or train again.")


@contextlib.contextmanager
def configuration_errors(source: Path | str) -> Iterator[None]:
    """Convert errors from building a model with wrong types or sizes to messages for the user.

    Raises:
        InputError: with the origin and the cause.
    """
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{source} has no {error} where it is needed: copy or train the model again.") from error
    except _CONFIGURATION_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{source} is damaged ({reason[:200]}): copy or train the model again.") from error


Model = TypeVar("Model", bound=nn.Module)


def build_and_load(
    build: Callable[[], Model], config: Mapping[str, Any], tensors: dict[str, torch.Tensor], source: Path | str
) -> Model:
    """Build the model of a configuration and load its tensors, comparing shapes before allocating memory.

    Args:
        build: builds the model with random weights.
        config: its configuration; no number of layers may exceed the number of tensors.
        tensors: tensors of the model folder.
        source: name of the folder in messages.

    Returns:
        The model in evaluation mode. The caller's random number generators are unchanged.

    Raises:
        InputError: if the configuration has wrong types or sizes, or the tensors do not fit it.
    """
    place = Path(source) / CONFIG_NAME
    _require_few_layers(config, len(tensors), place)
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            sketch = _built(build, place)
        _require_fit(sketch, tensors, source)
        model = _built(build, place)
    load_tensors_into(model, tensors, source)
    return model.eval()


def training_details(config: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """Return the training details of a model folder, empty if it has none.

    Raises:
        InputError: if the section is not a JSON object.
    """
    details = config.get("details", {})
    if not isinstance(details, dict):
        raise InputError(
            f"{source}/{CONFIG_NAME} has details that are not a JSON object: copy or train the model again."
        )
    return details


def _built(build: Callable[[], Model], place: Path) -> Model:
    try:
        with configuration_errors(place):
            model = build()
            for module in model.modules():
                _check_types(getattr(module, "config", None))
            return model
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(str(place)) else f"{place}: {text}") from error


def _check_types(config: object) -> None:
    """Check that plain fields of a configuration have their declared types."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return
    hints = get_type_hints(type(config))
    for name, hint in hints.items():
        allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        value = getattr(config, name, None)
        if not all(isinstance(one, type) and one in _PLAIN_TYPES for one in allowed):
            continue
        fits = type(value) in allowed or (float in allowed and type(value) is int)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{name} is {value!r} in the model's configuration: copy or train the model again.")


def _require_few_layers(config: Any, most: int, source: Path | str) -> None:
    """Check the number of layers against that of tensors: a damaged value could take hours to build."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            for name, inner in value.items():
                count = len(inner) if isinstance(inner, list | tuple) else inner
                if name in _LAYER_COUNTS and isinstance(count, int) and count > most:
                    raise InputError(
                        f"{source} has {name} {count} in its configuration and only {most} tensors: copy or train the "
                        "model again."
                    )
                waiting.append(inner)
        elif isinstance(value, list | tuple):
            waiting += value


def load_tensors_into(module: nn.Module, tensors: dict[str, torch.Tensor], source: Path | str) -> None:
    """Copy tensors into a module's parameters and buffers of the same names.

    `source` names the tensors' origin in messages.

    Raises:
        InputError: if tensors are missing, unexpected, or of another shape or kind; all are listed, and the module is
            unchanged.
    """
    _require_fit(module, tensors, source)
    module.load_state_dict(tensors)


def _require_fit(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path | str) -> None:
    expected = module.state_dict()
    problems = []
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        problems.append(f"lacks {', '.join(missing)}")
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        problems.append(f"has {', '.join(extra)}, which the model does not have")
    unlike = [
        f"{name} as {_describe(tensors[name])} where the model has {_describe(tensor)}"
        for name, tensor in expected.items()
        if name in tensors and (tensors[name].shape != tensor.shape or _kind(tensors[name]) != _kind(tensor))
    ]
    if unlike:
        problems.append(f"has {', '.join(unlike)}")
    if problems:
        raise InputError(
            f"{source} does not fit its configuration, it {'; it '.join(problems)}: copy or train it again."
        )


def _refuse_pointer(path: Path) -> None:
    """Refuse what Git leaves in the place of a large file that has not been fetched.

    Raises:
        InputError: if the file is one.
    """
    with path.open("rb") as stream:
        if stream.read(len(_GIT_POINTER)) == _GIT_POINTER:
            raise InputError(f"{path} stands for a file that Git LFS has not fetched yet: run `git lfs pull`.")


def _read_config(folder: Path, format_version: int) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"the folder {folder} has no {CONFIG_NAME}: name a folder that `train` wrote.") from error
    except (ValueError, RecursionError) as error:
        _refuse_pointer(path)
        raise InputError(f"{path} is not valid JSON ({error}): copy the model again or train again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error
    if not isinstance(config, dict) or "format_version" not in config:
        raise InputError(f"{path} states no format_version: name a folder that `train` wrote.")
    if config["format_version"] != format_version:
        raise InputError(
            f"{folder} was written by version {config['format_version']!r} of the model format, this program reads "
            f"{format_version}: use the program that wrote it or train again."
        )
    return config


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Move a finished folder to its final path; an existing one is moved to `temporary`, or removed."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(temporary, folder)
        return
    for entry in folder.iterdir():
        if entry.name not in _MODEL_FILES:
            _link_or_copy(entry, temporary / entry.name)
    if not _exchange(temporary, folder):
        previous = temporary.with_name(temporary.name + ".previous")
        os.rename(folder, previous)
        os.rename(temporary, folder)
        shutil.rmtree(previous, ignore_errors=True)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """Link a file, or all files of a folder, to another path, or copy them if links are not supported."""
    if Path(source).is_dir() and not Path(source).is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_or_copy)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically; return False if not supported."""
    library = ctypes.CDLL(None, use_errno=True)
    first_name, second_name = os.fsencode(first), os.fsencode(second)
    with contextlib.suppress(AttributeError):
        if sys.platform == "darwin":
            rename_swap = 2
            return library.renamex_np(first_name, second_name, ctypes.c_uint(rename_swap)) == 0
        current_folder, rename_exchange = -100, 2
        result = library.renameat2(
            current_folder, first_name, current_folder, second_name, ctypes.c_uint(rename_exchange)
        )
        return result == 0
    return False


def _package_version() -> str:
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
