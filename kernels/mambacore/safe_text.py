"""Text from files, models and command lines made safe for tables, terminals and model cards.

Names come from strangers: a record, class or file name may contain tabs that forge a column, line feeds that forge a
row, escape sequences that command a terminal, or invisible characters that disguise it. Here each such character is
replaced by its escape, so that it is seen and does nothing.
"""

from collections.abc import Iterable

LINE_STRUCTURE = "\t\n"


def safe_field(text: str) -> str:
    r"""A cell of a table: characters that are not printable are escaped, a tab as `\t`, U+200B as `\u200b`."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def table_line(cells: Iterable[str]) -> str:
    """Cells as one line of a tab-separated table, without a line feed; each is a `safe_field`."""
    return "\t".join(map(safe_field, cells))


def safe_for_terminal(text: str) -> str:
    """A message, possibly of several lines: as `safe_field`, but tabs and line feeds are kept."""
    if text.isprintable():
        return text
    return "".join(character if character in LINE_STRUCTURE else _escaped(character) for character in text)


def safe_markdown(text: str) -> str:
    """Markdown without HTML: as `safe_for_terminal`, with `<` and `&` as character references."""
    return safe_for_terminal(text).replace("&", "&amp;").replace("<", "&lt;")


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
