"""Waveform models as model folders: weights, architecture, quantiser and rate together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from audiomamba.models.configuration import WaveformModelConfig
from audiomamba.models.waveform_model import WaveformModel
from mambacore.errors import InputError
from mambacore.folder import load_tensors_into, read_model_folder, write_model_folder
from mambacore.hub import find_model_folder

MODEL_KIND: Final = "waveform model"


def save_waveform_model(folder: Path | str, model: WaveformModel, *, details: Mapping[str, Any]) -> None:
    """Write a model folder (config.json, model.safetensors, README.md) in one step.

    Args:
        folder: the model folder; an earlier model there is replaced.
        details: JSON-able facts of the training.

    Raises:
        InputError: the place holds something else, or cannot be written to.
    """
    config = {"kind": MODEL_KIND, "model": model.config.to_dict(), "details": dict(details)}
    write_model_folder(Path(folder), config, model.state_dict(), _card(model))


def load_waveform_model(folder: Path | str) -> tuple[WaveformModel, dict[str, Any]]:
    """Read a model folder: the model, ready to be used, and the details it was saved with.

    Args:
        folder: the model folder, or ``hf://owner/name@revision`` on the Hugging Face Hub.

    Raises:
        InputError: the folder is missing, incomplete, damaged, of another kind or of another version.
    """
    folder = find_model_folder(folder)
    config, tensors = read_model_folder(folder)
    if config.get("kind") != MODEL_KIND:
        raise InputError(
            f"{folder} holds a {config.get('kind', 'model of unknown kind')!s}, not a {MODEL_KIND}; give another folder"
        )
    if not isinstance(config.get("model"), dict):
        raise InputError(
            f"{folder}/config.json has no 'model' section; the model folder is damaged, train or copy it again"
        )
    try:
        model = WaveformModel(WaveformModelConfig.from_dict(config["model"]))
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from error
    load_tensors_into(model, tensors, str(folder))
    return model.eval(), config.get("details", {})


def _card(model: WaveformModel) -> str:
    """The model card: what the folder is."""
    config, quantiser = model.config, model.config.quantiser
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = ["# Waveform model", ""]
    lines.append(
        f"Foretells waveforms at {quantiser.sample_rate_hz} Hz sample by sample, in {quantiser.classes} classes "
        f"({quantiser.scheme}, full scale {quantiser.full_scale:g}). {parameters:,} parameters."
    )
    lines.append("")
    for depth, stage in enumerate(config.stages):
        names = ", ".join(dict.fromkeys(mixer["name"] for mixer in stage.mixers()))
        where = "centre" if depth == len(config.pooling) else f"depth {depth}"
        lines.append(f"- {where}: {stage.layers} layers per stage ({names}) of width {config.width(depth)}")
    lines += [
        "",
        "    from audiomamba.models import WaveformModel",
        "",
        '    model = WaveformModel.from_pretrained("THIS_FOLDER")',
        "",
    ]
    return "\n".join(lines)
