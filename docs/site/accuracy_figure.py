"""The plot on the first screen of the README: accuracy by length, from the table in the card of a shipped model.

python docs/site/accuracy_figure.py          writes docs/accuracy.svg

The figures are read from the card, never typed again. A test compares the file with what this writes.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CARD = REPOSITORY / "genomamba" / "weights" / "yeasts" / "README.md"
FIGURE = REPOSITORY / "docs" / "accuracy.svg"
TITLE = "Three yeasts, chromosomes held out of training: accuracy by length"

WIDTH_PX, HEIGHT_PX = 720, 300
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 48, 500, 40, 256
# Column of the table, name in the legend, colour, dash pattern.
SERIES = (
    ("genomamba (95 % interval)", "genomamba, 95 % interval", "#00796b", ""),
    ("k-mers + LR", "k-mers, logistic regression", "#c62828", "6 3"),
    ("Markov", "Markov models", "#5e35b1", "2 3"),
    ("composition", "GC and N only", "#757575", "8 3 2 3"),
)


@dataclass(frozen=True)
class Row:
    """Accuracies in % at one length, by column, and the 95 % interval of the classifier."""

    length_bp: int
    accuracy: dict[str, float]
    low: float
    high: float


def read_rows(card: Path) -> tuple[list[Row], float]:
    """The first table of accuracies in a card, and the chance level (%) that the sentence before it gives.

    Raises:
        ValueError: The card has no such table.
    """
    text = card.read_text(encoding="utf-8")
    table = re.search(
        r"^\| length \| windows \| genomamba [^\n]*\n\| --- [^\n]*\n((?:\|[^\n]*\n)+)", text, re.MULTILINE
    )
    if table is None:
        raise ValueError(f"{card} has no table of accuracies by length.")
    names = [cell.strip() for cell in table[0].splitlines()[0].strip("|").split("|")]
    rows = []
    for line in table[1].splitlines():
        cells = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        low, high = re.search(r"\((\d+)-(\d+)\)", cells[SERIES[0][0]]).groups()
        accuracy = {name: float(re.search(r"[\d.]+", cells[name])[0]) for name, *_ in SERIES}
        rows.append(Row(int(cells["length"].replace(",", "")), accuracy, float(low), float(high)))
    chance = re.findall(r"\(chance (\d+)", text[: table.start()])
    return rows, float(chance[-1])


def figure(rows: list[Row], chance: float) -> str:
    """The plot as SVG: lengths on a logarithmic axis, accuracy in %."""
    first, last = math.log2(rows[0].length_bp), math.log2(rows[-1].length_bp)

    def across(length_bp: int) -> str:
        return f"{LEFT_PX + (RIGHT_PX - LEFT_PX) * (math.log2(length_bp) - first) / (last - first):.1f}"

    def up(percent: float) -> str:
        return f"{BOTTOM_PX - (BOTTOM_PX - TOP_PX) * percent / 100:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{TITLE}</title>",
        f'<rect width="{WIDTH_PX}" height="{HEIGHT_PX}" fill="#fff"/>',
        f'<text x="{LEFT_PX}" y="22" font-size="14">{TITLE}</text>',
    ]
    for percent in range(0, 101, 20):
        parts.append(f'<path d="M{LEFT_PX} {up(percent)}H{RIGHT_PX}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT_PX - 6}" y="{up(percent)}" dy="4" text-anchor="end">{percent}</text>')
    for row in rows:
        x = across(row.length_bp)
        parts.append(f'<text x="{x}" y="{BOTTOM_PX + 17}" text-anchor="middle">{row.length_bp:,}</text>')
    parts.append(f'<text x="{(LEFT_PX + RIGHT_PX) / 2:.0f}" y="{BOTTOM_PX + 36}" text-anchor="middle">bp</text>')
    parts.append(f'<text x="{LEFT_PX - 6}" y="{TOP_PX - 8}" text-anchor="end">%</text>')
    band = [f"{across(row.length_bp)} {up(row.high)}" for row in rows]
    band += [f"{across(row.length_bp)} {up(row.low)}" for row in reversed(rows)]
    parts.append(f'<path d="M{"L".join(band)}Z" fill="{SERIES[0][2]}" fill-opacity=".15"/>')
    parts.append(f'<path d="M{LEFT_PX} {up(chance)}H{RIGHT_PX}" stroke="#999" stroke-dasharray="1 3"/>')
    for number, (name, title, colour, dashes) in enumerate(SERIES):
        line = "L".join(f"{across(row.length_bp)} {up(row.accuracy[name])}" for row in rows)
        pen = f'stroke="{colour}" stroke-width="{1.5 if number else 3}" stroke-dasharray="{dashes}"'
        parts.append(f'<path d="M{line}" fill="none" {pen}/>')
        y = TOP_PX + 20 + 22 * number
        parts.append(f'<path d="M{RIGHT_PX + 12} {y}h24" {pen}/>')
        parts.append(f'<text x="{RIGHT_PX + 42}" y="{y + 4}" font-size="11">{title}</text>')
    y = TOP_PX + 20 + 22 * len(SERIES)
    parts.append(f'<path d="M{RIGHT_PX + 12} {y}h24" stroke="#999" stroke-dasharray="1 3"/>')
    parts.append(f'<text x="{RIGHT_PX + 42}" y="{y + 4}" font-size="11">chance</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_text(figure(*read_rows(CARD)), encoding="utf-8")
    print(FIGURE)
