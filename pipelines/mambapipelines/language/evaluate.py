"""Perplexity per base of a language model on held-out sequence, beside Markov models trained on the same bases.

Every scorer sees the same windows and is scored on the same bases: A, C, G and T of each window after its first base.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genomamba.baselines.interpolated_markov import FittedMarkovModels, fit_markov_models
from genomamba.data.intervals import Split
from genomamba.data.pretraining_windows import PretrainingWindow, PretrainingWindows
from genomamba.data.reference_set import SEPARATOR
from genomamba.letter_policy import LetterPolicy
from genomamba.models.language_model import LanguageModel, load_language_model
from genomamba.scoring.likelihood import WindowScores, base_losses, blocks_of, is_base
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambacore.safe_text import table_line
from mambapipelines.console import WorkProgress, note, show
from mambapipelines.device import begin_computing
from mambapipelines.files import check_writable_place, write_whole
from mambapipelines.language.train import Corpus, PretrainingOptions, read_corpus, training_tokens

COLUMNS = (
    "length",
    "scorer",
    "best_on_valid",
    "windows",
    "bases",
    "nats_per_base",
    "perplexity",
    "perplexity_low",
    "perplexity_high",
    "ratio",
    "ratio_low",
    "ratio_high",
)
# Bounds the memory of a forward pass.
BASES_AT_A_TIME = 65_536
# What strengths and the order of Markov models are chosen on.
MARKOV_VALIDATION_BASES = 1_000_000
MODEL_NAME = "model"


@dataclass(frozen=True)
class PerplexityOptions:
    """Options of `genomamba perplexity`.

    Attributes:
        model: folder, or `hf://owner/name@revision`.
        references: FASTA files.
        lengths: window lengths in bases.
        intervals, rule: interval file, and the rule that cuts its rows into windows; `None` uses those of training.
        valid_chromosomes, test_chromosomes, exclude_chromosomes: splits by chromosome, if there are no intervals;
            by default those of the training run.
        split: the split that is scored.
        bases: upper limit of scored bases per length, spread over the split.
        markov_order: highest order of the Markov models; `None` for no Markov models.
        output: file for the table; `None` is standard output.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        device, precision: see `mambapipelines.device.choose`.
    """

    model: str
    references: Sequence[str]
    lengths: Sequence[int]
    intervals: str | None = None
    rule: str | None = None
    valid_chromosomes: Sequence[str] = ()
    test_chromosomes: Sequence[str] = ()
    exclude_chromosomes: Sequence[str] = ()
    split: Split = "test"
    bases: int = 4_000_000
    markov_order: int | None = 12
    output: Path | None = None
    threads: int | None = None
    device: str = "auto"
    precision: str = "float32"


@dataclass(frozen=True)
class PerplexityRow:
    """One scorer at one length; `ratio` is its perplexity divided by the model's, above 1 where the model is better."""

    length: int
    scorer: str
    best_on_valid: bool
    windows: int
    bases: int
    nats_per_base: float
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def text(self) -> str:
        """The row of the table."""
        figures = [f"{value:.5f}" if math.isfinite(value) else "NA" for value in self._figures()]
        best = "yes" if self.best_on_valid else "no"
        return table_line([str(self.length), self.scorer, best, str(self.windows), str(self.bases), *figures])

    def _figures(self) -> tuple[float, ...]:
        return (
            self.nats_per_base,
            self.perplexity,
            self.perplexity_low,
            self.perplexity_high,
            self.ratio,
            self.ratio_low,
            self.ratio_high,
        )


def measure_perplexity(options: PerplexityOptions) -> list[PerplexityRow]:
    """Print or write the table of perplexities; progress goes to standard error.

    Raises:
        InputError: an option or file is invalid, or the split has no window of a requested length.
    """
    _check(options)
    placement = begin_computing(options.device, options.precision, options.threads)
    language_model = load_language_model(options.model).to(placement.device)
    corpus = _corpus(options, language_model)
    lengths = list(dict.fromkeys(options.lengths))
    parts = {length: _held_out(options, corpus, length) for length in lengths}
    markov = None
    if options.markov_order is not None:
        markov = _fit_markov(corpus, min(lengths), options.markov_order)
    rows: list[PerplexityRow] = []
    lines = [table_line(COLUMNS)]
    if options.output is None:
        show(lines[0])
    with placement.autocast():
        for length, part in parts.items():
            for row in _rows_of_length(options, language_model, part, length, markov):
                rows.append(row)
                lines.append(row.text())
                if options.output is None:
                    show(lines[-1])
    if options.output is not None:
        write_whole(options.output, "\n".join(lines) + "\n")
    return rows


def _check(options: PerplexityOptions) -> None:
    for length in options.lengths:
        if length < 2:
            raise InputError(
                f"--lengths has {length}: use windows of 2 bases or more, the first of which is not scored."
            )
    if options.bases < 1:
        raise InputError(f"--bases is {options.bases}: use 1 or more.")
    if options.output is not None:
        check_writable_place(options.output, "--output", (*options.references, options.intervals))


