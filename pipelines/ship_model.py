"""Put a trained model among those that ship with the packages, under a name, with its row of the table.

python pipelines/ship_model.py runs/yeasts yeasts --task 'species of Saccharomyces' --licence Apache-2.0 \
    --figures '62.7 % (57-68) at 16,384 bp, chance 33 %' --card card.md

The three files of the model folder are copied, absolute paths in `config.json` shortened to their last part, and the
SHA-256 of what was copied is written into `models.json`, by which every later copy is checked.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from mambacore.errors import InputError
from mambacore.model_folder import (
    CARD_NAME,
    CONFIG_NAME,
    TENSORS_NAME,
    is_model_folder,
    read_model_folder,
    write_model_folder,
)
from mambacore.shipped import CHECKED_FILES, TABLE_NAME
from mambapipelines.files import write_whole

REPOSITORY = Path(__file__).resolve().parents[1]
LARGEST_MODEL_BYTES, LARGEST_TOTAL_BYTES = 16_000_000, 40_000_000
AUDIO_KINDS = ("waveform", "clip")


def without_places(value: Any) -> Any:
    """The same JSON value, every absolute path shortened to its last part: it says nothing on another machine."""
    if isinstance(value, str):
        return Path(value).name if value.startswith("/") else value
    if isinstance(value, list):
        return [without_places(one) for one in value]
    if isinstance(value, dict):
        return {name: without_places(one) for name, one in value.items()}
    return value


def weights_folder(kind: str, repository: Path = REPOSITORY) -> Path:
    """Where models of a kind ship."""
    package = "audiomamba" if kind.startswith(AUDIO_KINDS) else "genomamba"
    return repository / package / "weights"


def rounded(source: Path, folder: Path) -> Path:
    """Copy a model with its matrices rounded to bfloat16, which halves the file; they are float32 again in memory.

    Vectors, such as norms and biases, are small and keep their precision.
    """
    config, tensors = read_model_folder(source)
    halved = {
        name: tensor.bfloat16() if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }
    write_model_folder(folder, config, halved, (source / CARD_NAME).read_text(encoding="utf-8"))
    return folder


def ship(source: Path, name: str, facts: dict[str, str], card: Path | None, repository: Path = REPOSITORY) -> Path:
    """Copy a model and write its row of the table.

    Args:
        source: the model folder; it may lie in its place already.
        name: its name from now on.
        facts: `task`, `figures` and `licence`.
        card: the card, instead of the one in the folder.
        repository: the checkout.

    Raises:
        InputError: not a model folder, or larger than may ship.
    """
    if not is_model_folder(source):
        raise InputError(f"{source} is not a model folder: name one that a training command wrote.")
    config, tensors = read_model_folder(source)
    weights = weights_folder(str(config.get("kind")), repository)
    target = weights / name
    size = sum((source / file).stat().st_size for file in CHECKED_FILES)
    others = sum(
        file.stat().st_size
        for package in ("genomamba", "audiomamba")
        for file in (repository / package / "weights").glob("*/*")
        if file.parent != target and file.is_file()
    )
    if size > LARGEST_MODEL_BYTES or size + others > LARGEST_TOTAL_BYTES:
        raise InputError(
            f"{source} has {size / 1e6:.1f} MB beside {others / 1e6:.1f} MB of other models: a model may have "
            f"{LARGEST_MODEL_BYTES / 1e6:.0f} MB, all together {LARGEST_TOTAL_BYTES / 1e6:.0f} MB."
        )
    target.mkdir(exist_ok=True)
    write_whole(target / CONFIG_NAME, json.dumps(without_places(config), indent=2, allow_nan=False) + "\n")
    for origin, place in ((source / TENSORS_NAME, TENSORS_NAME), (card or source / CARD_NAME, CARD_NAME)):
        if origin.resolve() != (target / place).resolve():
            shutil.copyfile(origin, target / place)
    table = json.loads((weights / TABLE_NAME).read_text(encoding="utf-8"))
    table[name] = {
        **facts,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "sha256": {file: hashlib.sha256((target / file).read_bytes()).hexdigest() for file in CHECKED_FILES},
    }
    write_whole(weights / TABLE_NAME, json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that a training command wrote")
    parser.add_argument("name")
    parser.add_argument("--task", required=True, help="what it is for, in a few words")
    parser.add_argument("--figures", required=True, help="what it reached on held-out data, beside the best control")
    parser.add_argument("--licence", required=True, help="of the weights, such as Apache-2.0 or CC-BY-SA-4.0")
    parser.add_argument("--card", type=Path, help="card to ship instead of the folder's README.md")
    parser.add_argument(
        "--bfloat16", action="store_true", help="round matrices to bfloat16; measure the figures after that"
    )
    options = parser.parse_args()
    facts = {"task": options.task, "figures": options.figures, "licence": options.licence}
    with tempfile.TemporaryDirectory() as folder:
        source = rounded(options.folder, Path(folder) / "model") if options.bfloat16 else options.folder
        print(ship(source, options.name, facts, options.card))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"ship_model.py: {error}") from error
