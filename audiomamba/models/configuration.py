"""Configuration of a waveform model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from audiomamba.data.clock import Clock
from audiomamba.data.labels import LabelSet
from audiomamba.data.preparation import ClipPreparation
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.sampling_settings import SamplingSettings
from mambacore.errors import InputError
from mambacore.layers.configuration import MixerChoice, layer_descriptions


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """The blocks at one depth.

    Attributes:
        layers: mixers in each stage at this depth.
        mixer: the mixer: a name of `mambacore.layers.MIXERS`, a mapping of `name` and options, or a list
            of these with one per layer.
        feed_forward_expansion: each mixer is followed by a feed-forward block with this many hidden channels per
            channel; 0 for none.

    Raises:
        InputError: if a mixer or option is unknown, or the list's length differs from the number of layers.
    """

    layers: int
    mixer: MixerChoice = "selective"
    feed_forward_expansion: int = 0

    def __post_init__(self) -> None:
        _check_whole("layers", self.layers, 1)
        _check_whole("feed_forward_expansion", self.feed_forward_expansion, 0)
        self.mixers()

    def mixers(self) -> list[dict[str, Any]]:
        """One mapping of `name` and options per layer."""
        return layer_descriptions(self.mixer, self.layers, {})


@dataclasses.dataclass(frozen=True)
class WaveformModelConfig:
    """Configuration of an `audiomamba.models.WaveformModel`.

    Attributes:
        stages: the blocks at each depth, from the sampling rate downwards; the last is the centre. Down- and upsampling
            paths have the same stages.
        model_width: channels at the sampling rate.
        pooling: positions per group between adjacent depths, one fewer than stages. Empty for a model at
            the sampling rate only.
        width_growth: factor by which a depth is wider than the one above it.
        blocks_on_the_way_down: whether the downsampling path has stages too (the U-Net); if not, the original SaShiMi.
        quantiser: quantiser of the samples, with their rate; its classes are the model's inputs and outputs.
        label_sets: label sets that the model is conditioned on; empty for an unconditional model.
        preparation: preparation of the training clips, and so of all inputs.
        clock: the clock that the model is conditioned on, if it has bins.
        sampling: how clips are sampled unless a caller says otherwise.

    Raises:
        InputError: if values are inconsistent.
    """

    stages: tuple[StageConfig, ...]
    model_width: int = 64
    pooling: tuple[int, ...] = (4, 4)
    width_growth: int = 2
    blocks_on_the_way_down: bool = True
    quantiser: Quantiser = dataclasses.field(default_factory=Quantiser)
    label_sets: tuple[LabelSet, ...] = ()
    preparation: ClipPreparation = dataclasses.field(default_factory=ClipPreparation)
    clock: Clock = dataclasses.field(default_factory=Clock)
    sampling: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        for name in ("stages", "pooling", "label_sets"):
            if not isinstance(getattr(self, name), list | tuple):
                raise InputError(f"{name} is {getattr(self, name)!r} in the model's configuration; give a list")
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "pooling", tuple(self.pooling))
        object.__setattr__(self, "label_sets", tuple(self.label_sets))
        if any(len(one.labels) != len(self.label_sets) for one in self.clock.durations):
            raise InputError("the clock's durations are of other label sets than the model's; the folder is damaged")
        names = [one.name for one in self.label_sets]
        if len(set(names)) != len(names):
            raise InputError(f"two label sets have the same name ({', '.join(names)}); give each its own")
        _check_whole("model_width", self.model_width, 1)
        _check_whole("width_growth", self.width_growth, 1)
        for factor in self.pooling:
            _check_whole("pooling", factor, 2)
        if not isinstance(self.blocks_on_the_way_down, bool):
            raise InputError(f"blocks_on_the_way_down is {self.blocks_on_the_way_down!r}; give true or false")
        if len(self.stages) != len(self.pooling) + 1:
            raise InputError(
                f"{len(self.pooling)} poolings separate {len(self.pooling) + 1} depths but {len(self.stages)} "
                "stages are given; give one for each depth"
            )

    def width(self, depth: int) -> int:
        """Channels at a depth; 0 is the sampling rate."""
        return self.model_width * self.width_growth**depth

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        values["stages"] = [{**stage, "mixer": _plain(stage["mixer"])} for stage in values["stages"]]
        values["label_sets"] = [one.to_config() for one in self.label_sets]
        values["preparation"] = self.preparation.to_config()
        values["clock"] = self.clock.to_config()
        values["sampling"] = self.sampling.to_config()
        return {**values, "pooling": list(self.pooling), "quantiser": self.quantiser.to_config()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WaveformModelConfig:
        """Inverse of `to_dict`.

        Raises:
            InputError: if a key is unknown or missing, or a value is invalid.
        """
        values = {**_ABSENT_EARLIER, **values}
        _check_keys(cls, values, "the model's configuration")
        stages = values["stages"]
        if not isinstance(stages, list | tuple) or not all(isinstance(stage, Mapping) for stage in stages):
            raise InputError("stages in the model's configuration is not a list of tables; give one for each depth")
        for stage in stages:
            _check_keys(StageConfig, stage, "a stage of the model's configuration")
        if not isinstance(values["pooling"], list | tuple):
            raise InputError(f"pooling is {values['pooling']!r} in the model's configuration; list integers")
        sets = values["label_sets"]
        if not isinstance(sets, list | tuple) or not all(isinstance(one, Mapping) for one in sets):
            raise InputError("label_sets in the model's configuration is not a list of tables; the folder is damaged")
        for one in sets:
            _check_keys(LabelSet, one, "a label set of the model's configuration")
        built = {
            "label_sets": tuple(LabelSet(**one) for one in sets),
            "preparation": ClipPreparation.from_config(values["preparation"]),
            "clock": Clock.from_config(values["clock"]),
            "sampling": SamplingSettings.from_config(values["sampling"]),
            "stages": tuple(StageConfig(**stage) for stage in stages),
            "quantiser": Quantiser.from_config(values["quantiser"]),
        }
        return cls(**{**values, **built})


# Folders written before models had labels, a clock, or settings of sampling lack these keys.
_ABSENT_EARLIER: Mapping[str, Any] = {"label_sets": (), "preparation": {}, "clock": {}, "sampling": {}}


def _plain(mixer: Any) -> Any:
    """Return a mixer choice with plain, JSON-serialisable mappings and lists."""
    if isinstance(mixer, Mapping):
        return dict(mixer)
    return mixer if isinstance(mixer, str) else [_plain(choice) for choice in mixer]


def _check_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise InputError(f"{where} has the unknown key {name!r}; known are {', '.join(known)}")
    for name in known:
        if name not in values:
            raise InputError(f"{where} has no {name}; the model folder is damaged")


def _check_whole(name: str, value: object, smallest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise InputError(f"{name} is {value!r} in the model's configuration; give an integer from {smallest}")
