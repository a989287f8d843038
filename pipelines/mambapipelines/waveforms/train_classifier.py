"""Training of a clip classifier with the shared training loop: from a folder of labelled clips to a model folder."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomamba.data.labelled_clips import (
    FULL_SCALE,
    LabelledFiles,
    NoiseChange,
    changed_clip,
    labelled_splits,
    read_fitted,
)
from audiomamba.models.clip_classifier import (
    CLIPS_AT_ONCE,
    ClipClassifier,
    ClipClassifierConfig,
    load_clip_classifier,
    save_clip_classifier,
)
from audiomamba.models.log_mel import LogMelConfig
from mambacore.errors import InputError
from mambapipelines.files import check_output_outside
from mambapipelines.training.plan import FORWARD_PASSES_PER_STEP, RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.recipe import TrainingRecipe, load_task_recipe
from mambapipelines.training.session import TrainingSession, parameter_count
from mambapipelines.training.task import Batch, TrainingTask

_SIZES = ("stem_width", "stage_width", "blocks_per_stage", "cardinality", "base_width")


@dataclass(frozen=True)
class ClassifierBatchRecipe:
    """Clips per step; they are processed in one batch, because the batch norms average over them."""

    clips_per_step: int = 32


@dataclass(frozen=True)
class NoiseRecipe:
    """Noise in training clips: see `audiomamba.data.labelled_clips.NoiseChange`."""

    share: float = 0.0
    lowest_ratio_db: float = -30.0
    highest_ratio_db: float = 30.0


@dataclass(frozen=True)
class ClassifierRecipe(TrainingRecipe):
    """A recipe of a clip classifier; `model` holds the sizes of a `ClipClassifierConfig`."""

    folder: ClassVar[str] = "clip-classifier"
    model_defaults: ClassVar[dict[str, Any]] = {name: getattr(ClipClassifierConfig, name) for name in _SIZES}

    batch: ClassifierBatchRecipe = field(default_factory=ClassifierBatchRecipe)  # type: ignore[assignment]
    noise: NoiseRecipe = field(default_factory=NoiseRecipe)

    def noise_change(self) -> NoiseChange:
        """The noise.

        Raises:
            InputError: if the share is not in 0 to 1, or the ratios are in the wrong order.
        """
        change = NoiseChange(**asdict(self.noise))
        if not 0 <= change.share <= 1 or change.lowest_ratio_db > change.highest_ratio_db:
            raise InputError(
                f"the recipe's noise is {change.share} of the clips at {change.lowest_ratio_db} to "
                f"{change.highest_ratio_db} dB; give a share from 0 to 1 and the lower ratio first"
            )
        return change


@dataclass(frozen=True)
class ClassifierTrainingOptions:
    """Options of `audiomamba train-classifier`; its `--help` describes each."""

    data: Path
    output: Path
    recipe: str = "small"
    changes: Sequence[str] = ()
    sample_rate_hz: int = 16_000
    clip_seconds: float = 1.0
    label_pattern: str | None = None
    valid: str | None = None
    test: str | None = None
    words: Sequence[str] | None = None
    skip_bad: bool = False
    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    resume: bool = False
    threads: int | None = None
    device: str = "auto"
    precision: str | None = None
    strategy: str = "single"
    deterministic: bool = False

    @property
    def length(self) -> int:
        """Samples in a clip."""
        return LogMelConfig(self.sample_rate_hz, self.clip_seconds).clip_length


class ClassifierTask(TrainingTask):
    """Classification of clips; each epoch uses every training clip once, in a different order.

    Args:
        model: the model, trained in place.
        training: (clips, clip_length) int16 samples, and (clips,) labels.
        validation: the same for validation, if any.
        clips_per_step: see `ClassifierBatchRecipe`.
        noise: noise mixed with the training clips.
        seed: seed of the order and the augmentation of the clips.
    """

    training_figures: ClassVar[dict[str, str]] = {"accuracy": ".4f"}
    validation_figures: ClassVar[dict[str, str]] = {"held_out_accuracy": ".4f"}
    deciding_figure = "held_out_accuracy"
    higher_is_better = True
    unit = "samples"

    def __init__(
        self,
        model: ClipClassifier,
        training: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor] | None,
        clips_per_step: int,
        noise: NoiseChange,
        seed: int,
    ) -> None:
        self.model: ClipClassifier = model
        self.training = training
        self.validation = validation
        self.clips_per_step = clips_per_step
        self.noise = noise
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # order of the last epoch used, a function of (seed, epoch)

    # Batch normalisation takes its means over all clips of a step.
    divisible = False

    def batch(self, step: int) -> Batch:
        """Return (clips, clip_length) augmented float32 samples, and (clips,) labels."""
        samples, labels = self.training
        numbers, rows = [], []
        for index in range(step * self.clips_per_step, (step + 1) * self.clips_per_step):
            epoch, position = divmod(index, len(labels))
            numbers.append(int(self._epoch_order(epoch)[position]))
            clip = samples[numbers[-1]].float() / FULL_SCALE
            rows.append(changed_clip(clip, self.model.config.log_mel.sample_rate_hz, self._seed, index, self.noise))
        return torch.stack(rows), labels[numbers]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            key = np.array([self._seed, epoch], dtype=np.uint64)
            random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 4]))
            self._order = epoch, random.permutation(len(self.training[1]))
        return self._order[1]

    def rows_per_micro_batch(self, length: int) -> int:
        """Return the number of clips per step, as they are processed at once."""
        return self.clips_per_step

    def loss(self, replica: nn.Module, micro_batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy and accuracy."""
        samples, labels = micro_batch
        logits = cast(ClipClassifier, replica)(samples)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy}

    def can_validate(self) -> bool:
        """Return whether there are validation clips."""
        return self.validation is not None

    def validate(self) -> dict[str, float]:
        """Return the accuracy on the validation clips, without augmentation."""
        assert self.validation is not None
        return {"held_out_accuracy": accuracy_of(self.model, *self.validation)}

    def describe_validation(self, figures: dict[str, float]) -> str:
        """The accuracy in percent."""
        return f"held-out accuracy {figures['held_out_accuracy']:.1%}"


