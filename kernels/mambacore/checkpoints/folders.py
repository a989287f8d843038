"""Conversion of whole checkpoints: a foreign folder to a model, and a model to a foreign folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambacore.checkpoints.duals import dual_family, dual_model, dual_settings
from mambacore.checkpoints.files import find_checkpoint, read_config, read_tensors, write_checkpoint
from mambacore.checkpoints.names import (
    CADUCEUS_COMPLEMENTS,
    CONFIG_NAME,
    DTYPE_KEY,
    FAMILIES,
    MAMBA_SSM_NORM_EPSILON,
    MAMBA_SSM_TENSORS,
    MODEL_TYPE_KEY,
    MODEL_TYPES,
    TRANSFORMERS_TENSORS,
    UNTYPED,
    caduceus_tensors,
)
from mambacore.checkpoints.names_dual import DUAL_FAMILIES, DUAL_TENSORS, LAYER_KEY, LAYERS
from mambacore.checkpoints.settings import read_settings, write_settings
from mambacore.checkpoints.tensors import ForeignTensors
from mambacore.errors import InputError
from mambacore.layers import Mixer, SelectiveMixer
from mambacore.layers.equivariant import complement_table
from mambacore.layers.selective import SELECTED
from mambacore.models import (
    CausalLanguageModel,
    CausalLanguageModelConfig,
    MaskedLanguageModel,
    MaskedLanguageModelConfig,
)

MIXER_OPTIONS = ("state_size", "kernel_width", "expansion", "step_rank", "linear_bias", "convolution_bias")
_CAUSAL_TENSORS = {"transformers": TRANSFORMERS_TENSORS, "mamba_ssm": MAMBA_SSM_TENSORS, **DUAL_TENSORS}
_FAMILIES = {**FAMILIES, **DUAL_FAMILIES}


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> CausalLanguageModel | MaskedLanguageModel:
    """Load a model from a foreign checkpoint, whose kind is detected. No code of it is run.

    Args:
        folder: a local folder, or `hf://owner/name@revision` on the Hub, with `config.json` and `model.safetensors` (or
            several such files and their index), or `pytorch_model.bin`, from which only tensors are loaded.
        dtype: dtype of the parameters, whatever that of the checkpoint.

    Returns:
        A causal model for `transformers` Mamba and Mamba-2 and for `mamba_ssm`, a masked one for Caduceus; in
        evaluation mode.

    Raises:
        InputError: if a file is missing or damaged, the configuration lacks settings or has unsupported ones, or
            tensors are missing, unexpected or misshapen (all are listed).
    """
    folder = find_checkpoint(folder)
    config = read_config(folder)
    family = recognise(config, folder / CONFIG_NAME)
    settings = read_settings(config, _FAMILIES[family], folder / CONFIG_NAME)
    tensors = read_tensors(folder)
    mixer = {} if family in DUAL_FAMILIES else {name: settings.pop(name) for name in MIXER_OPTIONS}
    # Initial values are overwritten at once: sampling them must not advance the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        if family == "caduceus":
            complement = _complement(settings, tensors, folder)
            exchange_strands = settings.pop("exchange_strands") and settings["equivariant"]
            model: CausalLanguageModel | MaskedLanguageModel = MaskedLanguageModel(
                MaskedLanguageModelConfig(
                    **(settings | {"complement": complement, "exchange_strands": exchange_strands}), mixer=mixer
                )
            )
            names = caduceus_tensors(settings["equivariant"], exchange_strands)
        elif family in DUAL_FAMILIES:
            model, names = dual_model(family, settings, folder / CONFIG_NAME), _CAUSAL_TENSORS[family]
        else:
            mixers = ({"name": SelectiveMixer.name, **mixer},) * settings.pop("layers")
            model = CausalLanguageModel(CausalLanguageModelConfig(**settings, mixers=mixers))
            names = _CAUSAL_TENSORS[family]
    model = model.to(dtype).eval()
    ForeignTensors(model, names).fill(tensors, folder)
    return model


def recognise(config: Mapping[str, Any], source: object) -> str:
    """Return the family of a configuration: a name of FAMILIES or DUAL_FAMILIES.

    Raises:
        InputError: if it is none of these; `source` names the configuration in the message.
    """
    if MODEL_TYPE_KEY in config:
        stated = config[MODEL_TYPE_KEY]
        if isinstance(stated, str) and stated in MODEL_TYPES:
            return MODEL_TYPES[stated]
        raise InputError(
            f"{source} states the model type {stated!r}: only {' and '.join(MODEL_TYPES)} can be loaded from it."
        )
    for keys, family in UNTYPED:
        if all(key in config for key in keys):
            return _of_layers(config) if family == "mamba_ssm" else family
    kinds = ", ".join(family.title for family in _FAMILIES.values())
    raise InputError(f"{source} is of an unknown kind: checkpoints of {kinds} can be loaded.")


def _of_layers(config: Mapping[str, Any]) -> str:
    """Return the mamba_ssm family by its kind of layers; an unknown kind is rejected with the settings of the first."""
    outer, inner = LAYER_KEY
    layers = config[outer].get(inner) if isinstance(config.get(outer), Mapping) else None
    return LAYERS.get(layers, "mamba_ssm") if isinstance(layers, str) else "mamba_ssm"


def save_transformers(model: CausalLanguageModel, folder: Path | str) -> None:
    """Write a folder that `MambaForCausalLM` or `Mamba2ForCausalLM` of `transformers` loads, atomically.

    Its vocabulary size includes the padding.

    Raises:
        InputError: if `transformers` does not support the model, or the folder is in use or cannot be written.
    """
    family, settings = _causal_settings(model, "transformers")
    settings["vocabulary_size"] = model.config.padded_vocabulary_size
    tensors = ForeignTensors(model, _CAUSAL_TENSORS[family]).export()
    _write(folder, settings, family, tensors)


def save_mamba_ssm(model: CausalLanguageModel, folder: Path | str) -> None:
    """Write a folder with the configuration and the tensor names of `mamba_ssm`, atomically.

    `mamba_ssm` itself reads pickles, which are never written here: load the file with `safetensors.torch.load_file` and
    pass it to its model's `load_state_dict`. It has all names, including tied ones.

    Raises:
        InputError: if `mamba_ssm` does not support the model, or the folder is in use or cannot be written.
    """
    family, settings = _causal_settings(model, "mamba_ssm")
    if model.config.norm_epsilon != MAMBA_SSM_NORM_EPSILON:
        raise InputError(
            f"mamba_ssm has no setting for norm_epsilon, which is {model.config.norm_epsilon} here and "
            f"{MAMBA_SSM_NORM_EPSILON} there: save this model for transformers."
        )
    foreign = ForeignTensors(model, _CAUSAL_TENSORS[family])
    _write(folder, settings, family, foreign.export(with_tied=foreign.tied))


def save_caduceus(model: MaskedLanguageModel, folder: Path | str) -> None:
    """Write a folder that `CaduceusForMaskedLM.from_pretrained` loads, atomically.

    As in the published checkpoints, tied tensors are omitted.

    Raises:
        InputError: if Caduceus does not support the model, or the folder is in use or cannot be written.
    """
    if not isinstance(model, MaskedLanguageModel):
        raise InputError(
            f"Caduceus is a masked language model but this is a {type(model).__name__}: use another format."
        )
    config = model.config
    if config.equivariant and not config.tied_head:
        raise InputError(
            "Caduceus always ties the head of an equivariant model to its embedding, but here they are untied: "
            "it cannot be saved in that format."
        )
    settings = {field: getattr(config, field) for field in FAMILIES["caduceus"].keys if hasattr(config, field)}
    mixers = [part for part in model.stack.modules() if isinstance(part, Mixer)]
    settings |= _mixer_settings(mixers, "Caduceus")
    settings["complement"] = None if model.complement is None else model.complement.tolist()
    # The published models exchange the strands in the fused kernel; a single strand has nothing to exchange.
    settings["exchange_strands"] = config.exchange_strands or not config.equivariant
    tensors = ForeignTensors(model, caduceus_tensors(config.equivariant, config.exchange_strands)).export()
    if config.equivariant:
        assert model.complement is not None  # checked by the configuration
        tensors |= {name: model.complement.cpu().clone() for name in CADUCEUS_COMPLEMENTS}
    _write(folder, settings, "caduceus", tensors)


def _write(folder: Path | str, settings: Mapping[str, Any], family: str, tensors: Mapping[str, Tensor]) -> None:
    config = write_settings(settings, _FAMILIES[family])
    if MODEL_TYPE_KEY in config:
        kept_in = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
        config[DTYPE_KEY] = str(kept_in).removeprefix("torch.")
    write_checkpoint(Path(folder), config, tensors)


def _causal_settings(model: CausalLanguageModel, program: str) -> tuple[str, dict[str, Any]]:
    """Return the family of this model in a program, and its settings."""
    if not isinstance(model, CausalLanguageModel):
        raise InputError(
            f"{FAMILIES[program].title} is a causal language model but this is a {type(model).__name__}: "
            "use another format."
        )
    family = dual_family(model, program) or program
    title = _FAMILIES[family].title
    config = model.config
    if config.context_widths or config.output_context_widths:
        raise InputError(f"{title} has no context tables, but this model has some: it cannot be saved in that format.")
    mixers = [part for part in model.stack.modules() if isinstance(part, Mixer)]
    if family in DUAL_FAMILIES:
        of_mixer = _in_common([dual_settings(mixer, family) for mixer in mixers], title)
        if of_mixer.pop("gate_norm_epsilon") != config.norm_epsilon:
            raise InputError(
                f"{title} has one epsilon for all norms, but this model has several: it cannot be saved in that format."
            )
    else:
        of_mixer = _mixer_settings(mixers, title)
    of_model = {field: getattr(config, field) for field in _FAMILIES[family].keys if hasattr(config, field)}
    return family, {**of_model, **of_mixer, "layers": len(model.stack.blocks)}


def _in_common(settings: Sequence[dict[str, Any]], title: str) -> dict[str, Any]:
    """Return the settings of all layers, which must be equal."""
    if any(one != settings[0] for one in settings):
        raise InputError(
            f"{title} has the same settings in every layer, but the mixers of this model differ: "
            "it cannot be saved in that format."
        )
    return settings[0]


def _mixer_settings(mixers: Sequence[Mixer], title: str) -> dict[str, Any]:
    """Return the settings of all mixers, which must be equal."""
    found = []
    for mixer in mixers:
        if not isinstance(mixer, SelectiveMixer) or mixer.complex_state or mixer.selective != SELECTED:
            raise InputError(
                f"{title} has only fully selective mixers with a real state, but this model has others: "
                "it cannot be saved in that format."
            )
        values = {
            "state_size": mixer.state_size,
            "kernel_width": mixer.convolution_weight.shape[1],
            "expansion": mixer.inner_width // mixer.input_projection.in_features,
            "step_rank": mixer.step_rank,
            "linear_bias": mixer.input_projection.bias is not None,
            "convolution_bias": mixer.convolution_bias is not None,
        }
        found.append(values)
    return _in_common(found, title)


def _complement(settings: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path) -> tuple[int, ...] | None:
    """Return the configuration's complement; the tensors that hold it, removed from `tensors`, must agree."""
    stated = settings["complement"]
    if not settings["equivariant"]:
        return stated
    kept = {name: tuple(tensors.pop(name).tolist()) for name in CADUCEUS_COMPLEMENTS if name in tensors}
    if stated is None and kept:
        stated = next(iter(kept.values()))
    if stated is None:
        raise InputError(
            f"{folder / CONFIG_NAME} lacks {FAMILIES['caduceus'].keys['complement'].name}: "
            "an equivariant model needs the complement of every token."
        )
    longest = max(len(table) for table in (stated, *kept.values()))
    for name, table in kept.items():
        if not torch.equal(complement_table(table, longest), complement_table(stated, longest)):
            raise InputError(
                f"{folder} has {list(table)} in {name} but {list(stated)} in its {CONFIG_NAME}: "
                "use the complement that the model was trained with."
            )
    return stated
