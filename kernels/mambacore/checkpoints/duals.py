"""Conversion between settings of Mamba-2 and Mamba-3 checkpoints and of our mixers."""

from __future__ import annotations

from typing import Any, Final

from mambacore.checkpoints.names import MAMBA_SSM_NORM_EPSILON
from mambacore.checkpoints.names_dual import DUAL_FAMILIES, MAMBA3_SHARES
from mambacore.errors import InputError
from mambacore.layers import Mamba2Mixer, Mamba3Mixer, Mixer
from mambacore.models import CausalLanguageModel, CausalLanguageModelConfig

_MAMBA2_OPTIONS: Final = (
    "state_size", "head_width", "groups", "kernel_width", "expansion", "linear_bias", "convolution_bias", "step_limits",
)  # fmt: skip
_MAMBA3_OPTIONS: Final = ("state_size", "head_width", "groups", "expansion", "rotated_share", "output_norm", "rank")


def dual_model(family: str, settings: dict[str, Any], source: object) -> CausalLanguageModel:
    """Build a model with the settings of a Mamba-2 or Mamba-3 checkpoint.

    Args:
        family: a name of DUAL_FAMILIES.
        settings: settings from `read_settings`.
        source: name of the configuration in messages.

    Raises:
        InputError: if settings contradict each other or are not supported here.
    """
    settings = dict(settings)
    if family == "mamba_ssm_mamba3":
        several, rank = settings.pop("several"), settings["rank"]
        if several and rank == 1:
            raise InputError(f"{source} has a mimo_rank of 1, which is not supported here: set is_mimo to false.")
        if settings["rotated_share"] not in MAMBA3_SHARES:
            raise InputError(f"{source} has a rope_fraction of {settings['rotated_share']}, which is not 0.5 or 1.0.")
        settings["rank"] = rank if several else 1
        mixer: dict[str, Any] = {"name": Mamba3Mixer.name, **{name: settings.pop(name) for name in _MAMBA3_OPTIONS}}
    else:
        mixer = {"name": Mamba2Mixer.name, **{name: settings.pop(name) for name in _MAMBA2_OPTIONS}}
        mixer["norm_epsilon"] = settings.get("norm_epsilon", MAMBA_SSM_NORM_EPSILON)
    heads, width = settings.pop("heads", None), mixer["expansion"] * settings["model_width"]
    if heads is not None and heads * mixer["head_width"] != width:
        raise InputError(
            f"{source} has {heads} heads of {mixer['head_width']} channels, which are not its {width} inner channels."
        )
    mixers = (mixer,) * settings.pop("layers")
    return CausalLanguageModel(CausalLanguageModelConfig(**settings, mixers=mixers))


def dual_family(model: CausalLanguageModel, program: str) -> str | None:
    """Return the family of this model in a program (`transformers`, `mamba_ssm`): Mamba-2, Mamba-3, or None."""
    kinds = {type(part) for part in model.stack.modules() if isinstance(part, Mixer)}
    if kinds == {Mamba2Mixer}:
        return f"{program}_mamba2"
    if kinds == {Mamba3Mixer}:
        family = f"{program}_mamba3"
        if family not in DUAL_FAMILIES:
            raise InputError(f"{program} does not support Mamba-3, which this model uses: save it for mamba_ssm.")
        return family
    return None


def dual_settings(mixer: Mixer, family: str) -> dict[str, Any]:
    """Return the settings of a mixer, by our names, for `write_settings` with this family.

    Raises:
        InputError: if the other program does not support the mixer.
    """
    title = DUAL_FAMILIES[family].title
    if isinstance(mixer, Mamba2Mixer):
        return {
            "state_size": mixer.state_size,
            "head_width": mixer.head_width,
            "heads": mixer.heads,
            "groups": mixer.groups,
            "kernel_width": mixer.convolution_weight.shape[1],
            "expansion": mixer.inner_width // mixer.input_projection.in_features,
            "linear_bias": mixer.input_projection.bias is not None,
            "convolution_bias": mixer.convolution_bias is not None,
            "step_limits": mixer.step_limits,
            "gate_norm_epsilon": mixer.gate_norm.epsilon,
        }
    assert isinstance(mixer, Mamba3Mixer)
    if not mixer.trapezoidal or mixer.rotated_share not in MAMBA3_SHARES:
        raise InputError(
            f"{title} always has the trapezoidal rule and half or all of the states rotate, and this model differs: "
            "it cannot be saved in that format."
        )
    return {
        "state_size": mixer.state_size,
        "head_width": mixer.head_width,
        "groups": mixer.groups,
        "expansion": mixer.inner_width // mixer.input_projection.in_features,
        "rotated_share": mixer.rotated_share,
        "output_norm": mixer.output_norm_weight is not None,
        "several": mixer.rank > 1,
        "rank": mixer.rank,
        "gate_norm_epsilon": MAMBA_SSM_NORM_EPSILON,
    }
