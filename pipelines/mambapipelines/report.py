"""Reports: single HTML files with everything inside, which open without a network and without scripts."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mambapipelines.plots import format_length, plot_probability_by_length, plot_probability_histogram
from mambapipelines.species_classification import (
    HISTOGRAM_BINS,
    MOST_PLOTTED_RECORDS,
    NOT_AVAILABLE,
    Classification,
    ClassificationSummary,
)

STYLE: Final = """
body { font-family: system-ui, sans-serif; line-height: 1.5; color: #1c2733; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #d5dce3; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #e4e9ee; text-align: right;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
figure { margin: 0.8rem 0; }
figcaption { font-size: 0.9rem; color: #51606e; }
img { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows in words: `caption` below it, also for those who cannot see it."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Table:
    """Cells as plain text, first column to the left."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, pictures and tables of plain text; nothing in it is read as HTML."""

    heading: str
    content: Sequence[str | Picture | Table] = field(default_factory=tuple)


def page(title: str, sections: Sequence[Section]) -> str:
    """A whole HTML page, with all text escaped and all pictures embedded."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        if section.heading:
            parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        parts += [_render(item) for item in section.content]
    parts.append("</body></html>\n")
    return "\n".join(parts).encode("utf-8", "replace").decode()


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
        f"{summary.record_count:,} records of {summary.base_count:,} bp from {', '.join(sources)}, "
        f"classified with the model {model_folder}. Probabilities are the mean of both strands."
    )
    sections = [Section("", [overview]), Section("Calls", [by_call])]
    if summary.plotted:
        plotted = summary.plotted
        shown = f"{len(plotted):,} records" + (" drawn at random" if len(plotted) == MOST_PLOTTED_RECORDS else "")
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
    listed: list[str | Picture | Table] = [classification_table(summary.class_names, summary.listed)]
    if summary.record_count > len(summary.listed):
        listed.insert(0, f"The first {len(summary.listed):,} of {summary.record_count:,} records.")
    sections.append(Section("Records", listed))
    return page("Species of the records", sections)


def describe_lengths(lengths_bp: Sequence[int]) -> str:
    """Window lengths in words, such as "1 kb, 4 kb and 16 kb"."""
    words = [format_length(length) for length in lengths_bp]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _render(item: str | Picture | Table) -> str:
    if isinstance(item, str):
        return f"<p>{html.escape(item)}</p>"
    if isinstance(item, Picture):
        source = f"data:image/png;base64,{base64.b64encode(item.png).decode()}"
        caption = html.escape(item.caption)
        return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    header = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in item.header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in item.rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>\n{rows}</tbody></table>"
