"""Fitting of the baselines, with all hyperparameters chosen on training data only."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import numpy as np

from genomamba.baselines.composition import CompositionControl
from genomamba.baselines.kmer_classifier import KmerBaseline, kmer_spectra
from genomamba.baselines.markov import MarkovBaseline, strand_symmetric_counts
from genomamba.baselines.sampling import LabelledWindows, UnknownBasesError, draw_windows, set_aside
from mambacore.errors import InputError

Value = TypeVar("Value")

BASELINE_NAMES = ("kmer", "markov", "composition")
WORD_LENGTHS = (4, 6)
REGULARISATIONS = (0.00001, 0.0003, 0.01, 0.3)
MARKOV_ORDERS = tuple(range(3, 11))
TRAINING_LENGTHS_BP = (1_024, 4_096, 16_384, 65_536)
# Limits on the windows of each class and length: bases, number of windows, and how often they cover the smallest class.
FITTING_BASES, FITTING_WINDOWS = 16_000_000, 2_000
CHOOSING_BASES, CHOOSING_WINDOWS = 8_000_000, 600
MAXIMUM_COVERAGE = 2
LONGEST_CHOOSING_LENGTH_BP = 262_144


@dataclass(frozen=True)
class KmerChoice:
    """The best k-mer settings at one evaluation length, and their accuracy (0-1) on the validation sequences."""

    word_length: int
    regularisation: float
    training_length_bp: int
    accuracy: float


@dataclass(frozen=True)
class MarkovChoice:
    """The best order at one evaluation length, and its accuracy (0-1) on the validation sequences."""

    order: int
    accuracy: float


@dataclass
class FittedBaselines:
    """Baselines fitted to all training sequences, with the choices made for each evaluation length (bp)."""

    kmer_choices: dict[int, KmerChoice] = field(default_factory=dict)
    markov_choices: dict[int, MarkovChoice] = field(default_factory=dict)
    kmer_models: dict[KmerChoice, KmerBaseline] = field(default_factory=dict)
    markov_models: dict[int, MarkovBaseline] = field(default_factory=dict)
    composition_models: dict[int, CompositionControl] = field(default_factory=dict)

    def predict(self, name: str, windows: Sequence[np.ndarray], length: int) -> np.ndarray:
        """Predict classes, int64 (windows,), with the baseline `name` as chosen for windows of `length` bp.

        For other lengths the choice for the next shorter length is used, or else that for the shortest.

        Raises:
            InputError: if there is no such baseline, or it was not fitted.
        """
        if name == "kmer" and self.kmer_choices:
            probabilities = self.kmer_models[_for_length(self.kmer_choices, length)].predict_proba(windows)
        elif name == "markov" and self.markov_choices:
            order = _for_length(self.markov_choices, length).order
            probabilities = self.markov_models[order].log_likelihoods(windows)
        elif name == "composition" and self.composition_models:
            probabilities = _for_length(self.composition_models, length).predict_proba(windows)
        else:
            raise InputError(f"there is no fitted baseline {name!r}: give one of {', '.join(self.names) or 'none'}")
        return probabilities.argmax(axis=1)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fitted baselines."""
        fitted = (self.kmer_choices, self.markov_choices, self.composition_models)
        return tuple(name for name, models in zip(BASELINE_NAMES, fitted, strict=True) if models)

    def describe(self) -> dict[str, dict[int, dict[str, float]]]:
        """Return a JSON-serialisable mapping: baseline -> evaluation length (bp) -> chosen settings."""
        descriptions: dict[str, dict[int, dict[str, float]]] = {}
        if self.kmer_choices:
            descriptions["kmer"] = {length: asdict(choice) for length, choice in self.kmer_choices.items()}
        if self.markov_choices:
            descriptions["markov"] = {length: asdict(choice) for length, choice in self.markov_choices.items()}
        if self.composition_models:
            descriptions["composition"] = {length: {"training_length_bp": length} for length in self.composition_models}
        return descriptions


