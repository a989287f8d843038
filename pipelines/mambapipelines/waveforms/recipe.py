"""Recipes for training waveform models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Final, Self

from audiomamba.data.clock import Clock
from audiomamba.data.preparation import ClipPreparation
from audiomamba.data.quantisers import SCHEMES, Quantiser
from audiomamba.data.sampling_settings import SamplingSettings
from audiomamba.models import ARCHITECTURES, StageConfig, WaveformModelConfig, architecture
from audiomamba.models.architectures import ABLATION
from mambacore.errors import InputError
from mambapipelines.training.recipe import TrainingRecipe

# Keys of `model` besides `architecture`: the configuration, except for what other sections define.
_MODEL_KEYS = tuple(
    item.name
    for item in fields(WaveformModelConfig)
    if item.name not in ("quantiser", "label_sets", "preparation", "clock", "sampling")
)
# What the section `samples` was called in recipes and in the fingerprints of runs.
_EARLIER_SAMPLES_KEY = "drawn"

LONGEST_END_SECONDS: Final = 10.0


@dataclass(frozen=True)
class ClipBatchRecipe:
    """Sizes of a step and of micro-batches, in samples.

    A step takes `samples_per_step / clip_length` clips, at least `minimum_clips_per_step`; shorter clips are padded,
    longer ones cropped at a random position. Gradients are accumulated over micro-batches of about
    `samples_per_micro_batch`. Clips longer than `piece_length` are processed in pieces of this length, with exact
    gradients.
    """

    clip_length: int = 16_000
    samples_per_step: int = 256_000
    minimum_clips_per_step: int = 1
    samples_per_micro_batch: int = 32_000
    piece_length: int = 65_536

    def clips_per_step(self, length: int) -> int:
        """Clips of `length` samples in one optimiser step."""
        return max(self.minimum_clips_per_step, self.samples_per_step // length)

    def clips_per_micro_batch(self, length: int) -> int:
        """Clips of `length` samples per micro-batch."""
        return min(self.clips_per_step(length), max(1, self.samples_per_micro_batch // length))


@dataclass(frozen=True)
class QuantiserRecipe:
    """Quantisation of samples: see `audiomamba.data.quantisers.Quantiser`."""

    scheme: str = field(default="mu-law", metadata={"choices": SCHEMES})
    bits: int = 8
    sample_rate_hz: int = 16_000
    full_scale: float = 1.0


@dataclass(frozen=True)
class ClipValidationRecipe:
    """Validation clips during training: every `every_fraction` of the run; about `samples` of them, spread evenly."""

    every_fraction: float = 0.05
    samples: int = 500_000


@dataclass(frozen=True)
class SamplesRecipe:
    """Clips generated at every validation, for inspection; none if `clips` is 0."""

    clips: int = 4
    seconds: float = 1.0


@dataclass(frozen=True)
class PreparationRecipe:
    """Preparation of clips: see `audiomamba.data.preparation.ClipPreparation`.

    `end_seconds` of silence follow each clip in training, so that the model learns to end clips with silence.
    """

    target_rms: float = 0.0
    largest_gain: float = 20.0
    trim_db: float = 0.0
    end_seconds: float = 0.0


@dataclass(frozen=True)
class LabelsRecipe:
    """Probability of dropping labels: `drop_labels` of `audiomamba.data.clips.ClipSampler`."""

    drop_probability: float = 0.1


@dataclass(frozen=True)
class ClockRecipe:
    """The clock (`audiomamba.data.clock`): its bins, none by default; and `drop_clock` of the `ClipSampler`."""

    bins: int = 0
    by_label: bool = False
    drop_probability: float = 0.1


@dataclass(frozen=True)
class WaveformTrainingRecipe(TrainingRecipe):
    """A recipe of a waveform model.

    `model.architecture` is the name of a published one (`audiomamba.models.architecture`), of `sc09` with its `outer`
    and `centre` blocks; other keys of `model` replace its parts, or make up the whole where there is no name. A stage
    is `layers`, `mixer` and `feed_forward_expansion`.
    """

    folder: ClassVar[str] = "audio"
    model_defaults: ClassVar[dict[str, Any]] = {
        "architecture": None,
        "outer": None,
        "centre": None,
        **dict.fromkeys(_MODEL_KEYS),
    }
    # Earlier names of recipes, with their own architectures, so that older runs can be resumed.
    aliases: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
        name: (ABLATION, {"model": {"architecture": name}})
        for name in ("mamba-sc09-6m", *(one for one in ARCHITECTURES if one.startswith(f"{ABLATION}-")))
    }

    batch: ClipBatchRecipe = field(default_factory=ClipBatchRecipe)  # type: ignore[assignment]
    validation: ClipValidationRecipe = field(default_factory=ClipValidationRecipe)  # type: ignore[assignment]
    quantiser: QuantiserRecipe = field(default_factory=QuantiserRecipe)
    preparation: PreparationRecipe = field(default_factory=PreparationRecipe)
    labels: LabelsRecipe = field(default_factory=LabelsRecipe)
    clock: ClockRecipe = field(default_factory=ClockRecipe)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    samples: SamplesRecipe = field(default_factory=SamplesRecipe)

    @classmethod
    def from_dict(cls, content: object, source: str = "the recipe") -> Self:
        """As `TrainingRecipe.from_dict`; `drawn`, the earlier name of the section `samples`, is accepted.

        Raises:
            InputError: if a key is unknown, or a value has the wrong kind or is out of range.
        """
        if isinstance(content, Mapping) and isinstance(content.get(_EARLIER_SAMPLES_KEY), Mapping):
            earlier, rest = content[_EARLIER_SAMPLES_KEY], {**content}
            del rest[_EARLIER_SAMPLES_KEY]
            content = {**rest, "samples": {**(rest.get("samples") or {}), **earlier}}
        recipe = super().from_dict(content, source)
        for name, dropped in (("labels", recipe.labels), ("clock", recipe.clock)):
            if not 0 <= dropped.drop_probability < 1:
                raise InputError(
                    f"{name}.drop_probability in {source} must be at least 0 and below 1, not "
                    f"{dropped.drop_probability:g}: correct the recipe"
                )
        if not 0 <= recipe.preparation.end_seconds <= LONGEST_END_SECONDS:
            raise InputError(
                f"preparation.end_seconds in {source} must be from 0 to {LONGEST_END_SECONDS:g}, not "
                f"{recipe.preparation.end_seconds:g}: correct the recipe"
            )
        return recipe

    def fingerprint(self) -> dict[str, Any]:
        """Return the recipe as recorded by runs: new sections only if not default, so that older runs can resume."""
        values = self.to_dict()
        values[_EARLIER_SAMPLES_KEY] = values.pop("samples")
        del values["sampling"]  # which training does not depend on
        defaults = {"preparation": PreparationRecipe(), "labels": LabelsRecipe(), "clock": ClockRecipe()}
        for name, default in defaults.items():
            if getattr(self, name) == default:
                del values[name]
        return values

    def positive_values(self) -> dict[str, float]:
        """Return values of task-specific sections that must be positive, by key."""
        return {"samples.seconds": self.samples.seconds}

    def build_preparation(self) -> ClipPreparation:
        """Build the preparation of clips before quantisation.

        Raises:
            InputError: if a value is out of range.
        """
        values = asdict(self.preparation)
        del values["end_seconds"]
        return ClipPreparation(**values)

    def build_quantiser(self) -> Quantiser:
        """Build the quantiser.

        Raises:
            InputError: if a value is invalid.
        """
        return Quantiser(**asdict(self.quantiser))

    def model_config(self) -> WaveformModelConfig:
        """Build the configuration of the model.

        Raises:
            InputError: if there is neither an architecture nor stages, a name or key is unknown, or values are
                inconsistent.
        """
        given = {name: value for name, value in self.model.items() if value is not None}
        name = given.pop("architecture", None)
        blocks = {key: given.pop(key, None) for key in ("outer", "centre")}
        if name is None and "stages" not in given:
            raise InputError("the recipe's model has neither an architecture nor stages; give one of them")
        if "stages" in given:
            given["stages"] = _stages(given["stages"])
        given |= {
            "quantiser": self.build_quantiser(),
            "preparation": self.build_preparation(),
            "clock": Clock(self.clock.bins, self.clock.by_label),
            "sampling": self.sampling,
        }
        if name is None:
            if any(blocks.values()):
                raise InputError(
                    f"model.outer and model.centre apply only to model.architecture={ABLATION}; remove them"
                )
            return WaveformModelConfig(**given)
        base = architecture(str(name), **blocks)
        return WaveformModelConfig(**{key: getattr(base, key) for key in _MODEL_KEYS} | given)


def _stages(stages: object) -> tuple[StageConfig, ...]:
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        raise InputError("model.stages of the recipe is not a list of tables; give one for each depth, with its layers")
    known = [item.name for item in fields(StageConfig)]
    for stage in stages:
        for key in stage:
            if key not in known:
                raise InputError(
                    f"a stage of the recipe's model has the unknown key {key!r}; known keys are {', '.join(known)}"
                )
        if "layers" not in stage:
            raise InputError("a stage of the recipe's model has no layers; give their number")
    return tuple(StageConfig(**stage) for stage in stages)
