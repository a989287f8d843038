"""Descriptions of a stack's mixers in configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mambacore.errors import InputError
from mambacore.layers.mixer import mixer_options

# A name, a mapping of a name and options, or a list of these with one per layer: a hybrid.
MixerChoice = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


def layer_descriptions(mixer: MixerChoice, layers: int, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one mapping of `name` and options per layer, as accepted by `ResidualStack`.

    Args:
        mixer: the choice; a single name or mapping is used in every layer.
        layers: number of layers.
        shared: options for all mixers that have them; options in a mapping take precedence.

    Raises:
        InputError: if a mixer or option is unknown, or the list's length differs from `layers`.
    """
    choices = [mixer] * layers if isinstance(mixer, str | Mapping) else list(mixer)
    if len(choices) != layers:
        raise InputError(
            f"mixer lists {len(choices)} mixers but layers is {layers}; list one per layer, or give a single one"
        )
    descriptions = []
    for choice in choices:
        if not isinstance(choice, str | Mapping):
            raise InputError(f"{choice!r} is not a mixer; give a name, or a mapping of a name and options")
        own = {"name": choice} if isinstance(choice, str) else dict(choice)
        known = mixer_options(str(own.get("name")))
        for option in own:
            if option not in ("name", *known):
                has = ", ".join(known) or "none"
                raise InputError(f"the mixer {own['name']!r} has no option {option!r}; it has {has}")
        descriptions.append({name: value for name, value in shared.items() if name in known} | own)
    return descriptions
