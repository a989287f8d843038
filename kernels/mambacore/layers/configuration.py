"""The mixers of a stack as a configuration describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mambacore.errors import InputError
from mambacore.layers.mixer import mixer_options

# A name, a mapping of a name and options, or a list of these with one for each layer: a hybrid.
MixerChoice = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


def layer_descriptions(mixer: MixerChoice, layers: int, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping of `name` and options per layer, as `ResidualStack` takes them.

    Args:
        mixer: the choice; a single name or mapping is used in every layer.
        layers: number of layers.
        shared: options for every mixer that has them; the options of a mapping take precedence.

    Raises:
        InputError: an unknown mixer or option, or a list of another length than `layers`.
    """
    choices = [mixer] * layers if isinstance(mixer, str | Mapping) else list(mixer)
    if len(choices) != layers:
        raise InputError(
            f"mixer lists {len(choices)} mixers but layers is {layers}; list one for each layer, or give a single one"
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
