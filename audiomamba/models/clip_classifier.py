"""A classifier of short clips, whose predictions and features are used to score generated clips.

A ResNeXt-29 for 32x32 images (Xie et al., arXiv 1611.05431, section 4.3 and table 1) is applied to the log-mel
spectrogram of a clip. It is stored with its rate and duration: other rates are resampled, longer clips cut and shorter
ones padded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomamba.data.waveforms import Waveform, cut_or_pad, read_waveform, resample
from audiomamba.models.log_mel import LogMel, LogMelConfig
from audiomamba.weights import find_model
from mambacore.devices import device_of, to_numpy
from mambacore.errors import InputError
from mambacore.model_folder import (
    configuration_errors,
    load_tensors_into,
    read_model_folder,
    training_details,
    write_model_folder,
)

MODEL_KIND: Final = "clip classifier"
STAGES: Final = 3
CLIPS_AT_ONCE: Final = 64


@dataclasses.dataclass(frozen=True)
class ClipClassifierConfig:
    """Configuration of a clip classifier.

    Attributes:
        class_names: names of the classes, in the order of the logits.
        log_mel: rate, duration and spectrogram settings.
        stem_width: channels of the first convolution.
        stage_width: output channels of the first of three stages, doubled by each; those of the last are the features.
            256, and so 1,024 features, in the paper.
        blocks_per_stage: 3 in ResNeXt-29.
        cardinality: groups of the inner convolution; 8 in the paper.
        base_width: channels of a group in the first stage, doubled by each; 64 in the paper.

    Raises:
        InputError: if there are fewer than two classes, names are repeated, or a size is below 1.
    """

    class_names: tuple[str, ...]
    log_mel: LogMelConfig
    stem_width: int = 16
    stage_width: int = 64
    blocks_per_stage: int = 2
    cardinality: int = 4
    base_width: int = 8

    def __post_init__(self) -> None:
        if len(self.class_names) < 2 or len(set(self.class_names)) != len(self.class_names):
            raise InputError(
                f"the classes are {', '.join(self.class_names)}; a classifier needs two or more different ones"
            )
        for name in ("stem_width", "stage_width", "blocks_per_stage", "cardinality", "base_width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of a clip classifier is {getattr(self, name)}; give 1 or more")

    @property
    def feature_width(self) -> int:
        """Number of activations before the last layer."""
        return self.stage_width * 2 ** (STAGES - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_dict` is the inverse."""
        return dataclasses.asdict(self) | {"class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClipClassifierConfig:
        """Inverse of `to_dict`.

        Raises:
            InputError: if a key or value is invalid.
        """
        try:
            given = dict(values)
            log_mel = LogMelConfig(**given.pop("log_mel"))
            return cls(tuple(given.pop("class_names")), log_mel, **given)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the clip classifier's settings are damaged ({error}); copy the folder again") from error


class Block(nn.Module):
    """A residual block of ResNeXt (arXiv 1611.05431, figure 3c): narrow, convolve in groups, widen, add.

    Args:
        width: input channels.
        output_width: output channels.
        inner_width: channels of the grouped convolution, a multiple of `groups`.
        groups: the cardinality.
        stride: 2 halves height and width.
    """

    def __init__(self, width: int, output_width: int, inner_width: int, groups: int, stride: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(width, inner_width, 1, bias=False)
        self.narrow_norm = nn.BatchNorm2d(inner_width)
        self.grouped = nn.Conv2d(inner_width, inner_width, 3, stride, 1, groups=groups, bias=False)
        self.grouped_norm = nn.BatchNorm2d(inner_width)
        self.widen = nn.Conv2d(inner_width, output_width, 1, bias=False)
        self.widen_norm = nn.BatchNorm2d(output_width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width != output_width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width, output_width, 1, stride, bias=False), nn.BatchNorm2d(output_width)
            )

    def forward(self, picture: Tensor) -> Tensor:
        """Map (batch, width, height, frames) to (batch, output_width, height / stride, frames / stride)."""
        hidden = F.relu(self.narrow_norm(self.narrow(picture)))
        hidden = F.relu(self.grouped_norm(self.grouped(hidden)))
        return F.relu(self.shortcut(picture) + self.widen_norm(self.widen(hidden)))


class ClipClassifier(nn.Module):
    """Maps `(batch, clip_length)` samples to `(batch, classes)` logits.

    Args:
        config: see `ClipClassifierConfig`.
    """

    def __init__(self, config: ClipClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.picture = LogMel(config.log_mel)
        # Not in the state dict: its filters follow from the configuration.
        self.stem = nn.Conv2d(1, config.stem_width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(config.stem_width)
        blocks: list[nn.Module] = []
        width = config.stem_width
        for stage in range(STAGES):
            for number in range(config.blocks_per_stage):
                output_width = config.stage_width * 2**stage
                inner_width = config.cardinality * config.base_width * 2**stage
                stride = 2 if number == 0 and stage > 0 else 1
                blocks.append(Block(width, output_width, inner_width, config.cardinality, stride))
                width = output_width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, len(config.class_names))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> ClipClassifier:
        """Load a classifier from a model folder, or from `hf://owner/name@revision` on the Hub, in evaluation mode."""
        return load_clip_classifier(folder)[0]

    def features(self, samples: Tensor) -> Tensor:
        """Map (batch, clip_length) samples to (batch, feature_width) features, used in Fréchet distances."""
        hidden = F.relu(self.stem_norm(self.stem(self.picture(samples).unsqueeze(1))))
        # Narrow convolutions are about a third faster on a CPU in channels-last layout.
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        return self.blocks(hidden).mean(dim=(2, 3))

    def forward(self, samples: Tensor) -> Tensor:
        """Map (batch, clip_length) samples at the classifier's rate to (batch, classes) logits."""
        return self.head(self.features(samples))

    def fitted(self, waveform: Waveform) -> Tensor:
        """Resample and cut or pad a waveform to (clip_length,) samples."""
        settings = self.config.log_mel
        samples = resample(waveform.samples, waveform.sample_rate_hz, settings.sample_rate_hz)
        return cut_or_pad(samples, settings.clip_length)


class Opinions(NamedTuple):
    """A classifier's outputs for clips."""

    probabilities: npt.NDArray[np.float64]  # (clips, classes)
    features: npt.NDArray[np.float64]  # (clips, feature_width)


@torch.no_grad()
def opinions(classifier: ClipClassifier, clips: Iterable[Tensor]) -> Opinions:
    """Apply a classifier in evaluation mode to (clip_length,) clips, in batches.

    Raises:
        InputError: if there are no clips.
    """
    probabilities, features = [], []

    def look(held: list[Tensor]) -> None:
        found = classifier.features(torch.stack(held).to(device_of(classifier)))
        features.append(to_numpy(found, torch.float64))
        probabilities.append(to_numpy(classifier.head(found).cpu().double().softmax(dim=-1)))

    held: list[Tensor] = []
    for clip in clips:
        held.append(clip)
        if len(held) == CLIPS_AT_ONCE:
            look(held)
            held = []
    if held:
        look(held)
    if not features:
        raise InputError("there are no clips to classify; give a folder that contains some")
    return Opinions(np.concatenate(probabilities), np.concatenate(features))


def fitted_clip(path: Path, log_mel: LogMelConfig) -> Tensor:
    """Read the first (clip_length,) samples of a file at any rate, padded with silence if it is shorter.

    Raises:
        InputError: as `audiomamba.data.waveforms.read_waveform`.
    """
    samples = read_waveform(path, log_mel.sample_rate_hz, seconds=log_mel.seconds).samples
    return cut_or_pad(samples, log_mel.clip_length)


def save_clip_classifier(folder: Path | str, model: ClipClassifier, *, details: Mapping[str, Any]) -> None:
    """Write a model folder (config.json, model.safetensors, README.md) in one step.

    Raises:
        InputError: if the folder contains something else, or cannot be written.
    """
    config = {"kind": MODEL_KIND, "model": model.config.to_dict(), "details": dict(details)}
    settings = model.config.log_mel
    card = (
        f"# Clip classifier\n\nClassifies clips into {len(model.config.class_names)} classes "
        f"({', '.join(model.config.class_names)}): {settings.seconds:g} s at {settings.sample_rate_hz} Hz. "
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, "
        f"{model.config.feature_width} features.\n\n    audiomamba evaluate --data CLIPS --classifier THIS_FOLDER\n"
    )
    write_model_folder(Path(folder), config, _learned(model), card)


def load_clip_classifier(folder: Path | str) -> tuple[ClipClassifier, dict[str, Any]]:
    """Read a model folder: the classifier in evaluation mode, and the details saved with it.

    Args:
        folder: the model folder, or `hf://owner/name@revision` on the Hugging Face Hub.

    Raises:
        InputError: if the folder is missing, incomplete, damaged, or of another kind or version.
    """
    folder = find_model(folder)
    config, tensors = read_model_folder(folder)
    if config.get("kind") != MODEL_KIND:
        raise InputError(
            f"{folder} holds a {config.get('kind', 'model of unknown kind')!s}, not a {MODEL_KIND}; train one with "
            "`audiomamba train-classifier`"
        )
    with configuration_errors(f"{folder}/config.json"):
        model = ClipClassifier(ClipClassifierConfig.from_dict(config.get("model", {})))
    filters = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("picture.")}
    load_tensors_into(model, {**tensors, **filters}, str(folder))
    return model.eval(), training_details(config, folder)


def _learned(model: ClipClassifier) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("picture.")}
