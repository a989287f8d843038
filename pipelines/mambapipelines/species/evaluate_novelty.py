"""Out-of-distribution (OOD) detection: how well are genomes of none of the classes recognised, at each window length?

A window is detected when its p-value (`genomamba.classification.novelty`) is below 5 %. That threshold comes from the
held-out windows that the model was calibrated on, never from the test windows, so the false alarms on test windows of
the classes are measured, not set. The area under the receiver operating characteristic (AUROC) needs no threshold: it
is the probability that an OOD window has a lower score than one of the classes (Hendrycks & Gimpel 2017, "A baseline
for detecting misclassified and out-of-distribution examples", section 2). It is given for the score of
`--unknown-rate`, for the likelihood alone, and for the probability of the best class as a baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import softmax

from genomamba.classification.evidence import (
    class_logits,
    count_known,
    evidence_of_records,
    longest_markov_order,
    markov_evidence,
    split_evidence,
)
from genomamba.classification.held_out import FloatArray
from genomamba.classification.novelty import (
    MARKOV,
    STACK,
    LikelihoodQuantiles,
    best_likelihood,
    count_scored_words,
    own_likelihood,
    pair_counts,
)
from genomamba.data.genomes import GenomeCollection, GenomeSpecification, load_genomes
from genomamba.data.windows import evaluation_windows
from genomamba.models.species_classifier import SpeciesClassifier
from genomamba.tokenizer import Tokens
from mambacore.devices import device_of, from_numpy, to_numpy
from mambacore.errors import InputError
from mambapipelines.console import WorkProgress, note

FALSE_ALARM_RATE: Final = 0.05
BASES_PER_GROUP: Final = 1 << 21


@dataclass(frozen=True)
class WindowScores:
    """Scores of windows of one length, (windows,) each; lower is more likely out of distribution.

    Attributes:
        score: of `--unknown-rate`: log-likelihood per base under the best class minus that under the window's own
            composition, nats.
        likelihood: log-likelihood per base or word under the best class, nats.
        probability: of the best class.
    """

    score: FloatArray
    likelihood: FloatArray
    probability: FloatArray

    @classmethod
    def joined(cls, parts: Sequence[WindowScores]) -> WindowScores:
        """Concatenate the scores of several groups of windows."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@dataclass
