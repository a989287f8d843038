"""Self-contained HTML pages, which need neither a network nor scripts."""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from mambacore.safe_text import safe_for_terminal

PLAYER_STYLE: Final = """
audio { width: 100%; max-width: 24rem; }
.players { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
"""
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
.table { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG with a caption, which is also its alternative text."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Player:
    """A sound to play on the page, with its caption and, optionally, a picture above it."""

    sound: bytes
    caption: str
    media_type: str = "audio/wav"
    png: bytes | None = None


@dataclass(frozen=True)
class Table:
    """A table of plain-text cells; the first column is left-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Item = str | Picture | Player | Table


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, pictures, players and tables; all text is plain and escaped.

    Consecutive players are placed side by side where the page is wide enough.
    """

    heading: str
    content: Sequence[Item] = field(default_factory=tuple)


def page(title: str, sections: Sequence[Section]) -> str:
    """A complete HTML page, with all text escaped and all media embedded."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{STYLE}{PLAYER_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
    ]
    for section in sections:
        if section.heading:
            parts.append(f"<h2>{_text(section.heading)}</h2>")
        parts += _rendered(section.content)
    parts.append("</body></html>\n")
    return "\n".join(parts)


def embedded_players(players: Sequence[Player]) -> str:
    """Players as self-contained HTML, to be part of another page."""
    return "\n".join([f"<style>{PLAYER_STYLE}</style>", *_rendered(players)])


def embedded_picture(png: bytes, caption: str) -> str:
    """A picture as self-contained HTML; the caption is also its alternative text."""
    text = _text(caption)
    source = _embedded("image/png", png)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _text(text: str) -> str:
    """Plain text as HTML: markup, control and invisible characters do nothing."""
    return html.escape(safe_for_terminal(text))


def _rendered(items: Sequence[Item]) -> list[str]:
    parts: list[str] = []
    for are_players, neighbours in itertools.groupby(items, lambda item: isinstance(item, Player)):
        rendered = [_render(item) for item in neighbours]
        parts += ['<div class="players">', *rendered, "</div>"] if are_players else rendered
    return parts


def _embedded(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _render(item: Item) -> str:
    if isinstance(item, str):
        return f"<p>{_text(item)}</p>"
    if isinstance(item, Picture):
        return embedded_picture(item.png, item.caption)
    if isinstance(item, Player):
        caption = _text(item.caption)
        picture = "" if item.png is None else f'<img src="{_embedded("image/png", item.png)}" alt="{caption}">'
        source = _embedded(item.media_type, item.sound)
        return (
            f'<figure>{picture}<audio controls preload="metadata" src="{source}"></audio>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    header = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in item.header)
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in item.rows)
    return f'<div class="table"><table><thead><tr>{header}</tr></thead><tbody>\n{rows}</tbody></table></div>'
