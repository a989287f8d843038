"""Accuracy by window length on held-out sequences, beside baselines fitted to the same training data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from genomamba.baselines import BASELINE_NAMES, FittedBaselines, fit_baselines
from genomamba.classification.calibration import expected_calibration_error
from genomamba.classification.held_out import FloatArray
from genomamba.data.genomes import GenomeCollection, GenomeSpecification, load_genomes
from genomamba.data.windows import MAXIMUM_UNKNOWN_FRACTION, EvaluationWindows, evaluation_windows
from genomamba.models.species_classifier import SpeciesClassifier, load_classifier
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambacore.safe_text import table_line
from mambapipelines.console import WorkProgress, note, show
from mambapipelines.device import begin_computing
from mambapipelines.files import check_writable_place, write_whole
from mambapipelines.species.evaluate_novelty import (
    DetectionRow,
    ScoringModel,
    detect_ood,
    detection_quantiles,
    load_ood_genomes,
    ood_columns,
    plot_ood,
)
from mambapipelines.species.evaluation_sequences import (
    check_lengths,
    describe_sequences,
    find_training_sequences,
    genomes_of_model,
    in_class_order,
    original_name,
    select_test_sequences,
)

MODEL_NAME: Final = "genomamba"
PART_PREFIX: Final = "part:"
"""Before the name of a part of the model in the table, `markov` being a baseline and `part:markov` a part."""
DEFAULT_LENGTHS_BP: Final = (1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576)
DEFAULT_WINDOWS_PER_CLASS: Final = 200
WINDOWS_PER_INDEPENDENT_WINDOW: Final = 4
"""Overlapping windows are redundant; more of them per non-overlapping one would only cost time."""
NORMAL_QUANTILE: Final = 1.959964
"""Of the standard normal distribution at 0.975, for intervals of 95 %."""
RELAXED_UNKNOWN_FRACTION: Final = 0.05
BASES_PER_GROUP: Final = 1 << 21
TABLE_NAME: Final = "accuracy.tsv"
PLOT_NAME: Final = "accuracy_by_length.png"
OOD_PLOT_PREFIX: Final = "ood_"
CHOICES_NAME: Final = "baselines.json"

Labels = npt.NDArray[np.int64]
Scores = Callable[[Sequence[Tokens], int], tuple[Labels, FloatArray | None]]
"""(windows, length in bp) -> predicted labels (windows,) and, if the classifier has them, probabilities."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `genomamba evaluate`.

    Attributes:
        model_folder: folder written by `genomamba train`.
        genomes: genomes to test on, classes named as in the model.
        lengths: window lengths in bases.
        per_class: windows of each class at each length, at most.
        baselines: names of the baselines to evaluate on the same windows.
        training_genomes: where the training genomes are now, if they have moved.
        output: folder for table, plot and choices, or a `.tsv` file; `None` prints the table.
        plot: PNG to write in any case.
        seed: of the choice of windows.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        ood_genomes: out-of-distribution genomes, of none of the classes.
        device, precision: see `mambapipelines.device.choose`.
    """

    model_folder: Path
    genomes: Sequence[GenomeSpecification]
    lengths: Sequence[int] = DEFAULT_LENGTHS_BP
    per_class: int = DEFAULT_WINDOWS_PER_CLASS
    baselines: Sequence[str] = BASELINE_NAMES
    training_genomes: Sequence[GenomeSpecification] = ()
    output: Path | None = None
    plot: Path | None = None
    seed: int = 0
    threads: int | None = None
    ood_genomes: Sequence[GenomeSpecification] = ()
    device: str = "auto"
    precision: str = "float32"


@dataclass(frozen=True)
class AccuracyRow:
    """Accuracy of one classifier on windows of one length.

    Attributes:
        length: of the windows, bp.
        classifier: `genomamba` or the name of a baseline.
        accuracy: mean over the classes, 0 to 1.
        low, high: Wilson's 95 % interval for `min(windows, independent_windows)` trials.
        windows: how many were classified.
        independent_windows: number of non-overlapping windows in the test sequences.
        expected_calibration_error: of the top probability; `None` for classifiers without calibrated probabilities.
    """

    length: int
    classifier: str
    accuracy: float
    low: float
    high: float
    windows: int
    independent_windows: int
    expected_calibration_error: float | None


def evaluate_species_classifier(options: EvaluationOptions) -> list[AccuracyRow]:
    """Evaluate a model and baselines, and write the table and the plot.

    Test windows come from the sequences that training held out. All sequences of a file that has none of them and was
    not trained on are test sequences.

    Raises:
        InputError: anything wrong with options, model folder or genomes.
    """
    _check_options(options)
    placement = begin_computing(options.device, options.precision, options.threads)
    model, details = load_classifier(options.model_folder)
    specifications = options.genomes or genomes_of_model(details)
    if not options.genomes:
        note("no genomes are given: the model is judged on what it held out of its own training genomes")
    genomes = in_class_order(load_genomes(specifications), model.config.class_names)
    test = select_test_sequences(genomes, details)
    check_lengths(test, options.lengths)
    if model.combination is not None and (details.get("stretches") or details.get("holdout")):
        note(
            "the calibration and the weight of the stack (6 numbers) were fitted on what was held out; where that is "
            "tested, figures are slightly optimistic"
        )
    ood_genomes = load_ood_genomes(options.ood_genomes, model.config.class_names)
    quantiles = detection_quantiles(details) if options.ood_genomes else None
    fitted = None
    if options.baselines:
        training = find_training_sequences(genomes, options.training_genomes, details)
        note(f"fitting the baselines {', '.join(options.baselines)} to {describe_sequences(training)}")
        fitted = fit_named_baselines(training, options.lengths, options.seed, options.baselines)
    model = model.to(placement.device)
    scoring = ScoringModel(model) if quantiles is None else ScoringModel(model, quantiles.basis)
    detected = []
    with placement.autocast():
        rows = accuracy_by_length(
            classifiers_of(scoring, fitted), test, options.lengths, per_class=options.per_class, seed=options.seed
        )
        if quantiles is not None:
            detected = detect_ood(scoring, quantiles, ood_genomes, per_genome=options.per_class, seed=options.seed)
    _write(options, rows, detected, fitted, len(model.config.class_names))
    return rows


def fit_named_baselines(
    training: GenomeCollection, lengths: Sequence[int], seed: int, names: Sequence[str]
) -> FittedBaselines:
    """Fit baselines to whole genomes; chromosomes of one name are held out together to choose hyperparameters."""
    by_class = [training.sequences_of(class_name) for class_name in training.class_names]
    return fit_baselines(
        [[sequence.tokens(0, sequence.length) for sequence in sequences] for sequences in by_class],
        lengths,
        seed,
        names,
        [[original_name(sequence) for sequence in sequences] for sequences in by_class],
    )


def classifiers_of(model: SpeciesClassifier | ScoringModel, fitted: FittedBaselines | None) -> dict[str, Scores]:
    """The model and the baselines by their names in the table."""
    scoring = model if isinstance(model, ScoringModel) else ScoringModel(model)
    classifiers: dict[str, Scores] = {MODEL_NAME: scoring}
    for kind in scoring.kinds:
        classifiers[PART_PREFIX + kind] = partial(scoring.part, kind)
    if fitted is not None:
        for name in fitted.names:
            classifiers[name] = lambda windows, length, name=name: (  # type: ignore[misc]
                fitted.predict(name, windows, length),
                None,
            )
    return classifiers


def accuracy_by_length(
    classifiers: Mapping[str, Scores],
    test: GenomeCollection,
    lengths: Sequence[int],
    *,
    per_class: int,
    seed: int,
    windows_per_independent: int = WINDOWS_PER_INDEPENDENT_WINDOW,
) -> list[AccuracyRow]:
    """Evaluate classifiers on the same windows, equally many of each class.

    Lengths at which a class has no window are left out with a note, because fewer classes are easier to classify.
    Windows have at most 1 % of unknown bases, or up to 5 % in all classes, with a note, where some class has no such
    window. The baseline `composition` shows whether that gives a class away.

    Args:
        classifiers: name in the table -> classifier.
        test: sequences to take windows from.
        lengths: of the windows, bp.
        per_class: windows of each class at each length, at most.
        seed: of the choice of windows.
        windows_per_independent: windows per non-overlapping one, at most.

    Raises:
        InputError: there are no windows of any length.
    """
    materials: list[EvaluationWindows] = []
    for length in sorted(set(lengths)):
        independent = _independent_by_name(test, length)
        short = [name for name, number in independent.items() if not number]
        if short:
            note(f"{length:,} bp is left out: no test sequence of {', '.join(short)} is that long")
            continue
        count = min(per_class, windows_per_independent * min(independent.values()))
        material = evaluation_windows(test, length, count, seed)
        if material.missing_classes:
            note(
                f"{length:,} bp: {', '.join(material.missing_classes)} has no window with at most "
                f"{MAXIMUM_UNKNOWN_FRACTION:.0%} unknown bases, so up to {RELAXED_UNKNOWN_FRACTION:.0%} are allowed"
            )
            material = evaluation_windows(test, length, count, seed, RELAXED_UNKNOWN_FRACTION)
        if material.missing_classes:
            note(f"{length:,} bp is left out: too many unknown bases in {', '.join(material.missing_classes)}")
            continue
        own, shared = material.independent_per_class, _independent_by_name(test, length)
        rests_on = sum(min(shared[name], number) for name, number in own.items())
        if rests_on < len(material.windows):
            count = len(material.windows)
            note(f"{length:,} bp: {count} windows, {rests_on} of them independent, which the intervals count")
        materials.append(material)
    if not materials:
        raise InputError("no length has test windows of every class: give shorter --lengths or other genomes.")
    rows: list[AccuracyRow] = []
    total_bases = sum(material.length * len(material.windows) for material in materials)
    with WorkProgress("evaluate", total_bases, lines_elsewhere=True) as progress:
        for material in materials:
            by_name = _independent_by_name(test, material.length)
            independent_counts = [min(by_name[name], count) for name, count in material.independent_per_class.items()]
            labels = np.array([window.label for window in material.windows], dtype=np.int64)
            for name, (predicted, probabilities) in _classify_windows(classifiers, material, progress).items():
                rows.append(
                    _accuracy_row(
                        material.length,
                        name,
                        labels=labels,
                        predicted=predicted,
                        probabilities=probabilities,
                        independent=independent_counts,
                    )
                )
    return rows


def _classify_windows(
    classifiers: Mapping[str, Scores], material: EvaluationWindows, progress: WorkProgress
) -> dict[str, tuple[Labels, FloatArray | None]]:
    """Run every classifier on the windows, a few megabases at a time."""
    per_group = max(1, BASES_PER_GROUP // material.length)
    parts: dict[str, list[tuple[Labels, FloatArray | None]]] = {name: [] for name in classifiers}
    for start in range(0, len(material.windows), per_group):
        tokens = [window.tokens() for window in material.windows[start : start + per_group]]
        for name, scores in classifiers.items():
            parts[name].append(scores(tokens, material.length))
        progress.advance(material.length * len(tokens), f"windows of {material.length:,} bp")
    results: dict[str, tuple[Labels, FloatArray | None]] = {}
    for name, groups in parts.items():
        probabilities = [group for _, group in groups if group is not None]
        joined = np.concatenate(probabilities) if probabilities else None
        results[name] = np.concatenate([predicted for predicted, _ in groups]), joined
    return results


def wilson_interval(accuracy: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % score interval (Wilson 1927, J. Am. Stat. Assoc. 22:209) of a proportion in `trials` trials."""
    square = NORMAL_QUANTILE**2
    center = (accuracy + square / (2 * trials)) / (1 + square / trials)
    half = NORMAL_QUANTILE * math.sqrt(accuracy * (1 - accuracy) / trials + square / (4 * trials**2))
    half /= 1 + square / trials
    return max(0.0, min(accuracy, center - half)), min(1.0, max(accuracy, center + half))


