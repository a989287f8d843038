"""Reports open offline, say what is true, and show every name as it is."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from genomamba.data.simulation import Branch
from mambapipelines.pages.html import Picture, Section, Table, page
from mambapipelines.pages.plots import (
    format_length,
    plot_accuracy_by_length,
    plot_probability_by_length,
    plot_training_curve,
    plot_tree,
)
from mambapipelines.species.classify import MOST_LISTED_RECORDS, Classification, ClassificationSummary
from mambapipelines.species.evaluate import AccuracyRow
from mambapipelines.species.report import classification_page, describe_lengths

NASTY_NAME = "<script>alert('&amp;')</script>"


class PageReader(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> PageReader:
    reader = PageReader()
    reader.feed(text)
    return reader


def summary_of(rows: list[Classification]) -> ClassificationSummary:
    summary = ClassificationSummary(("alba", "nigra"))
    for row in rows:
        summary.add(row)
    return summary


def test_a_page_is_whole_and_loads_nothing_from_elsewhere() -> None:
    rows = [Classification("a", 1200, "alba", np.array([0.9, 0.1])), Classification("b", 3, "unclassified", None)]
    text = classification_page(summary_of(rows), Path("model"), ["in.fa"])
    reader = read(text)
    assert reader.tags.count("img") == 2
    assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
    assert not re.search(r"https?://|@import|<script|<link", text)
    assert text.rstrip().endswith("</html>")
    assert "2 records of 1,203 bp from in.fa" in text
    assert "NA" in reader.text


def test_names_of_records_and_files_are_shown_and_never_run() -> None:
    rows = [Classification(NASTY_NAME, 10, "alba", np.array([0.9, 0.1]))]
    text = classification_page(summary_of(rows), Path(NASTY_NAME), [NASTY_NAME])
    reader = read(text)
    assert "script" not in reader.tags
    assert NASTY_NAME in reader.text


def test_text_tables_and_captions_are_escaped() -> None:
    picture = Picture(b"png", '"><b>')
    text = page("<i>", [Section("<u>", ["<p2>", Table(["<th2>"], [["<td2>"]]), picture])])
    assert not {"i", "u", "p2", "th2", "td2", "b"} & set(read(text).tags)


def test_long_lists_are_cut_and_say_so() -> None:
    rows = [Classification(f"r{number}", 10, "alba", np.array([0.9, 0.1])) for number in range(MOST_LISTED_RECORDS + 5)]
    text = classification_page(summary_of(rows), Path("model"), ["in.fa"])
    assert "The first 1,000 of 1,005 records." in text
    assert "r999" in text
    assert "r1000" not in text


@pytest.mark.parametrize("rows", [[], [Classification("short", 0, "unclassified", None)]])
def test_a_report_without_classified_records_has_no_plots(rows: list[Classification]) -> None:
    assert "img" not in read(classification_page(summary_of(rows), Path("model"), ["in.fa"])).tags


def test_the_same_figures_give_the_same_pictures() -> None:
    rows = [AccuracyRow(length, name, 0.5, 0.4, 0.6, 9, 9, None) for length in (1024, 4096) for name in ("a", "b")]
    pictures = [plot_accuracy_by_length(rows, 3) for _ in range(2)]
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")
    assert plot_accuracy_by_length(rows[:2], 3) != pictures[0]


def test_plots_take_the_smallest_inputs() -> None:
    for picture in (
        plot_training_curve(np.array([1.0]), np.array([2.0]), []),
        plot_probability_by_length([1], [1.0], ["a"]),
        plot_accuracy_by_length([AccuracyRow(1, "a", 1.0, 0.2, 1.0, 1, 1, None)], 2),
        plot_tree([Branch("a", "root", 0.1, 0.5, 1.0)], "root"),
    ):
        assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (1, "1 bp"),
        (256, "256 bp"),
        (1000, "1 kb"),
        (1024, "1 kb"),
        (1500, "1.5 kb"),
        (65_536, "64 kb"),
        (1 << 20, "1 Mb"),
    ],
)
def test_lengths_read_as_people_write_them(length: int, words: str) -> None:
    assert format_length(length) == words


def test_several_lengths_read_as_a_sentence() -> None:
    assert describe_lengths([256]) == "256 bp"
    assert describe_lengths([256, 1024, 4096]) == "256 bp, 1 kb and 4 kb"
