"""The recipe of species classification."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from genomamba.classification.part_fit import PartSettings
from genomamba.models.species_classifier import SpeciesClassifierConfig
from mambapipelines.training.recipe import TrainingRecipe


@dataclass(frozen=True)
class CalibrationRecipe:
    """Held-out windows for calibration, after training: at each length about `bases_per_class` of every class."""

    bases_per_class: int = 524_288
    maximum_windows_per_class: int = 128


@dataclass(frozen=True)
class PartsRecipe:
    """The parts of the classifier; see `genomamba.classification.part_fit.PartSettings`."""

    stack: bool = True
    markov: bool = True
    kmer: bool = True
    words: bool = True
    markov_order: int = 10
    gate: bool = True
    gate_steps: int = 300

    def settings(self) -> PartSettings:
        """Return the settings for fitting the parts."""
        return PartSettings(**asdict(self))


@dataclass(frozen=True)
class SpeciesRecipe(TrainingRecipe):
    """A recipe of species classification.

    The package brings `tiny` (seconds; for tests), `demo` (the three-minute demo) and `small` (the default).
    """

    # The classes come from the genomes, never from a recipe.
    model_defaults: ClassVar[dict[str, Any]] = {
        item.name: item.default for item in fields(SpeciesClassifierConfig) if item.name != "class_names"
    }

    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)
    parts: PartsRecipe = field(default_factory=PartsRecipe)

    def positive_values(self) -> dict[str, float]:
        """Return values of task-specific sections that must be positive, by key."""
        positive: dict[str, float] = {f"calibration.{key}": value for key, value in asdict(self.calibration).items()}
        return positive | {"parts.markov_order": self.parts.markov_order, "parts.gate_steps": self.parts.gate_steps}
