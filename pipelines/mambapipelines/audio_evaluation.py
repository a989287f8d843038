"""Score a waveform model and generated clips: the run behind `audiomamba evaluate`."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from matplotlib.figure import Figure  # not pyplot: no window system and no global state
from torch import Tensor

from audiomamba.clip_classifier import ClipClassifier, Opinions, fitted_clip, load_clip_classifier, opinions
from audiomamba.clip_classifier_data import LabelledFiles, labelled_splits
from audiomamba.datasets import read_clip
from audiomamba.generation import WaveformGenerator
from audiomamba.metrics import (
    Interval,
    am_score,
    bootstrap_interval,
    feature_summary,
    frechet_distance,
    inception_score,
    modified_inception_score,
)
from audiomamba.metrics_likelihood import clip_likelihoods
from audiomamba.models import WaveformModel, load_waveform_model
from audiomamba.waveforms import Waveform, find_audio_files
from mambacore.errors import InputError
from mambapipelines.console import note, use_threads, write_whole
from mambapipelines.plots import COLORS

FEWEST_CLIPS: Final = 10
SCORES: Final = ("FID", "IS", "mIS", "AM")
CLIPS_AT_ONCE: Final = 16
GENERATED_AT_ONCE: Final = 64


@dataclass(frozen=True)
class AudioEvaluationOptions:
    """What `audiomamba evaluate` is asked to do; its help says what each means."""

    model: Path | None
    data: Path
    classifier: Path | None
    clips: Path | None
    generate: int | None
    label_pattern: str | None
    valid: str | None
    test: str | None
    words: Sequence[str] | None
    inception_over_all: bool
    resamples: int
    output: Path | None
    seed: int
    threads: int | None


@dataclass(frozen=True)
class ScoredSet:
    """A row of the table."""

    name: str
    clips: int
    scores: dict[str, Interval]
    accuracy: float | None


def evaluate_audio(options: AudioEvaluationOptions) -> list[ScoredSet]:
    """Write the tables and the plot; the table of scores goes to standard output too.

    Raises:
        InputError: options or files that make no sense together.
    """
    _check(options)
    use_threads(options.threads)
    splits = labelled_splits(
        options.data,
        label_pattern=options.label_pattern if options.classifier is not None else "(.)",
        valid=options.valid,
        test=options.test,
        words=options.words,
    )
    test = splits["test"]
    if not test.paths:
        raise InputError(f"{options.data} has no test clips; say which they are with --test '*_[5-9].wav'")
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder {options.output} cannot be made ({error.strerror}): choose another"
            ) from error
    model = None if options.model is None else load_waveform_model(options.model)[0]
    lines = []
    if model is not None:
        lines.append(_likelihood_line(model, test, options))
    rows: list[ScoredSet] = []
    if options.classifier is not None:
        rows = _scored_sets(load_clip_classifier(options.classifier)[0], model, splits, options)
        lines += _table(rows)
        note(
            f"seed {options.seed}; {options.resamples} resamples, 95 % intervals; IS over "
            f"{'all clips' if options.inception_over_all else 'a held-out half'}"
        )
        if options.output is not None:
            write_whole(options.output / "metrics.tsv", "\n".join(_table(rows)) + "\n")
            write_whole(options.output / "metrics.png", scores_picture(rows))
    sys.stdout.write("\n".join(lines) + "\n")
    return rows


def _check(options: AudioEvaluationOptions) -> None:
    if options.clips is not None and options.generate is not None:
        raise InputError("--clips and --generate are both given: leave one of them out.")
    if options.generate is not None and options.model is None:
        raise InputError("--generate needs a MODEL: name its folder first.")
    if options.classifier is None and (options.clips is not None or options.generate is not None):
        raise InputError("generated clips are scored by a classifier: give its folder as --classifier.")
    if options.model is None and options.classifier is None:
        raise InputError("there is nothing to score: give a MODEL, or --classifier and --clips.")
    if options.generate is not None and options.generate < FEWEST_CLIPS:
        raise InputError(f"--generate is {options.generate}: use {FEWEST_CLIPS} or more.")


def _likelihood_line(model: WaveformModel, test: LabelledFiles, options: AudioEvaluationOptions) -> str:
    """Score the test clips one by one; the figure in words, as a comment of the table."""
    quantiser = model.config.quantiser
    found = []
    for first in range(0, len(test.paths), CLIPS_AT_ONCE):
        clips = [read_clip(path, quantiser).classes for path in test.paths[first : first + CLIPS_AT_ONCE]]
        found += clip_likelihoods(model, clips, quantiser)
        if first % (16 * CLIPS_AT_ONCE) == 0:
            note(f"likelihood: {len(found)} of {len(test.paths)} clips")
    samples = np.array([one.samples for one in found])
    nats = np.array([one.nats for one in found])
    interval = bootstrap_interval(
        lambda chosen: float(nats[chosen].sum() / samples[chosen].sum()), len(found), options.seed, options.resamples
    )
    if options.output is not None:
        rows = ["clip\tsamples\tnats_per_sample\tbits_per_sample"]
        for path, one in zip(test.paths, found, strict=True):
            mean = one.nats / one.samples
            name = path.relative_to(options.data).as_posix()
            rows.append(f"{name}\t{one.samples}\t{mean:.6f}\t{mean / math.log(2):.6f}")
        write_whole(options.output / "likelihoods.tsv", "\n".join(rows) + "\n")
    bits = [value / math.log(2) for value in interval]
    return (
        f"# NLL of {len(found)} test clips ({samples.sum()} samples): {bits[0]:.4f} bits/sample [{bits[1]:.4f}, "
        f"{bits[2]:.4f}], {interval.value:.4f} nats/sample [{interval.low:.4f}, {interval.high:.4f}]"
    )


def _scored_sets(
    classifier: ClipClassifier,
    model: WaveformModel | None,
    splits: dict[str, LabelledFiles],
    options: AudioEvaluationOptions,
) -> list[ScoredSet]:
    names = classifier.config.class_names
    log_mel = classifier.config.log_mel
    train, test = splits["train"], splits["test"]
    sets: dict[str, tuple[Opinions, Sequence[str] | None]] = {}

    def look(name: str, clips: Iterator[Tensor], labels: Sequence[str] | None = None) -> None:
        note(f"classifying the clips of: {name}")
        sets[name] = opinions(classifier, clips), labels

    look("train data", (fitted_clip(path, log_mel) for path in train.paths), train.labels)
    look("test data", (fitted_clip(path, log_mel) for path in test.paths), test.labels)
    if options.clips is not None:
        look("generated", (fitted_clip(path, log_mel) for path in find_audio_files(options.clips)))
    elif options.generate is not None and model is not None:
        look("generated", _generated(classifier, model, options.generate, options.seed))
    random = np.random.default_rng(options.seed)
    look(
        "shuffled noise",
        (shuffled(fitted_clip(path, log_mel), random) for path in test.paths),
    )
    look("silence", (torch.zeros(log_mel.clip_length) for _ in test.paths))
    training = sets["train data"][0]
    summary = feature_summary(training.features)
    rows = []
    for name, (found, labels) in sets.items():
        count = len(found.features)
        if count < FEWEST_CLIPS:
            raise InputError(f"{name} has {count} clips; scores need at least {FEWEST_CLIPS}")
        statistics = {
            "FID": lambda chosen, found=found: frechet_distance(summary, found.features[chosen]),
            "IS": lambda chosen, found=found: inception_score(
                found.probabilities[chosen], options.seed, held_out=not options.inception_over_all
            ),
            "mIS": lambda chosen, found=found: modified_inception_score(found.probabilities[chosen]),
            "AM": lambda chosen, found=found: am_score(training.probabilities, found.probabilities[chosen]),
        }
        scores = {
            score: bootstrap_interval(statistic, count, options.seed, options.resamples)
            for score, statistic in statistics.items()
        }
        accuracy = None
        if labels is not None:
            called = [names[number] for number in found.probabilities.argmax(axis=1)]
            accuracy = float(np.mean([one == label for one, label in zip(called, labels, strict=True)]))
        rows.append(ScoredSet(name, count, scores, accuracy))
    return rows


def shuffled(clip: Tensor, random: np.random.Generator) -> Tensor:
    """The samples of a clip in random order: noise of the same amplitudes."""
    return clip[torch.from_numpy(random.permutation(clip.shape[0]))]


def _generated(classifier: ClipClassifier, model: WaveformModel, count: int, seed: int) -> Iterator[Tensor]:
    generator = WaveformGenerator(model)
    for first in range(0, count, GENERATED_AT_ONCE):
        here = min(GENERATED_AT_ONCE, count - first)
        drawn = generator.generate(here, classifier.config.log_mel.seconds, seed, first_clip=first)
        for samples in drawn.samples:
            yield classifier.fitted(Waveform(samples, drawn.quantiser.sample_rate_hz))


def _table(rows: Sequence[ScoredSet]) -> list[str]:
    columns = ["set", "clips", *(part for score in SCORES for part in (score, f"{score}_low", f"{score}_high"))]
    lines = ["\t".join([*columns, "classifier_accuracy"])]
    for row in rows:
        numbers = [f"{value:.4f}" for score in SCORES for value in row.scores[score]]
        accuracy = "NA" if row.accuracy is None else f"{row.accuracy:.4f}"
        lines.append("\t".join([row.name, str(row.clips), *numbers, accuracy]))
    return lines


def scores_picture(rows: Sequence[ScoredSet]) -> bytes:
    """A panel per score, a bar per set with its interval, as PNG."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(SCORES)), SCORES, strict=True):
        for number, row in enumerate(rows):
            value, low, high = row.scores[score]
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.barh(number, value, xerr=error, color=COLORS[number % len(COLORS)], ecolor="#555555")
        axes.set_yticks(range(len(rows)), [row.name for row in rows] if score == SCORES[0] else [""] * len(rows))
        axes.invert_yaxis()
        axes.set_title(f"{score} ({'higher' if score in ('IS', 'mIS') else 'lower'} is better)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
