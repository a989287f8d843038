"""Recipes of sequence-level models, and building of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from genomamba.data.targets import TargetDescription
from genomamba.models.language_model import LanguageModel, load_language_model
from genomamba.models.sequence_model import SequenceModel, SequenceModelConfig, sequence_model_on
from mambacore.errors import InputError
from mambacore.layers.configuration import layer_descriptions
from mambapipelines.training.recipe import TrainingRecipe

MODEL_DEFAULTS: dict[str, Any] = {
    "model_width": 64,
    "layers": 2,
    "mixer": "selective",
    "state_size": 8,
    "kernel_width": 4,
    "expansion": 2,
    "step_rank": None,
    "context_widths": (),
}


@dataclass(frozen=True)
class SequenceRecipe(TrainingRecipe):
    """A recipe; `model` has the settings of a model trained from scratch, as in `SpeciesClassifierConfig`."""

    folder: ClassVar[str] = "finetuning"
    model_defaults: ClassVar[dict[str, Any]] = MODEL_DEFAULTS


def load_start(start_from: str | None, changes: Sequence[str]) -> LanguageModel | None:
    """Load the language model to start from, if any.

    Raises:
        InputError: if `model` in the recipe is changed, which the language model determines, or as
            `load_language_model`.
    """
    if start_from is None:
        return None
    for change in changes:
        if change.strip().startswith("model."):
            raise InputError(f"--set {change} is determined by the model given with --from: remove it.")
    return load_language_model(start_from)


def build_sequence_model(
    recipe: TrainingRecipe,
    targets: TargetDescription,
    pooling: str,
    both_strands: bool,
    seed: int,
    language_model: LanguageModel | None,
) -> SequenceModel:
    """Build a model with the weights of the language model, or random ones that depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if language_model is not None:
            return sequence_model_on(language_model, targets, pooling, both_strands)
        shape = {**MODEL_DEFAULTS, **recipe.model}
        shared = {name: shape[name] for name in ("state_size", "kernel_width", "expansion", "step_rank")}
        core = {
            "model_width": shape["model_width"],
            "mixers": layer_descriptions(shape["mixer"], shape["layers"], shared),
            "context_widths": list(shape["context_widths"]),
        }
        return SequenceModel(SequenceModelConfig("causal", core, targets, pooling, both_strands))
