"""Plots of evaluations and reports, as PNG files in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no window system and no global state
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from mambacore.safe_text import safe_field

FloatArray = npt.NDArray[np.float64]
DOTS_PER_INCH: Final = 120
# Okabe & Ito's palette, distinguishable with colour blindness.
COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS: Final = "osD^vPX"
SMALLEST_LOSS_SMOOTHING: Final = 5


class AccuracyPoint(Protocol):
    """A row of the evaluation table."""

    @property
    def length(self) -> int:
        """Window length, bp."""

    @property
    def classifier(self) -> str:
        """Name of the classifier."""

    @property
    def accuracy(self) -> float:
        """From 0 to 1."""

    @property
    def low(self) -> float:
        """Lower end of the interval."""

    @property
    def high(self) -> float:
        """Upper end of the interval."""


class TreeBranch(Protocol):
    """A branch of a simulated tree."""

    @property
    def name(self) -> str:
        """Child node."""

    @property
    def parent(self) -> str:
        """Parent node."""

    @property
    def substitutions_per_site(self) -> float:
        """Length of the branch."""


def plot_accuracy_by_length(rows: Sequence[AccuracyPoint], class_count: int) -> bytes:
    """Accuracy over window length, one line per classifier with its interval, and the line of chance."""
    figure, axes = _new_figure(7.0, 4.4)
    classifiers = list(dict.fromkeys(row.classifier for row in rows))
    for index, classifier in enumerate(classifiers):
        points = sorted((row for row in rows if row.classifier == classifier), key=lambda row: row.length)
        accuracy = np.array([row.accuracy for row in points])
        below = np.maximum(accuracy - [row.low for row in points], 0)
        above = np.maximum([row.high for row in points] - accuracy, 0)
        # Intervals at the same length are placed side by side.
        shift = 1.05 ** (index - (len(classifiers) - 1) / 2)
        axes.errorbar(
            [row.length * shift for row in points],
            accuracy,
            yerr=[below, above],
            label=_plain(classifier),
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=2.2 if index == 0 else 1.2,
            capsize=2.5,
            elinewidth=1,
        )
    axes.axhline(1 / class_count, color="#777777", linestyle=":", linewidth=1.2, label="chance")
    lengths = sorted({row.length for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_length(value)))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlabel("window length")
    axes.set_ylabel("accuracy (95 % interval)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return _to_png(figure)


def plot_training_curve(steps: FloatArray, loss: FloatArray, held_out: Sequence[tuple[float, float]]) -> bytes:
    """Training loss (smoothed) over steps and, on a second axis, accuracy on held-out windows.

    Args:
        steps: (steps,) step numbers.
        loss: (steps,) loss at each.
        held_out: pairs of step and accuracy.
    """
    figure, axes = _new_figure(7.0, 3.4)
    width = max(SMALLEST_LOSS_SMOOTHING, len(loss) // 50)
    axes.plot(steps, loss, color=COLORS[0], alpha=0.25, linewidth=0.8)
    if len(loss) > width:
        smooth = np.convolve(loss, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=COLORS[0], linewidth=2, label="loss")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss", color=COLORS[0])
    axes.grid(alpha=0.25)
    if held_out:
        accuracy_axes = axes.twinx()
        accuracy_axes.plot(
            [step for step, _ in held_out],
            [accuracy for _, accuracy in held_out],
            color=COLORS[1],
            marker="o",
            markersize=4,
        )
        accuracy_axes.set_ylim(0, 1)
        accuracy_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        accuracy_axes.set_ylabel("held-out accuracy", color=COLORS[1])
    return _to_png(figure)


def plot_run_curve(steps: FloatArray, values: FloatArray, name: str) -> bytes:
    """One metric of a training run over its steps; many noisy values are smoothed.

    Args:
        steps: (values,) step numbers.
        values: (values,) the metric at each.
        name: label of the axis.
    """
    figure, axes = _new_figure(7.0, 3.2)
    width = max(SMALLEST_LOSS_SMOOTHING, len(values) // 50)
    few = len(values) <= 2 * width
    axes.plot(
        steps,
        values,
        color=COLORS[0],
        alpha=1 if few else 0.25,
        linewidth=1.5 if few else 0.8,
        marker="o" if few else None,
        markersize=4,
    )
    if not few:
        smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=COLORS[0], linewidth=2)
    axes.set_xlabel("step")
    axes.set_ylabel(_plain(name))
    axes.grid(alpha=0.25)
    return _to_png(figure)


def plot_run_pace(steps: FloatArray, learning_rates: FloatArray, speeds: FloatArray, unit: str) -> bytes:
    """Learning rate and, on a second axis, speed of a training run over its steps.

    Args:
        steps: (steps,) step numbers.
        learning_rates: (steps,) rate of each.
        speeds: (steps,) `unit` per second of each; empty for none.
        unit: of the speed.
    """
    figure, axes = _new_figure(7.0, 2.6)
    axes.plot(steps, learning_rates, color=COLORS[0], linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate", color=COLORS[0])
    axes.grid(alpha=0.25)
    if len(speeds):
        speed_axes = axes.twinx()
        speed_axes.plot(steps, speeds, color=COLORS[1], linewidth=0.8, alpha=0.7)
        speed_axes.set_ylim(bottom=0)
        speed_axes.set_ylabel(f"{unit} per second", color=COLORS[1])
    return _to_png(figure)


def plot_probability_histogram(counts: npt.NDArray[np.int64]) -> bytes:
    """Histogram of records (bins,) by probability of the best class; bins of equal width from 0 to 1."""
    figure, axes = _new_figure(5.0, 3.0)
    width = 1 / len(counts)
    axes.bar(np.arange(len(counts)) * width, counts, width=width * 0.95, align="edge", color=COLORS[0])
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability of the call")
    axes.set_ylabel("records")
    axes.grid(alpha=0.25, axis="y")
    return _to_png(figure)


def plot_probability_by_length(lengths: Sequence[int], probabilities: Sequence[float], calls: Sequence[str]) -> bytes:
    """Scatter plot of record length against probability of the call, coloured by call."""
    figure, axes = _new_figure(6.0, 3.4)
    for index, call in enumerate(sorted(set(calls))):
        chosen = [place for place, other in enumerate(calls) if other == call]
        axes.scatter(
            [lengths[place] for place in chosen],
            [probabilities[place] for place in chosen],
            s=14,
            alpha=0.6,
            linewidths=0,
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            label=_plain(call),
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_length(value)))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("record length")
    axes.set_ylabel("probability of the call")
    axes.grid(alpha=0.25)
    if calls:
        axes.legend(frameon=False, fontsize=8)
    return _to_png(figure)


def plot_class_track(
    borders_bp: npt.NDArray[np.int64], probabilities: FloatArray, class_names: Sequence[str], record: str
) -> bytes:
    """Stacked probabilities of the classes along a record.

    Args:
        borders_bp: (windows + 1,) boundaries of the windows.
        probabilities: (windows, classes).
        class_names: in the order of the columns.
        record: its name.
    """
    figure, axes = _new_figure(8.0, 2.8)
    lower = np.zeros(len(probabilities))
    for index, name in enumerate(class_names):
        upper = lower + probabilities[:, index]
        color = COLORS[index % len(COLORS)]
        axes.stairs(upper, borders_bp, baseline=lower, fill=True, color=color, label=_plain(name))
        lower = upper
    axes.set_xlim(borders_bp[0], borders_bp[-1])
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_length(value)))
    axes.set_xlabel(f"position in {_plain(_shortened(record))}")
    axes.set_ylabel("probability")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return _to_png(figure)


def plot_tree(branches: Sequence[TreeBranch], root: str) -> bytes:
    """A rooted tree; horizontal distances are expected substitutions per site."""
    figure, axes = _new_figure(6.0, 2.8)
    depth = {root: 0.0}
    for branch in branches:
        depth[branch.name] = depth[branch.parent] + branch.substitutions_per_site
    children: dict[str, list[str]] = {}
    for branch in branches:
        children.setdefault(branch.parent, []).append(branch.name)
    height: dict[str, float] = {}
    leaves: list[str] = []

    def place(node: str) -> None:
        for child in children.get(node, []):
            place(child)
        if node in children:
            height[node] = float(np.mean([height[child] for child in children[node]]))
        else:
            height[node] = -len(leaves)
            leaves.append(node)

    place(root)
    for branch in branches:
        axes.plot([depth[branch.parent]] * 2, [height[branch.parent], height[branch.name]], color="black", lw=1.3)
        axes.plot([depth[branch.parent], depth[branch.name]], [height[branch.name]] * 2, color="black", lw=1.3)
    for leaf in leaves:
        axes.text(depth[leaf], height[leaf], f" {leaf}", va="center", style="italic", fontsize=10)
    axes.set_xlim(0, 1.25 * max(depth.values()))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("substitutions per site")
    return _to_png(figure)


def format_length(length_bp: float) -> str:
    """A readable length: 512 bp, 16 kb, 1 Mb (multiples of 1,024 are treated as thousands)."""
    for unit_bp, binary_unit_bp, unit in ((1_000_000, 1 << 20, "Mb"), (1_000, 1 << 10, "kb")):
        if length_bp >= unit_bp:
            divisor = binary_unit_bp if length_bp % binary_unit_bp == 0 else unit_bp
            return f"{length_bp / divisor:.3g} {unit}"
    return f"{length_bp:.0f} bp"


def _shortened(name: str, longest: int = 60) -> str:
    return name if len(name) <= longest else f"{name[: longest - 3]}..."


def _plain(text: str) -> str:
    """Text for a plot, in which dollar signs would begin a formula."""
    return safe_field(text).replace("$", r"\$")


def _new_figure(width_inches: float, height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _to_png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    # Without the library's version the same data give the same file.
    figure.savefig(stream, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return stream.getvalue()
