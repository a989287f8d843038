"""Initialisation of a species classifier from a pretrained DNA language model.

The embedding, the stack and the next-base head are copied; the classes, as always, start without evidence. The
classifier has the shape of the language model, except for the language model's output context tables
(`output_context_widths`): their part of the predictions is learned anew.
"""

import zlib
from typing import Any, Final

import torch
from torch import nn

from genomamba.models.language_model import LanguageModel
from genomamba.models.species_classifier import BASES, FIRST_BASE_TOKEN, SpeciesClassifier, SpeciesClassifierConfig
from genomamba.tokenizer import ANY_BASE_TOKEN
from mambacore.errors import InputError
from mambacore.layers.mixer import mixer_options
from mambacore.models import CausalLanguageModel, CausalLanguageModelConfig

TAKEN_SETTINGS: Final = (
    "model_width",
    "layers",
    "mixer",
    "state_size",
    "kernel_width",
    "expansion",
    "step_rank",
    "context_widths",
)
"""Settings of the classifier that are determined by the language model."""

NORM_EPSILON: Final = 1e-5
"""Norm epsilon of a classifier's stack: the default of `mambacore.layers.ResidualStack`."""

_SHARED_OPTIONS: Final = ("state_size", "kernel_width", "expansion", "step_rank")


def classifier_settings(language_model: LanguageModel) -> dict[str, Any]:
    """Return the settings of `SpeciesClassifierConfig` that match a language model: width, layers, mixer, contexts.

    Raises:
        InputError: if the model is masked, or its norms differ from the classifier's.
    """
    config = _causal_configuration(language_model)
    if config.norm_epsilon != NORM_EPSILON:
        raise InputError(
            f"{language_model.source} has norms with the epsilon {config.norm_epsilon}, but a species classifier "
            f"{NORM_EPSILON}: give another language model."
        )
    return {
        "model_width": config.model_width,
        "layers": len(config.mixers),
        "mixer": [_with_own_options(mixer) for mixer in config.mixers],
        # The token itself counts as a context of one base.
        "context_widths": sorted({1, *config.context_widths}),
    }


def start_from_language_model(classifier: SpeciesClassifier, language_model: LanguageModel) -> None:
    """Copy a causal language model's weights into a classifier of the same shape.

    Contexts that only the classifier has are initialised to zero.

    Raises:
        InputError: if the model is masked, or the shapes differ; the message names the first difference.
    """
    config = _causal_configuration(language_model)
    core = language_model.model
    assert isinstance(core, CausalLanguageModel)
    _require_same_shape(classifier.config, classifier_settings(language_model), language_model.source)
    tokens = slice(FIRST_BASE_TOKEN, FIRST_BASE_TOKEN + BASES)
    contexts = core.contexts.state_dict() if core.contexts is not None else {}
    embedded = core.embedding.weight.detach()
    with torch.no_grad():
        for width, table in zip(classifier.config.context_widths, classifier.embedding.tables, strict=True):
            assert isinstance(table, nn.Embedding)
            table.weight.zero_()
            if width in config.context_widths:
                table.weight.copy_(contexts[f"tables.{config.context_widths.index(width)}.weight"])
            if width == 1:
                table.weight[:BASES] += embedded[tokens]
                # The last row is for everything that is not a base.
                table.weight[BASES] += embedded[ANY_BASE_TOKEN]
        classifier.stack.load_state_dict(core.stack.state_dict())
        head = core.embedding if core.head is None else core.head
        classifier.next_base.weight.copy_(head.weight[tokens, : config.model_width])
        classifier.next_base.bias.zero_()


def weights_checksum(model: nn.Module) -> str:
    """Return a checksum of the parameters that identifies a pretrained model, eight hexadecimal digits."""
    checksum = 0
    for name, tensor in sorted(model.state_dict().items()):
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), checksum)
        checksum = zlib.crc32(name.encode(), checksum)
    return f"{checksum:08x}"


def _causal_configuration(language_model: LanguageModel) -> CausalLanguageModelConfig:
    language_model.require("causal", "a species classifier, which processes records of any length in pieces,")
    assert isinstance(language_model.model, CausalLanguageModel)
    return language_model.model.config


def _require_same_shape(config: SpeciesClassifierConfig, wanted: dict[str, Any], source: str) -> None:
    """Check that the weights fit a classifier; the message names the first difference."""
    for name in ("model_width", "layers"):
        if getattr(config, name) != wanted[name]:
            raise InputError(
                f"{source} has {name} {wanted[name]} but the classifier {getattr(config, name)}: give the classifier "
                "the same."
            )
    for number, (description, other) in enumerate(
        zip(config.layer_descriptions(), wanted["mixer"], strict=True), start=1
    ):
        own = _with_own_options(description)
        different = [name for name in {**own, **other} if own.get(name) != other.get(name)]
        if different:
            name = "name" if "name" in different else different[0]
            raise InputError(
                f"layer {number} of {source} has the mixer's {name} {other.get(name)} but the classifier "
                f"{own.get(name)}: give the classifier the same."
            )
    lacking = sorted(set(wanted["context_widths"]) - set(config.context_widths))
    if lacking:
        raise InputError(
            f"{source} embeds contexts of {lacking[0]} bases but the classifier does not: add {lacking[0]} to its "
            "context_widths."
        )


def _with_own_options(mixer: Any) -> dict[str, Any]:
    """Return a mixer description with explicit options, so that no setting of the classifier affects it."""
    description = {"name": mixer} if isinstance(mixer, str) else dict(mixer)
    defaults = mixer_options(str(description["name"]))
    return {name: defaults[name] for name in _SHARED_OPTIONS if name in defaults} | description
