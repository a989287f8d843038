"""How well are genomes that belong to none of the classes told from the classes, at each window length?

A window is detected when its typicality (`classification_unknown`) is below 5 %. That threshold comes from the held-out
windows that the model was calibrated on, never from windows that are tested here, so the share of in-clade test windows
that are taken for foreign is measured, not set. The area under the receiver operating characteristic (AUROC) needs no
threshold: the chance that a foreign window looks more foreign than one of the classes (Hendrycks & Gimpel 2017, "A
baseline for detecting misclassified and out-of-distribution examples", section 2). It is given for the score of
`--unknown-rate`, for the evidence alone, and, as a control, for the probability of the best class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from genomamba.classification.calibration import strand_averaged_evidence
from genomamba.classification.evidence import count_known
from genomamba.classification.held_out import FloatArray
from genomamba.classification.novelty import LikelihoodQuantiles, best_likelihood, own_likelihood, pair_counts
from genomamba.data.genomes import GenomeCollection, GenomeSpecification, load_genomes
from genomamba.data.windows import evaluation_windows
from genomamba.models.species_classifier import SpeciesClassifier
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambapipelines.console import BaseProgress, note

FALSE_ALARM_RATE: Final = 0.05
BASES_PER_GROUP: Final = 1 << 21


@dataclass(frozen=True)
class WindowScores:
    """Of windows of one length, (windows,) each; the lower, the more foreign.

    Attributes:
        score: of `--unknown-rate`: log-likelihood per base under the best class beyond that of its own composition.
        likelihood: log-likelihood per base under the best class alone.
        probability: of the best class.
    """

    score: FloatArray
    likelihood: FloatArray
    probability: FloatArray

    @classmethod
    def joined(cls, parts: Sequence[WindowScores]) -> WindowScores:
        """The windows of several."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@dataclass
class ScoringModel:
    """The model as a classifier of windows, which keeps the scores of what it has classified by length."""

    model: SpeciesClassifier
    parts: dict[int, list[WindowScores]] = field(default_factory=dict)

    @torch.inference_mode()
    def __call__(self, windows: Sequence[Tokens], length: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """Labels (windows,) and probabilities (windows, classes) of windows of one length, both strands averaged."""
        evidence = strand_averaged_evidence(self.model, np.stack(windows))
        probabilities = torch.softmax(self.model.logits(torch.from_numpy(evidence), length), dim=-1).numpy()
        known = np.array([count_known(window) for window in windows]) / length
        likelihood = best_likelihood(evidence, known)
        own = np.array([own_likelihood(pair_counts(window)) for window in windows])
        scores = WindowScores(likelihood - own, likelihood, probabilities.max(axis=1))
        self.parts.setdefault(length, []).append(scores)
        return probabilities.argmax(axis=1), probabilities

    def scores(self, length: int) -> WindowScores:
        """Of all windows of this length that were classified."""
        return WindowScores.joined(self.parts[length])


@dataclass(frozen=True)
class OutsiderRow:
    """How well the windows of one outsider are detected at one length.

    Attributes:
        length: of the windows, bp.
        name: of the outsider.
        windows: how many were scored.
        detected: share of them whose typicality is below 5 %.
        false_alarms: share of the classes' test windows whose typicality is.
        auroc, likelihood_auroc, probability_auroc: of the score, the evidence alone, and the control.
    """

    length: int
    name: str
    windows: int
    detected: float
    false_alarms: float
    auroc: float
    likelihood_auroc: float
    probability_auroc: float


def load_outsiders(specifications: Sequence[GenomeSpecification], class_names: Sequence[str]) -> GenomeCollection:
    """The genomes of `--outsider`.

    Raises:
        InputError: one has the name of a class, or a file cannot be read.
    """
    for specification in specifications:
        if specification.name in class_names:
            raise InputError(
                f"--outsider {specification.name} has the name of a class of the model: an outsider belongs to none, "
                "choose another name."
            )
    return load_genomes(specifications)


def outsider_quantiles(details: Mapping[str, Any]) -> LikelihoodQuantiles:
    """What is known of held-out windows.

    Raises:
        InputError: the model folder does not say, or of too few for a rate of 5 %.
    """
    return LikelihoodQuantiles.from_details(details, FALSE_ALARM_RATE)


def detect_outsiders(
    scoring: ScoringModel,
    quantiles: LikelihoodQuantiles,
    outsiders: GenomeCollection,
    *,
    per_outsider: int,
    seed: int,
) -> list[OutsiderRow]:
    """Score windows of the outsiders and hold them against those of the classes, at every length that these have.

    Args:
        scoring: has classified the classes' test windows.
        quantiles: of the windows that the model was calibrated on.
        outsiders: genomes of none of the classes.
        per_outsider: windows of each at each length, at most.
        seed: chooses the windows.
    """
    rows: list[OutsiderRow] = []
    inside = {length: scoring.scores(length) for length in sorted(scoring.parts)}
    materials = {length: evaluation_windows(outsiders, length, per_outsider, seed) for length in inside}
    total_bases = sum(length * len(material.windows) for length, material in materials.items())
    with BaseProgress("outsiders", total_bases, lines_elsewhere=True) as progress:
        for length, material in materials.items():
            if material.missing_classes:
                note(f"{length:,} bp: {', '.join(material.missing_classes)} has no window of known bases")
            for label, name in enumerate(outsiders.class_names):
                windows = [window for window in material.windows if window.label == label]
                if not windows:
                    continue
                other = ScoringModel(scoring.model)
                per_group = max(1, BASES_PER_GROUP // length)
                for start in range(0, len(windows), per_group):
                    group = [window.tokens() for window in windows[start : start + per_group]]
                    other(group, length)
                    progress.advance(length * len(group), f"{name}, windows of {length:,} bp")
                rows.append(_row(length, name, quantiles, inside[length], other.scores(length)))
    return rows


def _row(
    length: int, name: str, quantiles: LikelihoodQuantiles, inside: WindowScores, outside: WindowScores
) -> OutsiderRow:
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - a second to import

    foreign = np.repeat([0, 1], [len(inside.score), len(outside.score)])

    def share_below(scores: FloatArray) -> float:
        return float(np.mean([quantiles.typicality(float(score), length) < FALSE_ALARM_RATE for score in scores]))

    def auroc(kind: str) -> float:
        return float(roc_auc_score(foreign, -np.concatenate([getattr(inside, kind), getattr(outside, kind)])))

    return OutsiderRow(
        length=length,
        name=name,
        windows=len(outside.score),
        detected=share_below(outside.score),
        false_alarms=share_below(inside.score),
        auroc=auroc("score"),
        likelihood_auroc=auroc("likelihood"),
        probability_auroc=auroc("probability"),
    )


def outsider_columns(rows: Sequence[OutsiderRow], names: Sequence[str]) -> tuple[list[str], dict[int, list[str]]]:
    """Columns that the table of accuracy gets, and their cells by length; NA where an outsider has no window."""
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


def plot_outsiders(rows: Sequence[OutsiderRow]) -> bytes:
    """Two panels over the window length: detection rates with the false alarms, and AUROC with its controls; PNG."""
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
    area.set_ylabel("AUROC: score (line), evidence (dashed), probability (dotted)")
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