@dataclass(frozen=True)
class ClassifierPlan(RunPlan):
    """The plan of training a clip classifier."""

    recipe: ClassifierRecipe
    validation_clips: int

    @property
    def validation_steps(self) -> float:
        """Return the cost of one validation in optimiser steps."""
        return self.validation_clips / (FORWARD_PASSES_PER_STEP * self.recipe.batch.clips_per_step)


@torch.no_grad()
def accuracy_of(model: ClipClassifier, samples: Tensor, labels: Tensor) -> float:
    """Return the accuracy on (clips, clip_length) int16 clips, in evaluation mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    parts = samples.split(CLIPS_AT_ONCE)
    found = [model(part.to(device).float() / FULL_SCALE).argmax(dim=1).cpu() for part in parts]
    model.train(was_training)
    return float((torch.cat(found) == labels).float().mean())


def train_clip_classifier(options: ClassifierTrainingOptions) -> float | None:
    """Train, test and save a clip classifier; messages are printed on standard error.

    Returns:
        Accuracy on the test clips; None if there are none.

    Raises:
        InputError: if an option, the recipe or a file is invalid.
        KeyboardInterrupt: if interrupted by Ctrl-C; the state is saved.
        SystemExit: if terminated by SIGTERM, with status 143; the state is saved.
    """
    recipe = load_task_recipe(ClassifierRecipe, options.recipe, options.changes)
    noise = recipe.noise_change()
    check_output_outside(options.output, options.data, "clips")
    with TrainingSession(options, recipe, ClassifierTask) as session:
        splits = labelled_splits(
            options.data,
            label_pattern=options.label_pattern,
            valid=options.valid,
            test=options.test,
            words=options.words,
        )
        log_mel = LogMelConfig(options.sample_rate_hz, options.clip_seconds)
        config = ClipClassifierConfig(_class_names(splits, options.data), log_mel, **recipe.model)
        tensors, checksums = _read_splits(splits, config, options, session.progress)
        if session.resume(_depends_on(config, tensors), checksums):
            return load_clip_classifier(options.output)[1].get("test_accuracy")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = ClipClassifier(config)
        clips = {split: len(tensors[split][1]) if split in tensors else 0 for split in splits}
        counts = ", ".join(f"{count} {split}" for split, count in clips.items())
        session.progress.note(
            f"{parameter_count(model):,} parameters, {len(config.class_names)} classes; clips: {counts}; "
            f"seed {options.seed}"
        )
        validation = tensors.get("valid")
        task = ClassifierTask(model, tensors["train"], validation, recipe.batch.clips_per_step, noise, options.seed)
        session.train(task, ClassifierPlan(recipe, 0 if validation is None else len(validation[1])))
        accuracies = {split: accuracy_of(model, *tensors[split]) for split in ("valid", "test") if split in tensors}
        details = {"clips": clips, **{f"{split}_accuracy": accuracy for split, accuracy in accuracies.items()}}
        scored = "".join(f", {split} accuracy {_percent(found, tensors[split])}" for split, found in accuracies.items())
        session.publish(
            lambda folder, every: save_clip_classifier(folder, model.eval(), details=every), details, scored
        )
        return accuracies.get("test")


def _percent(accuracy: float, clips: tuple[Tensor, Tensor]) -> str:
    margin = 1.96 * math.sqrt(max(accuracy * (1 - accuracy), 0.0) / len(clips[1]))
    return f"{accuracy:.2%} of {len(clips[1])} (+- {margin:.2%})"


def _class_names(splits: dict[str, LabelledFiles], data: Path) -> tuple[str, ...]:
    """Return the class names, which are those of the training clips."""
    names = sorted(set(splits["train"].labels))
    if len(names) < 2:
        raise InputError(f"the training clips of {data} are all labelled {names[0]!r}; a classifier needs two labels")
    for split, files in splits.items():
        for path, label in zip(files.paths, files.labels, strict=True):
            if label not in names:
                raise InputError(
                    f"{path} ({split}) is labelled {label!r}, which no training clip has; choose other "
                    "patterns, or name the --words"
                )
    return tuple(names)


def _read_splits(
    splits: dict[str, LabelledFiles],
    config: ClipClassifierConfig,
    options: ClassifierTrainingOptions,
    progress: TrainingProgress,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """The samples and label numbers of every split that has clips, and a checksum of each file."""
    tensors, checksums, left_out = {}, {}, 0
    for split, files in splits.items():
        if files.paths:
            fitted = read_fitted(files, config.log_mel, skip_bad=options.skip_bad)
            labels = torch.tensor([config.class_names.index(label) for label in fitted.labels])
            tensors[split] = fitted.samples, labels
            for path, samples, label in zip(fitted.paths, fitted.samples, fitted.labels, strict=True):
                name = path.relative_to(options.data).as_posix()
                checksums[name] = f"{zlib.crc32(samples.numpy().tobytes(), zlib.crc32(label.encode())):08x}"
            for sentence in fitted.bad:
                progress.note(f"left out: {sentence}")
            left_out += len(fitted.bad)
    if left_out:
        progress.note(f"{left_out} files in all are left out")
    return tensors, checksums


def _depends_on(config: ClipClassifierConfig, tensors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return everything the result of a run depends on, keyed by names known to the user."""
    return {
        "classifier": config.to_dict(),
        "clips": {
            split: zlib.crc32(labels.numpy().tobytes(), zlib.crc32(samples.numpy().tobytes()))
            for split, (samples, labels) in tensors.items()
        },
    }
