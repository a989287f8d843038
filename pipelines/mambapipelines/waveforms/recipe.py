"""Recipes for training waveform models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Final, Self

from audiomamba.data.preparation import ClipPreparation
from audiomamba.data.quantisers import SCHEMES, Quantiser
from audiomamba.models import ARCHITECTURES, StageConfig, WaveformModelConfig, architecture
from audiomamba.models.architectures import ABLATION
from mambacore.errors import InputError
from mambapipelines.training.recipe import TrainingRecipe

# What a recipe says of the model beside `architecture`: all of the configuration but what other sections say.
_MODEL_KEYS = tuple(
    item.name for item in fields(WaveformModelConfig) if item.name not in ("quantiser", "label_sets", "preparation")
)
# What the section `samples` was called in recipes and in the fingerprints of runs.
_EARLIER_SAMPLES_KEY = "drawn"

LONGEST_END_SECONDS: Final = 10.0


@dataclass(frozen=True)
class ClipBatchRecipe:
    """How much one step sees, in samples.

    A step takes `samples_per_step / clip_length` clips, at least `minimum_clips_per_step`; shorter clips are padded,
    longer ones cut at a random place. Gradients are accumulated over micro-batches of about `samples_per_micro_batch`.
    Clips longer than `piece_length` go through the model in pieces of this length, with exact gradients.
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
        """Clips of `length` samples that go through the model at once."""
        return min(self.clips_per_step(length), max(1, self.samples_per_micro_batch // length))


@dataclass(frozen=True)
class QuantiserRecipe:
    """How samples become classes: see `audiomamba.data.quantisers.Quantiser`."""

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
    """Clips that are generated at every validation, to be listened to and looked at; none when `clips` is 0."""

    clips: int = 4
    seconds: float = 1.0


@dataclass(frozen=True)
class PreparationRecipe:
    """What is done to clips: see `audiomamba.data.preparation.ClipPreparation`.

    `end_seconds` of silence follow each clip in training, so that the model learns where clips end and falls silent.
    """

    target_rms: float = 0.0
    largest_gain: float = 20.0
    trim_db: float = 0.0
    end_seconds: float = 0.0


@dataclass(frozen=True)
class LabelsRecipe:
    """How often examples come without their labels: `drop_labels` of `audiomamba.data.clips.ClipSampler`."""

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
    # Names that recipes had before; as their own architectures, so that older runs resume.
    aliases: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
        name: (ABLATION, {"model": {"architecture": name}})
        for name in ("mamba-sc09-6m", *(one for one in ARCHITECTURES if one.startswith(f"{ABLATION}-")))
    }

    batch: ClipBatchRecipe = field(default_factory=ClipBatchRecipe)  # type: ignore[assignment]
    validation: ClipValidationRecipe = field(default_factory=ClipValidationRecipe)  # type: ignore[assignment]
    quantiser: QuantiserRecipe = field(default_factory=QuantiserRecipe)
    preparation: PreparationRecipe = field(default_factory=PreparationRecipe)
    labels: LabelsRecipe = field(default_factory=LabelsRecipe)
    samples: SamplesRecipe = field(default_factory=SamplesRecipe)

    @classmethod
    def from_dict(cls, content: object, source: str = "the recipe") -> Self:
        """As `TrainingRecipe.from_dict`; `drawn`, the earlier name of the section `samples`, is understood.

        Raises:
            InputError: an unknown key, a value of the wrong kind, or one out of range.
        """
        if isinstance(content, Mapping) and isinstance(content.get(_EARLIER_SAMPLES_KEY), Mapping):
            earlier, rest = content[_EARLIER_SAMPLES_KEY], {**content}
            del rest[_EARLIER_SAMPLES_KEY]
            content = {**rest, "samples": {**(rest.get("samples") or {}), **earlier}}
        recipe = super().from_dict(content, source)
        if not 0 <= recipe.labels.drop_probability < 1:
            raise InputError(
                f"labels.drop_probability in {source} must be at least 0 and below 1, not "
                f"{recipe.labels.drop_probability:g}: correct the recipe"
            )
        if not 0 <= recipe.preparation.end_seconds <= LONGEST_END_SECONDS:
            raise InputError(
                f"preparation.end_seconds in {source} must be from 0 to {LONGEST_END_SECONDS:g}, not "
                f"{recipe.preparation.end_seconds:g}: correct the recipe"
            )
        return recipe

    def fingerprint(self) -> dict[str, Any]:
        """The recipe as runs record it: new sections only where they say something, so that older runs can resume."""
        values = self.to_dict()
        values[_EARLIER_SAMPLES_KEY] = values.pop("samples")
        for name, default in (("preparation", PreparationRecipe()), ("labels", LabelsRecipe())):
            if getattr(self, name) == default:
                del values[name]
        return values

    def positive_values(self) -> dict[str, float]:
        """Values of the task's own sections that must be greater than 0, by key."""
        return {"samples.seconds": self.samples.seconds}

    def build_preparation(self) -> ClipPreparation:
        """What is done to clips before they are quantised.

        Raises:
            InputError: values out of range.
        """
        values = asdict(self.preparation)
        del values["end_seconds"]
        return ClipPreparation(**values)

    def build_quantiser(self) -> Quantiser:
        """The quantiser.

        Raises:
            InputError: values outside of what it takes.
        """
        return Quantiser(**asdict(self.quantiser))

    def model_config(self) -> WaveformModelConfig:
        """The model that the recipe describes.

        Raises:
            InputError: no architecture and no stages, an unknown name or key, or values that do not fit together.
        """
        given = {name: value for name, value in self.model.items() if value is not None}
        name = given.pop("architecture", None)
        blocks = {key: given.pop(key, None) for key in ("outer", "centre")}
        if name is None and "stages" not in given:
            raise InputError("the recipe's model has neither an architecture nor stages; give one of them")
        if "stages" in given:
            given["stages"] = _stages(given["stages"])
        given |= {"quantiser": self.build_quantiser(), "preparation": self.build_preparation()}
        if name is None:
            if any(blocks.values()):
                raise InputError(f"model.outer and model.centre are for model.architecture={ABLATION}; leave them out")
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
                    f"a stage of the recipe's model has the unknown key {key!r}; known are {', '.join(known)}"
                )
        if "layers" not in stage:
            raise InputError("a stage of the recipe's model states no layers; say how many it has")
    return tuple(StageConfig(**stage) for stage in stages)
