"""Escaping of text from files, models and command lines for tables, terminals and model cards.

Names are untrusted: a record, class or file name may contain tabs that forge a column, newlines that forge a row,
escape sequences that control a terminal, or invisible characters that disguise it. Each such character is replaced by a
visible escape.
"""

import re
from collections.abc import Iterable

LINE_STRUCTURE = "\t\n"
LONGEST_WORD, LONGEST_MESSAGE = 500, 4000
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


def shortened(message: str) -> str:
    """Shorten a sentence: what is left out of very long words, and of the whole, is counted in its place.

    A damaged file may have a line of a megabyte where a name or a number is expected.
    """
    message = with_short_words(message)
    return message if len(message) <= LONGEST_MESSAGE else _cut(message, LONGEST_MESSAGE // 2, LONGEST_MESSAGE // 4)


def with_short_words(text: str) -> str:
    """Shorten the words of a text of any length, as `shortened`."""
    return _LONG_WORD.sub(lambda word: _cut(word[0], 100, 20), text)


def _cut(text: str, first: int, last: int) -> str:
    return f"{text[:first]}[... {len(text) - first - last:,} characters ...]{text[-last:]}"


def safe_field(text: str) -> str:
    r"""A cell of a table: characters that are not printable are escaped, a tab as `\t`, U+200B as `\u200b`."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def table_line(cells: Iterable[str]) -> str:
    """Return cells as one line of a tab-separated table, without a newline; each is escaped by `safe_field`."""
    return "\t".join(map(safe_field, cells))


def safe_for_terminal(text: str) -> str:
    """Escape a message, possibly of several lines: as `safe_field`, but tabs and newlines are kept."""
    if text.isprintable():
        return text
    return "".join(character if character in LINE_STRUCTURE else _escaped(character) for character in text)


def safe_markdown(text: str) -> str:
    """Escape Markdown without HTML: as `safe_for_terminal`, with `<` and `&` as character references."""
    return safe_for_terminal(text).replace("&", "&amp;").replace("<", "&lt;")


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