def table_text(
    rows: Sequence[AccuracyRow], detected: Sequence[DetectionRow] = (), ood_genomes: Sequence[str] = ()
) -> str:
    """The table as tab-separated text; shares have four decimals, and a missing calibration error is NA.

    With OOD genomes, further columns hold the model's detection figures; they are NA for baselines.
    """
    columns = ("accuracy", "low", "high")
    header = ("length", "classifier", *columns, "windows", "independent_windows", "expected_calibration_error")
    columns_beside, cells_by_length = ood_columns(detected, ood_genomes) if ood_genomes else ([], {})
    lines = [table_line([*header, *columns_beside])]
    for row in rows:
        error = row.expected_calibration_error
        shares = [f"{getattr(row, column):.4f}" for column in columns]
        counts = [str(row.windows), str(row.independent_windows), "NA" if error is None else f"{error:.4f}"]
        beside = ["NA"] * len(columns_beside)
        if row.classifier == MODEL_NAME:
            beside = cells_by_length.get(row.length, beside)
        lines.append(table_line([str(row.length), row.classifier, *shares, *counts, *beside]))
    return "\n".join(lines) + "\n"


def _accuracy_row(
    length: int,
    classifier: str,
    *,
    labels: Labels,
    predicted: Labels,
    probabilities: FloatArray | None,
    independent: Sequence[int],
) -> AccuracyRow:
    counts = np.bincount(labels, minlength=len(independent))
    correct = np.bincount(labels, weights=predicted == labels, minlength=len(independent))
    accuracy = float((correct / counts).mean())
    # The mean of the class accuracies has the variance of one proportion of this many trials: the number of classes
    # times the harmonic mean of their trials.
    trials = len(counts) ** 2 / float((1 / np.minimum(counts, independent)).sum())
    low, high = wilson_interval(accuracy, trials)
    weights = (1 / counts)[labels] / len(counts)
    error = None if probabilities is None else expected_calibration_error(probabilities, labels, weights)
    return AccuracyRow(length, classifier, accuracy, low, high, len(labels), sum(independent), error)


