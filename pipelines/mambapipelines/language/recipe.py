"""Pretraining recipes: model, objective, windows and masking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from genomamba.baselines.interpolated_markov import MAXIMUM_ORDER
from genomamba.data.intervals import WINDOW_RULES
from genomamba.letter_policy import LETTER_POLICIES
from genomamba.models.language_model import OBJECTIVES, CoreModel, build_language_model
from mambacore.errors import InputError
from mambacore.layers.configuration import layer_descriptions
from mambapipelines.training.recipe import TrainingRecipe

_MIXER_OPTIONS: Final = ("state_size", "kernel_width", "expansion", "step_rank")
_ONLY_OF: Final = {
    "causal": ("context_widths", "output_context_widths"),
    "masked": ("equivariant", "combination", "tied_projections"),
}


@dataclass(frozen=True)
class WindowsRecipe:
    """How windows are cut and tokenised.

    `rule` (used with an interval file) and `letters` name a window rule and a letter policy of `genomamba`.
    Windows with fewer scored bases than `minimum_scored_fraction` of their length are not used. A causal window longer
    than `piece_length` goes through the model in pieces of that length, exactly, in the memory of one.

    With a `counted_order` above 0, the trained causal model is finally interpolated with a Markov model of
    that order, counted from the training bases (`genomamba.models.interpolation`). That takes 4^order * 16 bytes: 67
    MB for order 11.
    """

    rule: str = field(default="mamba", metadata={"choices": tuple(WINDOW_RULES)})
    letters: str = field(default="bases", metadata={"choices": tuple(LETTER_POLICIES)})
    reverse_complement_probability: float = 0.5
    minimum_scored_fraction: float = 0.0
    piece_length: int = 16_384
    counted_order: int = 0


@dataclass(frozen=True)
class MaskingRecipe:
    """Masking: the fraction of positions that are targets, and how many of these become [MASK] or a random base."""

    fraction: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1


@dataclass(frozen=True)
class PretrainingRecipe(TrainingRecipe):
    """A pretraining recipe; `validation.windows_per_class` is the number of held-out windows (there are no classes)."""

    folder: ClassVar[str] = "pretraining"
    model_defaults: ClassVar[dict[str, Any]] = {
        "model_width": 128,
        "layers": 12,
        "mixer": "selective",
        "state_size": 16,
        "kernel_width": 4,
        "expansion": 2,
        "step_rank": None,
        "tied_head": True,
        "context_widths": [],
        "output_context_widths": [],
        "equivariant": False,
        "combination": "add",
        "tied_projections": True,
    }

    objective: str = field(default="causal", metadata={"choices": OBJECTIVES})
    pretraining: WindowsRecipe = field(default_factory=WindowsRecipe)
    masking: MaskingRecipe = field(default_factory=MaskingRecipe)

    def positive_values(self) -> dict[str, float]:
        """Values of the task-specific sections that must be positive, by key."""
        return {
            "pretraining.piece_length": self.pretraining.piece_length,
            "masking.fraction": self.masking.fraction,
        }

    def check(self) -> None:
        """Refuse shares outside 0 to 1, and settings of the other objective, which would have no effect.

        Raises:
            InputError: names the key.
        """
        masking, windows = self.masking, self.pretraining
        shares = {
            "pretraining.reverse_complement_probability": windows.reverse_complement_probability,
            "pretraining.minimum_scored_fraction": windows.minimum_scored_fraction,
            "masking.fraction": masking.fraction,
            "masking.mask_share": masking.mask_share,
            "masking.random_share": masking.random_share,
            "masking.mask_share + masking.random_share": masking.mask_share + masking.random_share,
        }
        for key, share in shares.items():
            if not 0 <= share <= 1:
                raise InputError(f"{key} in the recipe is {share}: use a number from 0 to 1.")
        if not 0 <= windows.counted_order <= MAXIMUM_ORDER:
            raise InputError(
                f"pretraining.counted_order in the recipe is {windows.counted_order}: use 0 for none, or up to "
                f"{MAXIMUM_ORDER}."
            )
        joinable = not (self.model.get("tied_head", True) or self.model.get("output_context_widths"))
        if windows.counted_order and not (self.objective == "causal" and joinable):
            raise InputError(
                "pretraining.counted_order in the recipe is for causal models with model.tied_head false and no "
                "model.output_context_widths: change those, or set it to 0."
            )
        for objective, keys in _ONLY_OF.items():
            for key in keys:
                changed = self.model.get(key, self.model_defaults[key]) != self.model_defaults[key]
                if objective != self.objective and changed:
                    raise InputError(
                        f"model.{key} in the recipe is for the objective {objective}, and this is {self.objective}: "
                        "leave it out, or choose another --objective or --recipe."
                    )
        if self.model.get("equivariant") and windows.reverse_complement_probability > 0:
            raise InputError(
                "an equivariant model reads both strands alike, so reading windows on the other strand does nothing: "
                "set pretraining.reverse_complement_probability to 0."
            )

    def build_model(self) -> CoreModel:
        """Build a model, initialised with PyTorch's random numbers.

        Raises:
            InputError: the settings are not valid for this model.
        """
        settings: Mapping[str, Any] = self.model_defaults | self.model
        shared = {name: settings[name] for name in _MIXER_OPTIONS}
        common = {"model_width": settings["model_width"], "tied_head": settings["tied_head"]}
        if self.objective == "masked":
            if not isinstance(settings["mixer"], str | Mapping):
                raise InputError("a masked model has one mixer for all its layers: give model.mixer a single one.")
            (mixer,) = layer_descriptions(settings["mixer"], 1, shared)
            own = {"layers": settings["layers"], "mixer": mixer}
            own |= {name: settings[name] for name in ("equivariant", "combination", "tied_projections")}
            return build_language_model("masked", common | own)
        own = {"mixers": layer_descriptions(settings["mixer"], settings["layers"], shared)}
        own |= {name: settings[name] for name in ("context_widths", "output_context_widths")}
        return build_language_model("causal", common | own)
