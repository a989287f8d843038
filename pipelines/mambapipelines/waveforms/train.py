"""Training of a waveform model: from a folder of clips or a recording to a model folder, with exact resuming.

Layout of an output folder: the model (`config.json`, `model.safetensors`, `README.md`) and `training/`, the state and
the metrics of the run (`mambapipelines.training.state`), with clips generated during training in `training/samples`.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from audiomamba.data.clips import Clip, ClipCollection
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.splits import SplitClips, read_split_clips
from audiomamba.metrics.likelihood import bits_by_label, bits_per_sample, collection_likelihoods
from audiomamba.metrics.selection import LARGEST_MEAN
from audiomamba.models import WaveformModel, WaveformModelConfig, load_waveform_model, save_waveform_model
from genomamba.models.transfer import weights_checksum
from mambacore.errors import InputError
from mambapipelines.console import format_duration
from mambapipelines.files import check_output_outside
from mambapipelines.training.plan import FORWARD_PASSES_PER_STEP, RunPlan
from mambapipelines.training.progress import TrainingProgress
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.session import TrainingSession, parameter_count
from mambapipelines.waveforms.recipe import WaveformTrainingRecipe
from mambapipelines.waveforms.samples import write_samples
from mambapipelines.waveforms.task import WaveformTask

# Cost of generating a sample, in samples processed in parallel.
FORWARD_PASSES_PER_GENERATED_SAMPLE = 4
SAMPLES_FOLDER_NAME = "samples"
CLIPPED_SHARE = 0.01


@dataclass(frozen=True)
class WaveformTrainingOptions:
    """Options of `audiomamba train`.

    Attributes:
        data: a folder of clips, or a recording.
        output: the folder that becomes the model folder; its subfolder `training` holds the state of the run.
        recipe: name of a recipe of the package, or path of a YAML file.
        changes: values that replace the recipe's, each written `section.key=value`.
        valid, test: shell patterns of the validation files, and of the test files, which are not used.
        words: use only clips in folders with these names.
        labels: rules of `audiomamba.data.labels.read_clip_labels`, for a model that is conditioned on labels.
        start_from: a waveform model (folder, shipped name or `hf://...`) of the recipe's architecture and labels, whose
            weights the training starts from; a clock that it does not have is added.
        skip_bad: skip files that cannot be read, and report them.
        minutes: wall time of the whole run in minutes; by default the recipe's, unless `steps` is given.
        steps: number of optimiser steps instead of a wall time.
        seed: all randomness is a function of this seed and an index.
        resume: continue the run recorded in `output`, or start one if there is none.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        device, precision: see `mambapipelines.device.choose`; by default, the precision is the recipe's.
        strategy: distribution over several processes, one of `mambapipelines.training.ranks.STRATEGIES`.
        deterministic: whether to use deterministic operators on a GPU.
    """

    data: Path
    output: Path
    recipe: str
    changes: Sequence[str] = ()
    valid: str | None = None
    test: str | None = None
    words: Sequence[str] | None = None
    labels: Sequence[str] = ()
    start_from: str | None = None
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
        """Samples per example."""
        return load_task_recipe(WaveformTrainingRecipe, self.recipe, self.changes).batch.clip_length


@dataclass(frozen=True)
class WaveformTrainingResult:
    """Result of a finished run.

    Attributes:
        folder: the model folder.
        steps: total number of optimiser steps taken.
        valid_bits_per_sample: bits per sample of the held-out clips; `None` if there are none.
        metrics_path: CSV with one row per step.
        seconds: wall time of this call.
        already_finished: true if `resume` found the run complete.
    """

    folder: Path
    steps: int
    valid_bits_per_sample: float | None
    metrics_path: Path
    seconds: float
    already_finished: bool = False


@dataclass(frozen=True)
class WaveformPlan(RunPlan):
    """The plan of training a waveform model.

    Attributes:
        recipe: the recipe.
        validation_samples: samples scored per validation; 0 if there is none.
        generated_samples: samples generated per validation.
    """

    recipe: WaveformTrainingRecipe
    validation_samples: int
    generated_samples: int

    def step_positions(self, step: int) -> float:
        """Return the number of samples of a step."""
        length = self.recipe.length.warmup(self.recipe.batch.clip_length).length_at(step)
        return self.recipe.batch.clips_per_step(length) * length

    @property
    def validation_steps(self) -> float:
        """Return the cost of one validation in optimiser steps."""
        batch = self.recipe.batch
        forward = self.validation_samples + FORWARD_PASSES_PER_GENERATED_SAMPLE * self.generated_samples
        return forward / (FORWARD_PASSES_PER_STEP * batch.clips_per_step(batch.clip_length) * batch.clip_length)


def train_waveform_model(options: WaveformTrainingOptions) -> WaveformTrainingResult:
    """Train and save a waveform model; messages are printed on standard error.

    Saving and resuming are those of `mambapipelines.training.run.TrainingRun`.

    Raises:
        InputError: if an option, the recipe or a file is invalid, or the loss is no longer finite.
        KeyboardInterrupt: if interrupted by Ctrl-C; the state is saved.
        SystemExit: if terminated by SIGTERM, with status 143; the state is saved.
    """
    recipe = load_task_recipe(WaveformTrainingRecipe, options.recipe, options.changes)
    config = recipe.model_config()
    check_output_outside(options.output, options.data, "clips")
    with TrainingSession(options, recipe, WaveformTask) as session:
        clips = read_split_clips(
            options.data,
            config.quantiser,
            valid=options.valid,
            test=options.test,
            words=options.words,
            labels=options.labels,
            preparation=config.preparation,
            skip_bad=options.skip_bad,
        )
        config = with_clips(config, clips)
        earlier = None if options.start_from is None else load_waveform_model(options.start_from)[0]
        if session.resume(_depends_on(clips, earlier), _checksums(clips)):
            return _finished_result(session)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = WaveformModel(config)
        if earlier is not None:
            start_from(model, earlier, str(options.start_from))
            session.progress.note(f"starts from the weights of {options.start_from}")
        if options.recipe in recipe.aliases:
            session.progress.note(alias_note(options.recipe))
        _introduce(session.progress, recipe, model, clips)

        def generate_samples(by: WaveformModel, step: int) -> None:
            wanted, folder = recipe.samples, session.folder.path / SAMPLES_FOLDER_NAME
            write_samples(by, folder, step, wanted.clips, wanted.seconds, options.seed)

        task = WaveformTask(
            model,
            recipe,
            clips.train,
            clips.valid,
            options.seed,
            clips.are_recordings,
            generate_samples if recipe.samples.clips > 0 else None,
        )
        held_out = 0 if clips.valid is None else sum(clip.classes.shape[0] for clip in clips.valid.clips)
        plan = WaveformPlan(
            recipe,
            min(held_out, recipe.validation.samples),
            round(recipe.samples.clips * recipe.samples.seconds * config.quantiser.sample_rate_hz),
        )
        steps = session.train(task, plan).steps
        return _finish(session, options, task, clips, steps)


def with_clips(config: WaveformModelConfig, clips: SplitClips) -> WaveformModelConfig:
    """Return the configuration with the label sets, the typical gain and the durations of the training clips."""
    preparation = replace(config.preparation, typical_gain=clips.typical_gain)
    clock = replace(config.clock, durations=clips.durations() if config.clock.bins else ())
    return replace(config, label_sets=clips.label_sets, preparation=preparation, clock=clock)


def start_from(model: WaveformModel, earlier: WaveformModel, source: str) -> None:
    """Copy the weights of an earlier model, which may be shallower and have no clock.

    Layers that the centre has in addition come after its earlier ones and begin as the identity: their output
    projections are zero, so the model computes at first what the earlier one did (function-preserving growth: Chen,
    Goodfellow & Shlens 2016). Other stages cannot grow like that, because each of their layers has a skip. A clock
    that the earlier model lacks is left as it is.

    Args:
        model: the model to be trained, changed in place.
        earlier: the model whose weights it gets.
        source: where the earlier model is from, for the message.

    Raises:
        InputError: if the architectures differ otherwise, or the quantisers, label sets or clocks.
    """
    for name in ("model_width", "pooling", "width_growth", "blocks_on_the_way_down", "quantiser"):
        if getattr(model.config, name) != getattr(earlier.config, name):
            raise InputError(f"{source} has another {name} than the recipe; choose the recipe that it was trained with")
    for depth, (stage, before) in enumerate(zip(model.config.stages, earlier.config.stages, strict=True)):
        is_centre = depth == len(earlier.config.stages) - 1
        kept = stage.mixers()[: before.layers] if is_centre else stage.mixers()
        if stage.feed_forward_expansion != before.feed_forward_expansion or kept != before.mixers():
            raise InputError(
                f"stage {depth} of {source} has other layers than the recipe's; only the last stage may have more"
            )
    if model.config.label_sets != earlier.config.label_sets:
        raise InputError(f"{source} has other labels than these clips; give the --labels that it was trained with")
    ours, theirs = (replace(one.config.clock, durations=()) for one in (model, earlier))
    if theirs.bins and ours != theirs:
        raise InputError(f"{source} has another clock than the recipe; --set clock.bins={theirs.bins} and by_label")
    weights, added = earlier.state_dict(), {}
    for name, tensor in model.state_dict().items():
        if name not in weights:
            added[name] = torch.zeros_like(tensor) if ".output_projection." in name else tensor
    model.load_state_dict({**weights, **added})


def _finish(
    session: TrainingSession, options: WaveformTrainingOptions, task: WaveformTask, clips: SplitClips, steps: int
) -> WaveformTrainingResult:
    """Score all held-out clips and write the model folder."""
    model = task.model.eval()
    bits, by_label = None, {}
    if clips.valid is not None:
        found = collection_likelihoods(model, clips.valid, task.recipe.batch.clip_length)
        bits, by_label = bits_per_sample(found.values()), bits_by_label(found, clips.valid)
    details = {
        "samples_seen": task.samples_seen(steps),
        "training_clips": len(clips.train.clips),
        "training_seconds": round(clips.train.seconds, 1),
        "split": _split_details(options, clips),
        "label_rules": list(clips.label_rules),
        "valid_bits_per_sample": bits,
        "valid_bits_by_label": by_label,
        "start_from": options.start_from,
    }
    scored = "" if bits is None else f", {bits:.4f} bits/sample on all held-out clips"
    for name, figures in by_label.items():
        listed = ", ".join(f"{value} {figure:.3f}" for value, figure in figures.items())
        session.progress.note(f"bits/sample of held-out clips by {name}: {listed}")
    session.publish(lambda folder, every: save_waveform_model(folder, model, details=every), details, scored)
    return WaveformTrainingResult(options.output, steps, bits, session.folder.metrics_path, session.seconds)


def _split_details(options: WaveformTrainingOptions, clips: SplitClips) -> dict[str, Any]:
    """Return how the clips were split, for an evaluation on the same test clips.

    Names are given as a number and a checksum (SHA-256 of the sorted names, each with a newline), not as long lists.
    For recordings that were cut by time, the names are those of the parts.
    """
    details: dict[str, Any] = {
        "rule": clips.rule,
        "valid_pattern": options.valid,
        "test_pattern": options.test,
        "words": None if options.words is None else list(options.words),
    }
    for split, names in clips.names().items():
        lines = "".join(f"{name}\n" for name in sorted(names))
        details[split] = {"clips": len(names), "names_sha256": hashlib.sha256(os.fsencode(lines)).hexdigest()}
    return details


def _depends_on(clips: SplitClips, earlier: WaveformModel | None = None) -> dict[str, Any]:
    """Return everything the result of a run depends on, keyed by names known to the user."""
    content: dict[str, Any] = {
        "training clips": _identity(clips.train),
        "validation clips": None if clips.valid is None else _identity(clips.valid),
    }
    if clips.label_sets:
        content["--labels"] = {one.name: list(one.values) for one in clips.label_sets}
    if earlier is not None:
        content["--from"] = weights_checksum(earlier)
    return content


def _checksums(clips: SplitClips) -> dict[str, str]:
    """Every clip with a checksum of its samples and labels."""
    found = (clip for part in (clips.train, clips.valid) if part is not None for clip in part.clips)
    return {
        clip.name: f"{zlib.crc32(clip.classes.numpy().tobytes(), zlib.crc32(str(clip.labels).encode())):08x}"
        for clip in found
    }


def _identity(collection: ClipCollection) -> list[int]:
    """Return the identity of clips: their number, total samples, and a checksum of names and samples."""
    checksum, samples = 0, 0
    for clip in collection.clips:
        labels = "".join(f" {number}" for number in clip.labels)
        checksum = zlib.crc32(clip.classes.numpy().tobytes(), zlib.crc32(os.fsencode(clip.name + labels), checksum))
        samples += clip.classes.shape[0]
    return [len(collection.clips), samples, checksum]


def _finished_result(session: TrainingSession) -> WaveformTrainingResult:
    """Return the result of a run that is already finished, from its model folder."""
    folder = session.options.output
    details = load_waveform_model(folder)[1]
    return WaveformTrainingResult(
        folder=folder,
        steps=details["steps"],
        valid_bits_per_sample=details.get("valid_bits_per_sample"),
        metrics_path=session.folder.metrics_path,
        seconds=session.seconds,
        already_finished=True,
    )


def alias_note(name: str) -> str:
    """Return the current equivalent of an earlier name of the recipe `sc09`."""
    outer, centre = ("mamba", "mamba") if name == "mamba-sc09-6m" else name.split("-")[1:]
    return f"the recipe {name} is now --recipe sc09 --set model.outer={outer} --set model.centre={centre}"


def _introduce(
    progress: TrainingProgress,
    recipe: WaveformTrainingRecipe,
    model: WaveformModel,
    clips: SplitClips,
) -> None:
    """Report what is to be trained, and unusual or skipped input."""
    config = model.config
    length = recipe.batch.clip_length
    held_out = "no clips held out"
    if clips.valid is not None:
        held_out = f"{len(clips.valid.clips)} clips ({format_duration(clips.valid.seconds)}) held out"
    progress.note(
        f"{len(clips.train.clips)} training clips ({format_duration(clips.train.seconds)}), {held_out}: {clips.rule}"
    )
    progress.note(
        f"{parameter_count(model):,} parameters, {recipe.batch.clips_per_step(length)} clips of up to {length:,} "
        "samples per step"
    )
    for one in clips.label_sets:
        progress.note(f"labels {one.name}: {len(one.values)} values ({', '.join(one.values[:12])})")
    for name, without in clips.unlabelled().items():
        progress.note(f"{len(without)} clips have no label {name} that training clips have, the first is {without[0]}")
    if config.preparation.changes_loudness:
        progress.note(
            f"each clip has one gain towards an RMS of {config.preparation.target_rms:g}, "
            f"typically {clips.typical_gain:.2f}"
        )
    bad = [*clips.train.bad, *(clips.valid.bad if clips.valid is not None else ())]
    for sentence in bad:
        progress.note(f"left out: {sentence}")
    if bad:
        progress.note(f"{len(bad)} files in all are left out")
    for what, is_so in (
        ("silent", _is_silent),
        ("clipped", _is_clipped),
        ("shifted (have a DC offset)", _is_shifted),
    ):
        odd = [clip.name for clip in clips.train.clips if is_so(clip, clips.train.quantiser)]
        if odd:
            progress.note(f"{len(odd)} clips to train on are {what}, the first is {odd[0]}: the model learns that too")


def _is_silent(clip: Clip, quantiser: Quantiser) -> bool:
    """Return whether a clip never leaves the classes around the middle."""
    return bool(((clip.classes.int() - quantiser.middle_class).abs() <= 1).all())


def _is_clipped(clip: Clip, quantiser: Quantiser) -> bool:
    """Return whether more than 1 % of a clip is in the outermost classes."""
    outermost = (clip.classes == 0) | (clip.classes == quantiser.classes - 1)
    return float(outermost.float().mean()) > CLIPPED_SHARE


def _is_shifted(clip: Clip, quantiser: Quantiser) -> bool:
    """Return whether the mean of a clip is far from zero."""
    return abs(float(quantiser.decode(clip.classes).double().mean())) > LARGEST_MEAN