def _independent_by_name(test: GenomeCollection, length: int) -> dict[str, int]:
    """Non-overlapping windows per class; records of one name (a chromosome in several strains) count once."""
    counts: dict[str, int] = {}
    for class_name in test.class_names:
        longest: dict[str, int] = {}
        for sequence in test.sequences_of(class_name):
            longest[sequence.name] = max(longest.get(sequence.name, 0), sequence.length)
        counts[class_name] = sum(bases // length for bases in longest.values())
    return counts


def _check_options(options: EvaluationOptions) -> None:
    if not options.lengths or min(options.lengths) < 1:
        raise InputError("--lengths needs at least one length, each of 1 bp or more.")
    if options.per_class < 1:
        raise InputError(f"--per-class is {options.per_class}: give 1 or more windows.")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}: give 0 or more.")
    for name in options.baselines:
        if name not in BASELINE_NAMES:
            raise InputError(f"there is no baseline '{name}': give {', '.join(BASELINE_NAMES)} or none.")
    genomes = [path for one in (*options.genomes, *options.ood_genomes) for path in one.paths]
    if options.output is not None and not _is_folder(options.output):
        check_writable_place(options.output, "--output", genomes)
    if options.output is not None and _is_folder(options.output) and options.output.is_file():
        raise InputError(f"--output {options.output} is a file: give a folder, or a name that ends in .tsv.")
    if options.plot is not None:
        check_writable_place(options.plot, "--plot", genomes)


def _is_folder(output: Path) -> bool:
    return output.is_dir() or output.suffix != ".tsv"


def _write(
    options: EvaluationOptions,
    rows: Sequence[AccuracyRow],
    detected: Sequence[DetectionRow],
    fitted: FittedBaselines | None,
    class_count: int,
) -> None:
    from mambapipelines.pages.plots import plot_accuracy_by_length  # noqa: PLC0415 - matplotlib, only when it is needed

    table, plot = options.output, options.plot
    if options.output is not None and _is_folder(options.output):
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output {options.output} cannot be made ({error.strerror}): choose another.") from error
        table, plot = options.output / TABLE_NAME, options.plot or options.output / PLOT_NAME
        if fitted is not None:
            write_whole(options.output / CHOICES_NAME, json.dumps(fitted.describe(), indent=2) + "\n")
    text = table_text(rows, detected, [specification.name for specification in options.ood_genomes])
    if plot is not None:
        write_whole(plot, plot_accuracy_by_length(rows, class_count))
        if detected:
            write_whole(plot.with_name(OOD_PLOT_PREFIX + plot.name), plot_ood(detected))
    if table is None:
        show(text.rstrip("\n"))
    else:
        write_whole(table, text)