class ScoringModel:
    """The model as a classifier of windows that keeps, by length, the scores of what it has classified.

    Attributes:
        model: the classifier.
        basis: whose likelihood the scores are based on (`novelty.LikelihoodQuantiles.basis`).
        parts: length, bp -> scores.
    """

    model: SpeciesClassifier
    basis: str = STACK
    parts: dict[int, list[WindowScores]] = field(default_factory=dict)
    _last: tuple[Sequence[Tokens], FloatArray] | None = None

    def __call__(self, windows: Sequence[Tokens], length: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """Labels (windows,) and probabilities (windows, classes) of windows of one length, both strands averaged."""
        evidence = evidence_of_records(self.model, windows)
        self._last = (windows, evidence)
        probabilities = softmax(class_logits(self.model, evidence, length), axis=1)
        if self.basis == MARKOV:
            order = longest_markov_order(self.model)
            scored = np.array([count_scored_words(window, order) for window in windows])
            likelihood = best_likelihood(markov_evidence(self.model, evidence), scored / length)
        else:
            known = np.array([count_known(window) for window in windows])
            likelihood = best_likelihood(split_evidence(self.model, evidence)[0], known / length)
        own = np.array([own_likelihood(pair_counts(window)) for window in windows])
        scores = WindowScores(likelihood - own, likelihood, probabilities.max(axis=1))
        self.parts.setdefault(length, []).append(scores)
        return probabilities.argmax(axis=1), probabilities

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts that can answer by themselves; none of a model without counted parts."""
        combination = self.model.combination
        return () if combination is None else (STACK, *combination.kinds)

    def part(self, kind: str, windows: Sequence[Tokens], length: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """Labels and probabilities of windows by one kind of part alone, as if there were no other."""
        if self._last is None or self._last[0] is not windows:
            self._last = (windows, evidence_of_records(self.model, windows))
        evidence = self._last[1]
        combination, (stack, counted) = self.model.combination, split_evidence(self.model, evidence)
        assert combination is not None and counted is not None  # `kinds` is empty otherwise
        lengths = np.full(len(windows), length)
        if kind == STACK:
            device = device_of(self.model)
            with torch.inference_mode():
                logits = to_numpy(self.model.logits(from_numpy(stack, device), length), torch.float64)
        else:
            logits = combination.logits_alone(kind, counted, lengths)
        probabilities = softmax(logits, axis=1)
        return probabilities.argmax(axis=1), probabilities

    def scores(self, length: int) -> WindowScores:
        """Scores of all classified windows of this length."""
        return WindowScores.joined(self.parts[length])


@dataclass(frozen=True)
class DetectionRow:
    """OOD detection of one genome at one window length.

    Attributes:
        length: of the windows, bp.
        name: of the genome.
        windows: how many were scored.
        detected: share of them whose p-value is below 5 %.
        false_alarms: share of the classes' test windows whose p-value is below 5 %.
        auroc, likelihood_auroc, probability_auroc: of score, likelihood and probability.
    """

    length: int
    name: str
    windows: int
    detected: float
    false_alarms: float
    auroc: float
    likelihood_auroc: float
    probability_auroc: float


def load_ood_genomes(specifications: Sequence[GenomeSpecification], class_names: Sequence[str]) -> GenomeCollection:
    """Load the genomes of `--ood`.

    Raises:
        InputError: one has the name of a class, or a file cannot be read.
    """
    for specification in specifications:
        if specification.name in class_names:
            raise InputError(
                f"--ood {specification.name} has the name of a class of the model, but an OOD genome belongs to none: "
                "choose another name."
            )
    return load_genomes(specifications)


def detection_quantiles(details: Mapping[str, Any]) -> LikelihoodQuantiles:
    """Likelihood quantiles of the held-out windows.

    Raises:
        InputError: the model folder has none, or too few windows for a rate of 5 %.
    """
    return LikelihoodQuantiles.from_details(details, FALSE_ALARM_RATE)


def detect_ood(
    scoring: ScoringModel,
    quantiles: LikelihoodQuantiles,
    ood_genomes: GenomeCollection,
    *,
    per_genome: int,
    seed: int,
) -> list[DetectionRow]:
    """Score windows of OOD genomes and compare them with those of the classes, at every length of the latter.

    Args:
        scoring: the model, after it has classified the test windows of the classes.
        quantiles: of the windows the model was calibrated on.
        ood_genomes: genomes of none of the classes.
        per_genome: windows of each genome at each length, at most.
        seed: of the choice of windows.
    """
    rows: list[DetectionRow] = []
    inside = {length: scoring.scores(length) for length in sorted(scoring.parts)}
    materials = {length: evaluation_windows(ood_genomes, length, per_genome, seed) for length in inside}
    total_bases = sum(length * len(material.windows) for length, material in materials.items())
    with WorkProgress("OOD", total_bases, lines_elsewhere=True) as progress:
        for length, material in materials.items():
            if material.missing_classes:
                note(f"{length:,} bp: {', '.join(material.missing_classes)} has no window of known bases")
            for label, name in enumerate(ood_genomes.class_names):
                windows = [window for window in material.windows if window.label == label]
                if not windows:
                    continue
                other = ScoringModel(scoring.model, scoring.basis)
                per_group = max(1, BASES_PER_GROUP // length)
                for start in range(0, len(windows), per_group):
                    group = [window.tokens() for window in windows[start : start + per_group]]
                    other(group, length)
                    progress.advance(length * len(group), f"{name}, windows of {length:,} bp")
                rows.append(_row(length, name, quantiles, inside[length], other.scores(length)))
    return rows


def _row(
    length: int, name: str, quantiles: LikelihoodQuantiles, inside: WindowScores, outside: WindowScores
) -> DetectionRow:
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - a second to import

    is_ood = np.repeat([0, 1], [len(inside.score), len(outside.score)])

    def share_below(scores: FloatArray) -> float:
        return float(np.mean([quantiles.p_value(float(score), length) < FALSE_ALARM_RATE for score in scores]))

    def auroc(kind: str) -> float:
        return float(roc_auc_score(is_ood, -np.concatenate([getattr(inside, kind), getattr(outside, kind)])))

    return DetectionRow(
        length=length,
        name=name,
        windows=len(outside.score),
        detected=share_below(outside.score),
        false_alarms=share_below(inside.score),
        auroc=auroc("score"),
        likelihood_auroc=auroc("likelihood"),
        probability_auroc=auroc("probability"),
    )


def ood_columns(rows: Sequence[DetectionRow], names: Sequence[str]) -> tuple[list[str], dict[int, list[str]]]:
    """Columns for the table of accuracy, and their cells by length; NA where a genome has no window."""
    figures = ("windows", "detected", "auroc", "likelihood_auroc", "probability_auroc")
    header = ["false_alarms", *(f"{figure}_{name}" for name in names for figure in figures)]
    cells: dict[int, list[str]] = {}
    for length in sorted({row.length for row in rows}):
        by_name = {row.name: row for row in rows if row.length == length}
        cells[length] = [f"{next(iter(by_name.values())).false_alarms:.4f}"]
        for name in names:
            row = by_name.get(name)
            shares = ["NA"] * 4 if row is None else [f"{getattr(row, figure):.4f}" for figure in figures[1:]]
            cells[length] += ["0" if row is None else str(row.windows), *shares]
    return header, cells


def plot_ood(rows: Sequence[DetectionRow]) -> bytes:
    """Plot detection rates and false alarms, and AUROC with its baselines, by window length; PNG."""
    import io  # noqa: PLC0415

    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter  # noqa: PLC0415

    from mambapipelines.pages.plots import COLORS, format_length  # noqa: PLC0415

    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    detection, area = figure.subplots(1, 2)
    lengths = sorted({row.length for row in rows})
    for number, name in enumerate(dict.fromkeys(row.name for row in rows)):
        points = sorted((row for row in rows if row.name == name), key=lambda row: row.length)
        places, color = [row.length for row in points], COLORS[number % len(COLORS)]
        detection.plot(places, [row.detected for row in points], color=color, marker="o", label=name)
        area.plot(places, [row.auroc for row in points], color=color, marker="o", label=name)
        for kind, style in (("likelihood_auroc", "--"), ("probability_auroc", ":")):
            area.plot(places, [getattr(row, kind) for row in points], color=color, linestyle=style)
    alarms = {row.length: row.false_alarms for row in rows}
    detection.plot(lengths, [alarms[length] for length in lengths], color="#777777", marker="x", label="false alarms")
    detection.axhline(FALSE_ALARM_RATE, color="#777777", linestyle=":", linewidth=1)
    detection.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    detection.set_ylabel("windows called unknown at a rate of 5 %")
    area.axhline(0.5, color="#777777", linestyle=":", linewidth=1)
    area.set_ylabel("AUROC: score (solid), likelihood (dashed), probability (dotted)")
    for axes in (detection, area):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_length(value)))
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("window length")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()