def fit_baselines(
    training_sequences: Sequence[Sequence[np.ndarray]],
    lengths: Sequence[int],
    seed: int,
    names: Sequence[str] = BASELINE_NAMES,
    sequence_names: Sequence[Sequence[str]] | None = None,
) -> FittedBaselines:
    """Choose settings on a validation part of the training sequences, then fit the chosen models to all of them.

    Windows are sampled uniformly over classes, sequences, starts and strands. The k-mer baseline is chosen among k = 4
    and 6, four regularisations and window lengths from 1,024 to 65,536 bp (and shorter evaluation lengths), the Markov
    baseline among the orders 3 to 10, both for each evaluation length. Candidates are compared on windows of the
    evaluation length, up to 262,144 bp and as far as the validation sequences are long enough; longer evaluation
    lengths use the choice for the longest of these.

    Args:
        training_sequences: Tokens, uint8 (length,), of the sequences of each class.
        lengths: Evaluation lengths, bp.
        seed: Non-negative; the result is a function of it and of the sequences.
        names: The baselines to fit.
        sequence_names: Names of the sequences in the same order. Sequences with the same name are used for validation
            together in all classes; give chromosome names if strains or species share them.

    Raises:
        InputError: if a name is unknown, there are fewer than two classes, a length is below 1, or sequences are too
            short or have too many N.
    """
    for name in names:
        if name not in BASELINE_NAMES:
            raise InputError(f"there is no baseline {name!r}: give one of {', '.join(BASELINE_NAMES)}")
    if len(training_sequences) < 2 or not all(training_sequences):
        raise InputError("the baselines need at least two classes, each with at least one training sequence")
    if not lengths or min(lengths) < 1 or seed < 0:
        raise InputError(
            "the baselines need at least one evaluation length, each of 1 bp or more, and a seed of 0 or more"
        )

    parts = set_aside(training_sequences, sequence_names, _generator(seed, _SET_ASIDE))
    shorter_lengths = [length for length in lengths if length < min(TRAINING_LENGTHS_BP)]
    fitting_lengths = _usable_lengths((*shorter_lengths, *TRAINING_LENGTHS_BP), parts.fitting, max(TRAINING_LENGTHS_BP))
    choosing_lengths = _usable_lengths(lengths, parts.choosing, LONGEST_CHOOSING_LENGTH_BP)

    def draw(purpose: int, sequences: Sequence[Sequence[np.ndarray]], length: int) -> LabelledWindows:
        bases, windows = (
            (CHOOSING_BASES, CHOOSING_WINDOWS) if purpose == _CHOOSING else (FITTING_BASES, FITTING_WINDOWS)
        )
        smallest_class_bases = min(sum(map(len, class_sequences)) for class_sequences in sequences)
        per_class = max(1, min(windows, bases // length, MAXIMUM_COVERAGE * smallest_class_bases // length))
        return draw_windows(sequences, length, per_class, _generator(seed, purpose, length))

    fitted = FittedBaselines()
    choosing: dict[int, LabelledWindows] = {}
    for length in choosing_lengths:
        # Stretches of unknown bases leave no long window in some assemblies: a shorter length's choice serves them.
        with suppress(UnknownBasesError):
            choosing[length] = draw(_CHOOSING, parts.choosing, length)
    if not choosing:
        shortest = min(*TRAINING_LENGTHS_BP, *choosing_lengths)
        choosing[shortest] = draw(_CHOOSING, parts.choosing, shortest)
    if "kmer" in names:
        fitted.kmer_choices = choose_kmer_baselines(
            lambda length: draw(_FITTING, parts.fitting, length), fitting_lengths, choosing
        )
        for choice in set(fitted.kmer_choices.values()):
            material = draw(_REFITTING, training_sequences, choice.training_length_bp)
            model = KmerBaseline(choice.word_length, choice.regularisation)
            fitted.kmer_models[choice] = model.fit(material.windows, material.labels)
    if "markov" in names:
        fitted.markov_choices = choose_markov_orders(parts.fitting, choosing)
        orders = {choice.order for choice in fitted.markov_choices.values()}
        counts = [strand_symmetric_counts(sequences, max(orders) + 1) for sequences in training_sequences]
        fitted.markov_models = {order: MarkovBaseline(order).fit_counts(counts) for order in orders}
    if "composition" in names:
        for length in _usable_lengths(lengths, training_sequences, max(TRAINING_LENGTHS_BP)):
            with suppress(UnknownBasesError):
                material = draw(_REFITTING, training_sequences, length)
                fitted.composition_models[length] = CompositionControl().fit(material.windows, material.labels)
    return fitted


def choose_kmer_baselines(
    draw_fitting_windows: Callable[[int], LabelledWindows],
    fitting_lengths: Sequence[int],
    choosing: Mapping[int, LabelledWindows],
) -> dict[int, KmerChoice]:
    """Return for each evaluation length the k, regularisation and training length with the best accuracy.

    Args:
        draw_fitting_windows: Samples training windows of a given length (bp) on demand.
        fitting_lengths: Training lengths to try, bp.
        choosing: Evaluation length (bp) -> validation windows for comparing the candidates.
    """
    choices: dict[int, KmerChoice] = {}
    choosing_spectra = {
        (length, word_length): kmer_spectra(material.windows, word_length)
        for length, material in choosing.items()
        for word_length in WORD_LENGTHS
    }
    for training_length in fitting_lengths:
        try:
            fitting = draw_fitting_windows(training_length)
        except UnknownBasesError:
            if training_length == fitting_lengths[0]:
                raise
            continue
        for word_length in WORD_LENGTHS:
            spectra = kmer_spectra(fitting.windows, word_length)
            for regularisation in REGULARISATIONS:
                model = KmerBaseline(word_length, regularisation).fit_spectra(spectra, fitting.labels)
                for length, material in choosing.items():
                    probabilities = model.predict_proba_spectra(choosing_spectra[length, word_length])
                    accuracy = _accuracy(probabilities, material.labels)
                    if length not in choices or accuracy > choices[length].accuracy:
                        choices[length] = KmerChoice(word_length, regularisation, training_length, accuracy)
    return choices


def choose_markov_orders(
    fitting: Sequence[Sequence[np.ndarray]], choosing: Mapping[int, LabelledWindows]
) -> dict[int, MarkovChoice]:
    """Return for each evaluation length (bp) the order whose models, fitted to `fitting`, are most accurate."""
    counts = [strand_symmetric_counts(sequences, max(MARKOV_ORDERS) + 1) for sequences in fitting]
    choices: dict[int, MarkovChoice] = {}
    for order in MARKOV_ORDERS:
        model = MarkovBaseline(order).fit_counts(counts)
        for length, material in choosing.items():
            accuracy = _accuracy(model.log_likelihoods(material.windows), material.labels)
            if length not in choices or accuracy > choices[length].accuracy:
                choices[length] = MarkovChoice(order, accuracy)
    return choices


# Streams of random numbers, one for each purpose.
_SET_ASIDE, _FITTING, _CHOOSING, _REFITTING = range(4)


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)))


def _usable_lengths(
    lengths: Sequence[int], sequences_by_class: Sequence[Sequence[np.ndarray]], longest: int
) -> tuple[int, ...]:
    """Return the ascending lengths up to `longest` that every class has a sequence for, or the longest possible one."""
    available = min(max(len(tokens) for tokens in sequences) for sequences in sequences_by_class)
    limit = min(longest, available)
    return tuple(sorted({length for length in lengths if length <= limit})) or (limit,)


def _for_length(by_length: Mapping[int, Value], length: int) -> Value:
    return by_length[max((known for known in by_length if known <= length), default=min(by_length))]


def _accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == labels).mean())
