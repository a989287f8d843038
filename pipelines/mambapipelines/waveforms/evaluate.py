"""Score waveform models and generated clips: the run behind `audiomamba evaluate`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audiomamba.data.clips import read_in_parallel
from audiomamba.data.labelled_clips import LabelledFiles, labelled_splits
from audiomamba.data.labels import read_clip_labels
from audiomamba.data.waveforms import find_audio_files
from audiomamba.metrics.likelihood import ClipLikelihood, clip_samples, file_likelihoods
from audiomamba.metrics.scores import half_sample_interval
from audiomamba.models import WaveformModel, load_waveform_model
from audiomamba.models.clip_classifier import ClipClassifier, load_clip_classifier
from mambacore.errors import InputError
from mambapipelines.console import WorkProgress, note, show
from mambapipelines.device import begin_computing
from mambapipelines.files import write_whole
from mambapipelines.training.metrics import METRICS_NAME
from mambapipelines.training.options import RUN_FOLDER_NAME
from mambapipelines.waveforms.evaluation_output import (
    ModelFacts,
    ScoredSet,
    likelihoods_table,
    scores_picture,
    scores_table,
)
from mambapipelines.waveforms.evaluation_sets import FEWEST_CLIPS, ROW_NAMES, TEST, Asking, BadFiles, SetScorer


@dataclass(frozen=True)
class AudioEvaluationOptions:
    """Options of `audiomamba evaluate`; its `--help` describes each."""

    data: Path
    models: Sequence[str] = ()
    classifier: str | None = None
    clips: Sequence[str] = ()
    generate: int | None = None
    guidance: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    candidates: int | None = None
    judge: str | None = None
    label_pattern: str | None = None
    valid: str | None = None
    test: str | None = None
    words: Sequence[str] | None = None
    skip_bad: bool = False
    inception_over_all: bool = False
    resamples: int = 200
    output: Path | None = None
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    precision: str = "float32"


def evaluate_audio(options: AudioEvaluationOptions) -> list[ScoredSet]:
    """Write the tables and the plot; the table of scores is also printed on standard output.

    Raises:
        InputError: if the options or files contradict each other.
    """
    _check(options)
    models = _named_folders(options.models, "MODEL")
    clips = _named_folders(options.clips, "--clips")
    for name in ROW_NAMES:
        if name in models or name in clips:
            raise InputError(f"{name!r} is the name of a row of its own: choose another name.")
    placement = begin_computing(options.device, options.precision, options.threads)
    device = placement.device
    classifier = None if options.classifier is None else load_clip_classifier(options.classifier)[0].to(device)
    read = {name: load_waveform_model(folder) for name, folder in models.items()}
    loaded = {name: (model.to(device), details) for name, (model, details) in read.items()}
    found_clips = {name: find_audio_files(folder) for name, folder in clips.items()}
    splits = labelled_splits(
        options.data,
        label_pattern=options.label_pattern,
        valid=options.valid,
        test=options.test,
        words=options.words,
        labelled=classifier is not None,
    )
    _check_splits(splits, classifier, options)
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder {options.output} cannot be made ({error.strerror}): choose another"
            ) from error
    bad = BadFiles(options.skip_bad)
    likelihoods, facts = {}, {}
    for name, (model, details) in loaded.items():
        with placement.autocast():
            likelihoods[name] = _likelihoods(name, model, details, splits["test"], options.data, bad)
        facts[name] = _facts(models[name], model, details, likelihoods[name], options)
    if classifier is None:
        rows = [ScoredSet(name, model=found) for name, found in facts.items()]
    else:
        scorer = SetScorer(
            classifier,
            splits["train"],
            bad,
            options.seed,
            options.resamples,
            options.inception_over_all,
            splits["valid"],
            Asking(options.guidance, options.temperature, options.top_p, options.candidates, options.judge),
        )
        rows = scorer.real_rows(splits["test"])
        for name in [*facts, *(name for name in found_clips if name not in facts)]:
            row = ScoredSet(name, model=facts.get(name))
            if name in found_clips:
                row = scorer.folder_row(row, found_clips[name])
            elif options.generate is not None:
                row = scorer.generated_row(row, loaded[name][0], options.generate)
            rows.append(row)
        rows += scorer.control_rows(splits["test"])
    table = scores_table(rows)
    if options.output is not None:
        write_whole(options.output / "metrics.tsv", table)
        write_whole(options.output / "metrics.png", scores_picture(rows))
        if likelihoods:
            write_whole(options.output / "likelihoods.tsv", likelihoods_table(likelihoods, options.data))
    note(f"seed {options.seed}; 95 % intervals from {options.resamples} random halves of the clips")
    show(table.rstrip("\n"))
    return rows


def _check(options: AudioEvaluationOptions) -> None:
    if options.generate is not None and not options.models:
        raise InputError("--generate needs a MODEL: name its folder first.")
    if options.classifier is None and (options.clips or options.generate is not None):
        raise InputError("generated clips are scored by a classifier: give its folder as --classifier.")
    if options.classifier is None and not options.models:
        raise InputError("there is nothing to score: give a MODEL, or --classifier and --clips.")
    if options.classifier is None and options.inception_over_all:
        raise InputError("--inception-over-all is about a score of the classifier: give its folder as --classifier.")
    if options.generate is not None and options.generate < FEWEST_CLIPS:
        raise InputError(f"--generate is {options.generate}: use {FEWEST_CLIPS} or more.")


def _named_folders(texts: Sequence[str], option: str) -> dict[str, str]:
    """Parse `NAME=DIR` and `DIR`; without a name, that of the folder is used."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            name, folder = Path(text).resolve().name, text
        name = name.strip()
        if not name or not folder:
            raise InputError(f"{option} {text!r} lacks a name or a folder: write NAME=DIR.")
        if "\t" in name or "\n" in name:
            raise InputError(f"the name {name!r} is not valid in a table: choose one without tabs and line breaks.")
        if name in found:
            raise InputError(
                f"two values of {option} are named {name!r}: give them different names, such as {name}-2={folder}."
            )
        found[name] = folder
    return found


