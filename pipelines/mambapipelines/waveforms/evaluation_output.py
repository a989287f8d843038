"""Outputs of `audiomamba evaluate`: a table with a row per set of clips, one with a row per clip, and a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no window system and no global state

from audiomamba.metrics.likelihood import ClipLikelihood
from audiomamba.metrics.scores import Interval
from audiomamba.metrics.speech import SpeechFigures
from mambacore.safe_text import table_line
from mambapipelines.pages.plots import COLORS

SCORES: Final = ("FID", "IS", "mIS", "AM")
HIGHER_IS_BETTER: Final = frozenset({"IS", "mIS"})
NOT_APPLICABLE: Final = "NA"


class ModelFacts(NamedTuple):
    """Properties of a model for fair comparisons, such as size and training time."""

    parameters: int
    seed: int | None  # training seed
    steps: int | None
    minutes: float | None  # duration of its optimiser steps
    nats_per_sample: Interval


@dataclass(frozen=True)
class ScoredSet:
    """A row of the table.

    Attributes:
        name: name of the set or the model.
        clips: number of scored clips; None without a classifier.
        scores: scores in `SCORES`; empty without a classifier.
        accuracy: share of clips for which the classifier predicts their actual or requested label.
        second_accuracy: the same for a second, independent classifier.
        speech: voiced share, flatness and fundamental frequency.
        model: properties of the model, if any.
    """

    name: str
    clips: int | None = None
    scores: Mapping[str, Interval] = field(default_factory=dict)
    accuracy: float | None = None
    second_accuracy: float | None = None
    speech: SpeechFigures | None = None
    model: ModelFacts | None = None


def scores_table(rows: Sequence[ScoredSet]) -> str:
    """Return TSV, with NA for values that do not apply to a row."""
    ranged = ("bits_per_sample", "nats_per_sample", *SCORES)
    columns = ["set", "clips", "parameters", "seed", "steps", "training_minutes"]
    columns += [part for name in ranged for part in (name, f"{name}_low", f"{name}_high")]
    heard = [
        "classifier_accuracy",
        "second_accuracy",
        "voiced_share",
        "flatness",
        "pitch_10_hz",
        "pitch_50_hz",
        "pitch_90_hz",
    ]
    lines = [table_line([*columns, *heard])]
    for row in rows:
        facts = row.model
        of_model = [NOT_APPLICABLE] * 4
        if facts is not None:
            of_model = [_cell(value) for value in (facts.parameters, facts.seed, facts.steps)]
            of_model.append(_cell(facts.minutes, ".2f"))
        cells = [row.name, _cell(row.clips), *of_model]
        for name in ranged:
            found = _ranged(row, name)
            cells += [NOT_APPLICABLE] * 3 if found is None else [f"{value:.4f}" for value in found]
        cells += [_cell(row.accuracy, ".4f"), _cell(row.second_accuracy, ".4f")]
        if row.speech is None:
            cells += [NOT_APPLICABLE] * 5
        else:
            cells += [_cell(row.speech.voiced_share, ".4f"), _cell(row.speech.flatness, ".4f")]
            cells += [_cell(pitch, ".1f") for pitch in row.speech.pitch_hz]
        lines.append(table_line(cells))
    return "\n".join(lines) + "\n"


def likelihoods_table(likelihoods: Mapping[str, Mapping[Path, ClipLikelihood]], folder: Path) -> str:
    """Return TSV with a row per model and test clip."""
    lines = ["model\tclip\tsamples\tbits_per_sample\tnats_per_sample"]
    for model, found in likelihoods.items():
        for path, one in found.items():
            mean = one.nats / one.samples
            name = path.relative_to(folder).as_posix()
            lines.append(table_line([model, name, str(one.samples), f"{mean / math.log(2):.6f}", f"{mean:.6f}"]))
    return "\n".join(lines) + "\n"


def scores_picture(rows: Sequence[ScoredSet]) -> bytes:
    """Plot a panel per score and a bar with interval per row, as PNG."""
    names = [name for name in ("bits_per_sample", *SCORES) if any(_ranged(row, name) for row in rows)]
    figure = Figure(figsize=(3 * len(names) + 2, 1.2 + 0.35 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, (axes, name) in enumerate(zip(panels, names, strict=True)):
        _draw(axes, rows, name)
        axes.set_yticks(range(len(rows)), [row.name for row in rows] if panel == 0 else [""] * len(rows))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _draw(axes: Axes, rows: Sequence[ScoredSet], name: str) -> None:
    # Noise is off the scale of the other sets by orders of magnitude.
    if name == "FID":
        axes.set_xscale("symlog", linthresh=1.0)
    elif name == "mIS":
        axes.set_xscale("log")
    for number, row in enumerate(rows):
        found = _ranged(row, name)
        if found is not None:
            error = [[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]]
            axes.barh(number, found.value, xerr=error, color=COLORS[number % len(COLORS)], ecolor="#555555")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    better = "higher" if name in HIGHER_IS_BETTER else "lower"
    axes.set_title(f"{name.replace('_', ' ')} ({better} is better)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _ranged(row: ScoredSet, name: str) -> Interval | None:
    """Return a score of a row with its interval."""
    if name in SCORES:
        return row.scores.get(name)
    if row.model is None:
        return None
    nats = row.model.nats_per_sample
    return nats if name == "nats_per_sample" else Interval(*(value / math.log(2) for value in nats))


def _cell(value: float | int | None, form: str = "") -> str:
    return NOT_APPLICABLE if value is None or math.isnan(value) else f"{value:{form}}"
