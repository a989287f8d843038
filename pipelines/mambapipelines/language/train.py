"""Pretrain a language model of DNA: from FASTA files and intervals to a model folder, with bit-exact resuming.

Layout of an output folder: the model (`config.json`, `model.safetensors`, `README.md`) and `training/`, the state and
the metrics of the run (`mambapipelines.training.state`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from genomamba.data.intervals import Interval, Split, WindowRule, read_intervals, window_rule
from genomamba.data.pretraining_windows import PretrainingWindow, PretrainingWindows
from genomamba.data.reference_set import ReferenceSet, rows_by_chromosome
from genomamba.letter_policy import LetterPolicy, letter_policy
from genomamba.models.interpolation import CountedFit, join_counts
from genomamba.models.language_model import CoreModel, load_language_model, save_language_model
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambacore.models import CausalLanguageModel
from mambapipelines.language.recipe import PretrainingRecipe
from mambapipelines.language.task import CausalTask, LanguageTask, MaskedTask
from mambapipelines.training.fingerprint import sequence_identity
from mambapipelines.training.plan import FORWARD_PASSES_PER_STEP, RunPlan
from mambapipelines.training.recipe import load_task_recipe
from mambapipelines.training.session import TrainingSession, parameter_count

TASKS: dict[str, type[LanguageTask]] = {"causal": CausalTask, "masked": MaskedTask}
TILES = "mamba"
"""The window rule of whole chromosomes: tiles without overlap."""


JOINING_BASES = 500_000
"""Validation bases for fitting the interpolation with an n-gram model."""


@dataclass(frozen=True)
class PretrainingOptions:
    """Options of `genomamba pretrain`.

    Attributes:
        references: FASTA files.
        length: length of a training window in bases.
        output: the folder that becomes the model folder; its subfolder `training` holds the state of the run.
        intervals: interval file of a single reference; without one, the splits are whole chromosomes.
        valid_chromosomes, test_chromosomes: excluded from training; the former are used for validation.
        exclude_chromosomes: not used at all.
        minutes: wall time of the whole run in minutes; by default the recipe's, unless `steps` is given.
        steps: number of optimiser steps instead of a wall time.
        start_from: a language model to train further, of the recipe's objective; its shape replaces the recipe's.
            `None` starts from random weights.
        recipe: name of a recipe of the package, or path of a YAML file.
        changes: values that replace the recipe's, each written `section.key=value`.
        seed: all randomness is a function of this seed and an index.
        resume: continue the run recorded in `output`, or start one if there is none.
        threads: number of CPU threads; `None` keeps PyTorch's default.
        device, precision: see `mambapipelines.device.choose`; by default, the precision is the recipe's.
        strategy: distribution over several processes, one of `mambapipelines.training.ranks.STRATEGIES`.
        deterministic: whether to use deterministic operators on a GPU.
        context_ranks: how many processes share each window; causal models only.
    """

    references: Sequence[str]
    length: int
    output: Path
    intervals: str | None = None
    valid_chromosomes: Sequence[str] = ()
    test_chromosomes: Sequence[str] = ()
    exclude_chromosomes: Sequence[str] = ()
    minutes: float | None = None
    steps: int | None = None
    start_from: str | None = None
    recipe: str = "small"
    changes: Sequence[str] = ()
    seed: int = 0
    resume: bool = False
    threads: int | None = None
    device: str = "auto"
    precision: str | None = None
    strategy: str = "single"
    deterministic: bool = False
    context_ranks: int = 1


@dataclass(frozen=True)
class PretrainingResult:
    """The result of a finished run.

    Attributes:
        folder: the model folder.
        steps: total number of optimiser steps taken.
        perplexity: per base, on held-out windows of the training length; `None` when there are none.
        metrics_path: CSV with one row per step.
        seconds: wall time of this call.
        already_finished: true if `resume` found the run complete.
    """

    folder: Path
    steps: int
    perplexity: float | None
    metrics_path: Path
    seconds: float
    already_finished: bool = False


@dataclass(frozen=True)
class LanguagePlan(RunPlan):
    """The plan of a pretraining run; `validation_bases` is the number of bases of one validation."""

    recipe: PretrainingRecipe
    length: int
    validation_bases: int

    def step_positions(self, step: int) -> float:
        """Number of bases of a step."""
        length = self.recipe.length.warmup(self.length).length_at(step)
        return self.recipe.batch.windows_per_step(length) * length

    @property
    def validation_steps(self) -> float:
        """The cost of one validation in optimiser steps."""
        bases_per_step = self.length * self.recipe.batch.windows_per_step(self.length)
        return self.validation_bases / (FORWARD_PASSES_PER_STEP * bases_per_step)


@dataclass(frozen=True)
class Corpus:
    """The sequences of a run: references, rows with their splits, and how rows are cut into windows.

    `short` lists contigs that are skipped because they are shorter than a window; `by_chromosome` is true if rows are
    whole chromosomes.
    """

    references: ReferenceSet
    rows: list[Interval]
    rule: WindowRule
    short: list[str]
    by_chromosome: bool


def read_corpus(options: PretrainingOptions, rule_name: str) -> Corpus:
    """Read the rows of the interval file, or assign whole chromosomes to the splits.

    Raises:
        InputError: files that cannot be read, intervals beside chromosomes or several references, chromosomes that are
            not there, or no row left to train on.
    """
    by_chromosome = (options.valid_chromosomes, options.test_chromosomes, options.exclude_chromosomes)
    if options.intervals is not None and any(by_chromosome):
        raise InputError("--intervals and splits by chromosome are both given: give only one of them.")
    if options.intervals is not None and len(options.references) > 1:
        raise InputError(
            f"--intervals are of one genome and {len(options.references)} references are given: give one, or splits by "
            "chromosome (--valid-chromosomes, --test-chromosomes)."
        )
    references = ReferenceSet(options.references)
    if options.intervals is not None:
        rows = read_intervals(options.intervals, references.lengths, references.path)
        return Corpus(references, rows, window_rule(rule_name), [], False)
    rows, short = rows_by_chromosome(references, options.length, *by_chromosome)
    for split, names in (("train", ["the chromosomes left"]), ("valid", by_chromosome[0]), ("test", by_chromosome[1])):
        if names and not any(row.split == split for row in rows):
            raise InputError(
                f"no chromosome of {options.length} bp or more is left for {split} ({', '.join(names)}): "
                "use a shorter --length or other chromosomes."
            )
    return Corpus(references, rows, window_rule(TILES), short, True)


def pretrain(options: PretrainingOptions) -> PretrainingResult:
    """Pretrain and save a language model; messages go to standard error.

    Saving and resuming are those of `mambapipelines.training.run.TrainingRun`.

    Raises:
        InputError: an option, the recipe or a file is invalid, or the loss is no longer finite.
        KeyboardInterrupt: if interrupted by Ctrl-C; the state is saved.
        SystemExit: if terminated by SIGTERM, with status 143; the state is saved.
    """
    recipe = load_task_recipe(PretrainingRecipe, options.recipe, options.changes)
    recipe.check()
    with TrainingSession(options, recipe, TASKS[recipe.objective]) as session:
        corpus = read_corpus(options, recipe.pretraining.rule)
        training, validation = _windows(options, recipe, corpus)
        depends_on = _depends_on(options, corpus)
        if session.resume(depends_on, _checksums(corpus, depends_on["reference"])):
            return _finished_result(session)
        model = _starting_model(options, recipe)
        task = TASKS[recipe.objective](model, recipe, training, validation)
        _introduce(session, options, recipe, corpus, task)
        outcome = session.train(task, LanguagePlan(recipe, options.length, len(validation) * options.length))
        model.eval()
        joined = None
        if recipe.pretraining.counted_order and task.can_validate():
            joined = _join_counts(options, recipe, corpus, task)
            session.progress.note(joined.summary())
        recounted = joined is not None or outcome.validation is None
        figures = (task.validate() if recounted and task.can_validate() else outcome.validation) or {}
        task.model.eval()
        perplexity = figures.get("perplexity")
        details = {
            "references": list(options.references),
            "intervals": options.intervals,
            "held_out": sorted({*options.valid_chromosomes, *options.test_chromosomes}),
            "valid_chromosomes": list(options.valid_chromosomes),
            "test_chromosomes": list(options.test_chromosomes),
            "exclude_chromosomes": list(options.exclude_chromosomes),
            "length": options.length,
            "start_from": options.start_from,
            "bases_seen": task.bases_seen(outcome.steps),
            "valid_perplexity": perplexity,
            "joined_with_counts": None if joined is None else asdict(joined),
        }
        policy = letter_policy(recipe.pretraining.letters)
        session.publish(lambda folder, every: save_language_model(folder, task.model, every, policy), details)
        return PretrainingResult(
            options.output, outcome.steps, perplexity, session.folder.metrics_path, session.seconds
        )


def _starting_model(options: PretrainingOptions, recipe: PretrainingRecipe) -> CoreModel:
    """A model with fresh weights, or the one to continue from."""
    if options.start_from is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return recipe.build_model()
    for change in options.changes:
        if change.startswith("model."):
            raise InputError(f"--set {change} is determined by the model given with --from: remove it.")
    start = load_language_model(options.start_from)
    if start.objective != recipe.objective:
        raise InputError(
            f"{options.start_from} is a {start.objective} model but the run is {recipe.objective}: use --objective "
            f"{start.objective}."
        )
    if start.details.get("joined_with_counts"):
        raise InputError(
            f"{options.start_from} is interpolated with an n-gram model, which cannot be trained further: start from a "
            "model trained with pretraining.counted_order 0."
        )
    return start.model.train()


def _join_counts(
    options: PretrainingOptions, recipe: PretrainingRecipe, corpus: Corpus, task: LanguageTask
) -> CountedFit:
    """Interpolate the task's model with a Markov model counted on the training bases."""
    assert isinstance(task.model, CausalLanguageModel)  # checked by the recipe
    settings = recipe.pretraining
    windows = _windows_of(options, recipe, corpus, "valid").evaluation(max(1, JOINING_BASES // options.length))
    task.model, fit = join_counts(
        task.model,
        settings.counted_order,
        training_tokens(corpus),
        [window.tokens for window in windows],
    )
    return fit


def training_tokens(corpus: Corpus) -> Iterator[Tokens]:
    """The tokens of every training row, ignoring case."""
    policy = LetterPolicy()
    for row in corpus.rows:
        if row.split == "train":
            yield policy.tokens(corpus.references.letters(row.chromosome, row.start, row.end))


def _windows(
    options: PretrainingOptions, recipe: PretrainingRecipe, corpus: Corpus
) -> tuple[PretrainingWindows, list[PretrainingWindow]]:
    """Windows to train on, and those of a validation: spread over all of the split, never longer than the work allows.

    Raises:
        InputError: a length, also one of the warm-up, that the rule cannot use, or no rows to train on.
    """
    training = _windows_of(options, recipe, corpus, "train")
    if recipe.length.warmup_steps_per_stage:
        length = recipe.length.warmup_first_length
        while length < options.length:
            corpus.rule.require_length(length)
            length *= 2
    if not any(row.split == "valid" for row in corpus.rows):
        return training, []
    return training, list(_windows_of(options, recipe, corpus, "valid").evaluation(recipe.validation.windows_per_class))


def _windows_of(
    options: PretrainingOptions, recipe: PretrainingRecipe, corpus: Corpus, split: Split
) -> PretrainingWindows:
    settings = recipe.pretraining
    return PretrainingWindows(
        corpus.references,
        corpus.rows,
        split,
        corpus.rule,
        options.length,
        options.seed,
        letter_policy(settings.letters),
        settings.reverse_complement_probability,
        settings.minimum_scored_fraction,
    )


def _depends_on(options: PretrainingOptions, corpus: Corpus) -> dict[str, Any]:
    """Everything the result of a run depends on, keyed by the names users know."""
    rows = "\n".join(f"{row.chromosome} {row.start} {row.end} {row.split}" for row in corpus.rows)
    return {
        "--length": options.length,
        **({} if options.start_from is None else {"--from": options.start_from}),
        "--valid-chromosomes": sorted(set(options.valid_chromosomes)),
        "--test-chromosomes": sorted(set(options.test_chromosomes)),
        "--exclude-chromosomes": sorted(set(options.exclude_chromosomes)),
        "--intervals": None if options.intervals is None else f"{zlib.crc32(rows.encode()):08x}",
        "reference": [_identity(corpus.references, name) for name in corpus.references.lengths],
    }


def _checksums(corpus: Corpus, identities: list[list[Any]]) -> dict[str, str]:
    """Every reference with a checksum of its contigs, whose identities are known."""
    found: dict[str, int] = {}
    for identity in identities:
        path = corpus.references.file(identity[0])
        found[path] = zlib.crc32(json.dumps(identity).encode(), found.get(path, 0))
    return {path: f"{checksum:08x}" for path, checksum in found.items()}


def _identity(references: ReferenceSet, contig: str) -> list[Any]:
    """Identifies a contig by its name, its length and checksums."""
    length = references.lengths[contig]
    return sequence_identity(contig, length, lambda start, end: references.letters(contig, start, end))


def _introduce(
    session: TrainingSession,
    options: PretrainingOptions,
    recipe: PretrainingRecipe,
    corpus: Corpus,
    task: LanguageTask,
) -> None:
    """Describe the run, and which input is not used."""
    progress = session.progress
    bases = {split: sum(row.length for row in corpus.rows if row.split == split) for split in ("train", "valid")}
    windows = task.windows(options.length)
    progress.note(
        f"{recipe.objective} model of {parameter_count(task.model):,} parameters, {bases['train']:,} bp to train on, "
        f"{len(windows):,} windows of {options.length:,} bp in an epoch, "
        f"{recipe.batch.windows_per_step(options.length)} per step"
    )
    if corpus.short:
        shown = ", ".join(corpus.short[:3]) + (", ..." if len(corpus.short) > 3 else "")
        progress.note(f"{len(corpus.short)} contigs are shorter than {options.length:,} bp and are not used: {shown}")
    if not task.can_validate():
        progress.note("nothing to validate on: give --valid-chromosomes, or intervals with valid rows")


def _finished_result(session: TrainingSession) -> PretrainingResult:
    """The result of a run that was already finished, read from its model folder."""
    folder = session.options.output
    details = load_language_model(folder).details
    return PretrainingResult(
        folder,
        details["steps"],
        details.get("valid_perplexity"),
        session.folder.metrics_path,
        session.seconds,
        already_finished=True,
    )
