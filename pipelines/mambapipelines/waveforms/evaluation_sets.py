"""Scoring of sets of clips with a classifier: real ones, generated ones, and negative controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiomamba.data.clips import read_in_parallel
from audiomamba.data.labelled_clips import LabelledFiles
from audiomamba.data.labels import EVERY_VALUE
from audiomamba.data.waveforms import Waveform
from audiomamba.generation import WaveformGenerator
from audiomamba.metrics.scores import (
    FrechetDistanceTo,
    Interval,
    am_score,
    feature_summary,
    frechet_distance,
    half_sample_interval,
    inception_score,
    modified_inception_score,
)
from audiomamba.metrics.second_opinion import FEWEST_PER_CLASS, SecondOpinion
from audiomamba.metrics.speech import speech_figures
from audiomamba.models import WaveformModel
from audiomamba.models.clip_classifier import ClipClassifier, Opinions, fitted_clip, opinions
from mambacore.errors import InputError
from mambapipelines.console import WorkProgress, note
from mambapipelines.waveforms.evaluation_output import ScoredSet

FEWEST_CLIPS: Final = 10
GENERATED_AT_ONCE: Final = 64
MOST_MEASURED: Final = 1000
TRAIN, TEST, NOISE, SILENCE = ROW_NAMES = ("train data", "test data", "shuffled noise", "silence")


class Asking(NamedTuple):
    """Settings of generation (`audiomamba.generation.WaveformGenerator.generate`); None is what a model suggests."""

    guidance: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    candidates: int | None = None
    judge: str | None = None


class BadFiles:
    """Handling of unreadable files: either the first is an error, or each is skipped and reported once.

    Args:
        skip_bad: whether to skip them.
    """

    def __init__(self, skip_bad: bool) -> None:
        self._skip_bad = skip_bad
        self._named: set[str] = set()

    def leave_out(self, error: InputError) -> None:
        """Report an unreadable file.

        Raises:
            InputError: if such files are not to be skipped.
        """
        if not self._skip_bad:
            raise error
        if str(error) not in self._named:
            self._named.add(str(error))
            note(f"left out: {error}")


class SetScorer:
    """Scores sets of clips relative to the training clips of the models.

    Args:
        classifier: the classifier, in evaluation mode.
        train: training clips, the reference of Fréchet distances and AM scores.
        bad: handling of unreadable files.
        seed: seed of the halves, the generated clips and the noise.
        resamples: number of halves for each interval.
        inception_over_all: see `audiomamba.metrics.scores.inception_score`.
        second: clips that the first classifier did not learn from, for the second classifier; it is left out where
            there are too few.
        asking: settings of generation.

    Raises:
        InputError: if a file cannot be read, or there are too few clips.
    """

    def __init__(
        self,
        classifier: ClipClassifier,
        train: LabelledFiles,
        bad: BadFiles,
        seed: int,
        resamples: int,
        inception_over_all: bool,
        second: LabelledFiles | None = None,
        asking: Asking | None = None,
    ) -> None:
        self.classifier = classifier
        self.log_mel = classifier.config.log_mel
        self.bad = bad
        self.seed = seed
        self.resamples = resamples
        self.inception_over_all = inception_over_all
        self.asking = asking or Asking()
        self.second = None if second is None else self._second_opinion(second)
        self._kept: list[Tensor] = []
        self._kept_labels: list[str] = []
        self._training, self._training_accuracy = self._read(TRAIN, train)
        self._training_row = self._measured(ScoredSet(TRAIN, accuracy=self._training_accuracy), ())
        self._summary = feature_summary(self._training.features)

    def real_rows(self, test: LabelledFiles) -> list[ScoredSet]:
        """Score the training and the test data."""
        found, accuracy = self._read(TEST, test)
        row = self._measured(ScoredSet(TEST, accuracy=accuracy), self._kept_labels)
        return [self._scored(self._training_row, self._training), self._scored(row, found)]

    def folder_row(self, row: ScoredSet, paths: Sequence[Path]) -> ScoredSet:
        """Return a row with the scores of files."""
        found, _ = self._read(row.name, LabelledFiles(tuple(paths), ("",) * len(paths)))
        return self._scored(self._measured(row, ()), found)

    def generated_row(self, row: ScoredSet, model: WaveformModel, count: int) -> ScoredSet:
        """Return a row with the scores of the first clips that a model generates with the seed."""
        generator = WaveformGenerator(model)
        rate = generator.quantiser.sample_rate_hz
        known = set(self.classifier.config.class_names)
        heard = next((one.name for one in generator.label_sets if set(one.values) <= known), None)
        labels = {one.name: EVERY_VALUE for one in generator.label_sets}
        asked: list[str] = []
        self._kept = []
        wanted = self.asking if labels else self.asking._replace(guidance=None, candidates=None, judge=None)
        settings = generator.settings(
            wanted.temperature, wanted.top_p, wanted.guidance, wanted.candidates, wanted.judge, labels=labels
        )
        note(f"{row.name}: sampling with {settings}")
        total = count * settings.candidates * round(self.log_mel.seconds * rate)

        def clips(advance: Callable[[int], object]) -> Iterator[Tensor]:
            for first in range(0, count, GENERATED_AT_ONCE):
                here = min(GENERATED_AT_ONCE, count - first)
                generated = generator.generate(
                    here,
                    self.log_mel.seconds,
                    self.seed,
                    settings.temperature,
                    settings.top_p,
                    labels=labels,
                    guidance=settings.guidance,
                    candidates=settings.candidates,
                    judge=wanted.judge,
                    first_clip=first,
                    progress=advance,
                )
                asked.extend(one[heard] for one in generated.labels if heard is not None)
                for samples in generated.samples:
                    yield self.classifier.fitted(Waveform(samples, rate))

        with WorkProgress(f"generating with {row.name}", total, lines_elsewhere=True, unit="samples") as progress:
            found = opinions(self.classifier, self._keeping(clips(progress.advance)))
        if asked:
            row = replace(row, accuracy=self._accuracy(found, asked))
        return self._scored(self._measured(row, asked), found)

    def control_rows(self, test: LabelledFiles) -> list[ScoredSet]:
        """Score negative controls, which must be far worse than the test data: shuffled samples, and silence."""
        random = np.random.default_rng(self.seed)
        self._kept, labels = [], []

        def clips() -> Iterator[Tensor]:
            for clip, label in self._fitted(NOISE, test):
                labels.append(label)
                yield shuffled(clip, random)

        noise = opinions(self.classifier, self._keeping(clips()))
        noise_row = replace(self._measured(ScoredSet(NOISE), labels), accuracy=self._accuracy(noise, labels))
        nothing = opinions(self.classifier, [torch.zeros(self.log_mel.clip_length)])
        count = len(noise.features)
        silence = Opinions(np.repeat(nothing.probabilities, count, 0), np.repeat(nothing.features, count, 0))
        return [self._scored(noise_row, noise), self._scored(ScoredSet(SILENCE), silence)]

    def _fitted(self, name: str, files: LabelledFiles) -> Iterator[tuple[Tensor, str]]:
        """Yield the readable clips, fitted for the classifier, and their labels."""
        found = read_in_parallel(lambda number: fitted_clip(files.paths[number], self.log_mel), len(files.paths))
        with WorkProgress(f"classifying {name}", len(files.paths), lines_elsewhere=True, unit="clips") as progress:
            for clip, label in zip(found, files.labels, strict=True):
                progress.advance(1)
                if isinstance(clip, InputError):
                    self.bad.leave_out(clip)
                else:
                    yield clip, label

    def _read(self, name: str, files: LabelledFiles) -> tuple[Opinions, float | None]:
        """Return the classifier's outputs for files, and its accuracy if they have labels."""
        labels: list[str] = []

        def clips() -> Iterator[Tensor]:
            for clip, label in self._fitted(name, files):
                labels.append(label)
                yield clip

        self._kept, self._kept_labels = [], labels  # for the readable files
        found = opinions(self.classifier, self._keeping(clips()))
        return found, self._accuracy(found, labels) if any(labels) else None

    def _accuracy(self, found: Opinions, labels: Sequence[str]) -> float:
        """Return the share of clips for which the classifier predicts their label."""
        called = [self.classifier.config.class_names[number] for number in found.probabilities.argmax(axis=1)]
        return float(np.mean([one == label for one, label in zip(called, labels, strict=True)]))

    def _keeping(self, clips: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield the clips, keeping the first `MOST_MEASURED` for `_measured`."""
        for clip in clips:
            if len(self._kept) < MOST_MEASURED:
                self._kept.append(clip)
            yield clip

    def _measured(self, row: ScoredSet, labels: Sequence[str]) -> ScoredSet:
        """Return the row with the second classifier's accuracy and speech statistics for the kept clips."""
        row = replace(row, speech=speech_figures(self._kept, self.log_mel.sample_rate_hz))
        if self.second is None or not any(labels):
            return row
        heard = self.second.labels(self._kept)
        right = [one == label for one, label in zip(heard, labels, strict=False)]
        return replace(row, second_accuracy=float(np.mean(right)))

    def _second_opinion(self, files: LabelledFiles) -> SecondOpinion | None:
        """Train a second classifier for the same labels on these clips; None if they are too few."""
        names = self.classifier.config.class_names
        if min((files.labels.count(name) for name in names), default=0) < FEWEST_PER_CLASS:
            note("too few validation clips for a second, independent classifier")
            return None
        pairs = list(self._fitted("validation data", files))
        clips, labels = [clip for clip, _ in pairs], [label for _, label in pairs]
        return SecondOpinion(clips, labels, self.log_mel.sample_rate_hz)

    def _scored(self, row: ScoredSet, found: Opinions) -> ScoredSet:
        """Return the row with its scores and their intervals."""
        count = len(found.features)
        if count < FEWEST_CLIPS:
            raise InputError(f"{row.name} has {count} clips that can be read: give at least {FEWEST_CLIPS}.")
        note(f"scoring {row.name}: {count} clips")

        def inception(chosen: np.ndarray) -> float:
            return inception_score(found.probabilities[chosen], self.seed, held_out=not self.inception_over_all)

        def interval(statistic: Callable[[np.ndarray], float], value: float | None, smallest: float) -> Interval:
            return half_sample_interval(statistic, count, self.seed, self.resamples, value=value, smallest=smallest)

        distance = frechet_distance(self._summary, found.features)
        frechet = FrechetDistanceTo(self._summary, found.features)
        scores = {
            # The training clips are at distance 0 from themselves, whatever the random halves.
            "FID": Interval(0.0, 0.0, 0.0) if found is self._training else interval(frechet, distance, 0.0),
            "IS": interval(inception, None, 1.0),
            "mIS": interval(lambda chosen: modified_inception_score(found.probabilities[chosen]), None, 1.0),
            "AM": interval(
                lambda chosen: am_score(self._training.probabilities, found.probabilities[chosen]), None, 0.0
            ),
        }
        return replace(row, clips=count, scores=scores)


def shuffled(clip: Tensor, random: np.random.Generator) -> Tensor:
    """Return the samples of a clip in random order: noise with the same amplitudes."""
    return clip[torch.from_numpy(random.permutation(clip.shape[0]))]
