"""Escaping of text from files, models and command lines for tables, terminals and model cards.

Names are untrusted: a record, class or file name may contain tabs that forge a column, newlines that forge a row,
escape sequences that control a terminal, or invisible characters that disguise it. Each such character is replaced by a
visible escape.
"""

from collections.abc import Iterable

LINE_STRUCTURE = "\t\n"


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