def _check_splits(
    splits: dict[str, LabelledFiles], classifier: ClipClassifier | None, options: AudioEvaluationOptions
) -> None:
    if not splits["test"].paths:
        raise InputError(f"{options.data} has no test clips: specify them with --test '*_[5-9].wav'.")
    if classifier is None:
        return
    known = classifier.config.class_names
    for files in splits.values():
        for path, label in zip(files.paths, files.labels, strict=True):
            if label not in known:
                raise InputError(
                    f"{path} is labelled {label!r}, which the classifier does not have ({', '.join(known)}): name the "
                    "--words it has, or correct --label-pattern."
                )


def _likelihoods(
    name: str, model: WaveformModel, details: dict[str, Any], test: LabelledFiles, folder: Path, bad: BadFiles
) -> dict[Path, ClipLikelihood]:
    """Compute likelihoods of the readable test clips, given labels by the rules of the model's training."""
    quantiser = model.config.quantiser
    total = 0
    for length in read_in_parallel(lambda number: clip_samples(test.paths[number], quantiser), len(test.paths)):
        if isinstance(length, InputError):
            bad.leave_out(length)
        else:
            total += length
    with WorkProgress(f"likelihood under {name}", total, lines_elsewhere=True, unit="samples") as progress:
        labels = _test_labels(model, details, test, folder)
        found = file_likelihoods(model, test.paths, progress=progress.advance, labels=labels)
    scored: dict[Path, ClipLikelihood] = {}
    for path, one in zip(test.paths, found, strict=True):
        if isinstance(one, InputError):
            bad.leave_out(one)
        else:
            scored[path] = one
    if len(scored) < FEWEST_CLIPS:
        raise InputError(f"{TEST} has {len(scored)} clips that can be read: give at least {FEWEST_CLIPS}.")
    return scored


def _test_labels(
    model: WaveformModel, details: dict[str, Any], test: LabelledFiles, folder: Path
) -> torch.Tensor | None:
    """Return label numbers (clips, label sets); None for a model without labels or without known rules."""
    sets, rules = model.config.label_sets, details.get("label_rules")
    if not sets or not rules:
        return None
    names = [path.relative_to(folder).as_posix() for path in test.paths]
    labels = read_clip_labels(rules, names)
    return torch.tensor([labels.numbers(clip, sets) for clip in names])


def _facts(
    folder: str,
    model: WaveformModel,
    details: dict[str, Any],
    likelihoods: dict[Path, ClipLikelihood],
    options: AudioEvaluationOptions,
) -> ModelFacts:
    samples = np.array([one.samples for one in likelihoods.values()])
    nats = np.array([one.nats for one in likelihoods.values()])
    interval = half_sample_interval(
        lambda chosen: float(nats[chosen].sum() / samples[chosen].sum()), len(nats), options.seed, options.resamples
    )
    return ModelFacts(
        sum(parameter.numel() for parameter in model.parameters()),
        details.get("seed"),
        details.get("steps"),
        _training_minutes(Path(folder)),
        interval,
    )


def _training_minutes(folder: Path) -> float | None:
    """Return the duration of a model's optimiser steps, if its run is in its folder."""
    try:
        with (folder / RUN_FOLDER_NAME / METRICS_NAME).open(encoding="utf-8", newline="") as stream:
            return sum(float(row["seconds"]) for row in csv.DictReader(stream)) / 60
    except (OSError, KeyError, TypeError, ValueError):
        return None
