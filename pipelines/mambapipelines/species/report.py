"""The HTML report of `genomamba classify`: calls, probabilities and records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from genomamba.classification.records import Classification
from mambapipelines.console import counted
from mambapipelines.pages.html import Item, Picture, Section, Table, page
from mambapipelines.pages.plots import format_length, plot_probability_by_length, plot_probability_histogram
from mambapipelines.species.rows import (
    HISTOGRAM_BINS,
    MOST_PLOTTED_RECORDS,
    NOT_AVAILABLE,
    ClassificationSummary,
)


def classification_table(class_names: Sequence[str], rows: Sequence[Classification]) -> Table:
    """The rows of a classification as a table."""
    table_rows = []
    for row in rows:
        if row.probabilities is None:
            figures = [NOT_AVAILABLE] * (1 + len(class_names))
        else:
            figures = [f"{value:.4f}" for value in (row.probability, *row.probabilities)]
        table_rows.append([row.name, f"{row.length:,}", row.call, *figures])
    return Table(["record", "length (bp)", "call", "probability", *class_names], table_rows)


def classification_page(summary: ClassificationSummary, model_folder: Path, sources: Sequence[str]) -> str:
    """The report of `genomamba classify`: records and bases by call, probabilities, and the records."""
    calls = sorted(summary.records, key=lambda call: (-summary.bases[call], call))
    by_call = Table(
        ["call", "records", "bases (bp)", "share of bases"],
        [
            [
                call,
                f"{summary.records[call]:,}",
                f"{summary.bases[call]:,}",
                f"{summary.bases[call] / max(1, summary.base_count):.1%}",
            ]
            for call in calls
        ],
    )
    overview = (
        f"{counted(summary.record_count, 'record')} of {summary.base_count:,} bp from {', '.join(sources)}, "
        f"classified with the model {model_folder}. Probabilities are the mean of both strands."
    )
    sections = [Section("", [overview]), Section("Calls", [by_call])]
    if summary.plotted:
        plotted = summary.plotted
        shown = counted(len(plotted), "record") + (" sampled at random" if len(plotted) == MOST_PLOTTED_RECORDS else "")
        by_length = plot_probability_by_length(
            [row.length for row in plotted], [row.probability for row in plotted], [row.call for row in plotted]
        )
        histogram_caption = f"Records by probability of the call, in bins of {1 / HISTOGRAM_BINS:.2f}."
        sections.append(
            Section(
                "Probabilities",
                [
                    Picture(plot_probability_histogram(summary.histogram), histogram_caption),
                    Picture(by_length, f"Length and probability of the call, {shown}."),
                ],
            )
        )
    listed: list[Item] = [classification_table(summary.class_names, summary.listed)]
    if summary.record_count > len(summary.listed):
        listed.insert(0, f"The first {len(summary.listed):,} of {summary.record_count:,} records.")
    sections.append(Section("Records", listed))
    return page("Species of the records", sections)


def describe_lengths(lengths_bp: Sequence[int]) -> str:
    """Window lengths in words, such as "1 kb, 4 kb and 16 kb"."""
    words = [format_length(length) for length in lengths_bp]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