def _corpus(options: PerplexityOptions, language_model: LanguageModel) -> Corpus:
    """The requested splits, by default those recorded in the model folder."""
    details = language_model.details
    chromosomes: dict[str, Any] = {
        name: list(getattr(options, name)) for name in ("valid_chromosomes", "test_chromosomes", "exclude_chromosomes")
    }
    intervals = options.intervals
    if intervals is None and not any(chromosomes.values()):
        intervals = details.get("intervals")
        chromosomes = {name: details.get(name, []) for name in chromosomes}
    if intervals is None and not chromosomes[f"{options.split}_chromosomes"]:
        raise InputError(
            f"{options.model} does not say what was held out for {options.split}: "
            f"give --{options.split}-chromosomes, or --intervals."
        )
    length = details.get("length") or min(options.lengths)
    rule = options.rule or details.get("recipe", {}).get("pretraining", {}).get("rule", "mamba")
    return read_corpus(PretrainingOptions(options.references, length, Path(), intervals=intervals, **chromosomes), rule)


def _held_out(options: PerplexityOptions, corpus: Corpus, length: int) -> Corpus:
    """The rows to score; among whole chromosomes, those long enough for a window."""
    rows = [row for row in corpus.rows if row.split == options.split]
    if corpus.by_chromosome:
        rows = [row for row in rows if row.length >= length]
    if not rows:
        raise InputError(
            f"there is no {options.split} row for windows of {length} bp to measure on: use a shorter length, name "
            "another split, or give it rows."
        )
    return dataclasses.replace(corpus, rows=rows)


def _fit_markov(corpus: Corpus, length: int, order: int) -> FittedMarkovModels:
    """Count Markov models on all training rows and fit their smoothing on validation windows."""
    for split in ("train", "valid"):
        if not any(row.split == split for row in corpus.rows):
            raise InputError(
                f"Markov models need {split} bases: give --valid-chromosomes or rows for {split}, or --no-markov."
            )
    valid = _windows(corpus, "valid", length, LetterPolicy())
    validation = [window.tokens for window in valid.evaluation(max(1, MARKOV_VALIDATION_BASES // length))]
    bases = sum(row.length for row in corpus.rows if row.split == "train")
    with WorkProgress("counting for Markov models", bases, lines_elsewhere=True) as progress:
        return fit_markov_models(_reported(training_tokens(corpus), progress), validation, order)


def _reported(sequences: Iterable[Tokens], progress: WorkProgress) -> Iterator[Tokens]:
    for tokens in sequences:
        yield tokens
        progress.advance(len(tokens))


def _windows(corpus: Corpus, split: Split, length: int, policy: LetterPolicy) -> PretrainingWindows:
    return PretrainingWindows(corpus.references, corpus.rows, split, corpus.rule, length, policy=policy)


def _rows_of_length(
    options: PerplexityOptions,
    language_model: LanguageModel,
    corpus: Corpus,
    length: int,
    markov: FittedMarkovModels | None,
) -> Iterator[PerplexityRow]:
    windows = _windows(corpus, options.split, length, language_model.policy)
    wanted = min(len(windows), max(1, options.bases // length))
    plain = LetterPolicy()
    names = [] if markov is None else [f"markov-{model.order}" for model in markov.models]
    nats: dict[str, list[float]] = {name: [] for name in (MODEL_NAME, *names)}
    counts: list[int] = []
    places: list[tuple[str, int]] = []
    rows_at_a_time = max(1, BASES_AT_A_TIME // length)
    with WorkProgress(f"windows of {length:,} bp", wanted * length, lines_elsewhere=True) as progress:
        for batch in _batches(windows.evaluation(wanted), rows_at_a_time):
            tokens = torch.from_numpy(np.stack([window.tokens for window in batch]))
            losses = base_losses(language_model, tokens)
            scored = is_base(tokens)[:, 1:]
            nats[MODEL_NAME] += losses.sum(dim=1).tolist()
            counts += scored.sum(dim=1).tolist()
            for row, window in enumerate(batch):
                place = window.place
                places.append((place.chromosome.rpartition(SEPARATOR)[2], max(place.start, 0)))
                if markov is not None:
                    letters = corpus.references.letters(place.chromosome, place.start, place.end, pad=True)
                    counted = scored[row].numpy()
                    by_order = markov.log_probabilities_by_order(plain.tokens(letters))
                    for name, log_probabilities in zip(names, by_order, strict=True):
                        nats[name].append(float(-(log_probabilities[1:] * counted).sum()))
            progress.advance(len(batch) * length)
    if not sum(counts):
        raise InputError(f"no {options.split} window of {length} bp has a base to score: use another length or split.")
    blocks = blocks_of(places, length)
    scores = {name: WindowScores(np.array(values), np.array(counts), blocks) for name, values in nats.items()}
    best = None if markov is None else f"markov-{markov.best.order}"
    for name, score in scores.items():
        low, high = score.interval()
        more = score.nats_per_base - scores[MODEL_NAME].nats_per_base
        less_more = (0.0, 0.0) if name == MODEL_NAME else score.interval(scores[MODEL_NAME])
        yield PerplexityRow(
            length,
            name,
            name == best,
            len(counts),
            sum(counts),
            score.nats_per_base,
            *(math.exp(value) for value in (score.nats_per_base, low, high, more, *less_more)),
        )
    if best is not None:
        _summarise(length, scores[MODEL_NAME], scores[best], best)


def _summarise(length: int, model: WindowScores, markov: WindowScores, name: str) -> None:
    low, high = markov.interval(model)
    verdict = "lower" if low > 0 else "higher" if high < 0 else "not clearly different"
    note(
        f"{length:,} bp: perplexity {math.exp(model.nats_per_base):.4f}, {name} (the best on the validation split) "
        f"{math.exp(markov.nats_per_base):.4f}: the model's is {verdict}"
    )


def _batches(items: Iterable[PretrainingWindow], size: int) -> Iterator[list[PretrainingWindow]]:
    batch: list[PretrainingWindow] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
