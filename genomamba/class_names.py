"""The one rule for names of species classes, wherever they come from: options, lists, folders, or a model's files."""

import re
from collections.abc import Iterable
from typing import Final

from mambacore.errors import InputError
from mambacore.safe_text import safe_field

UNCLASSIFIED: Final = "unclassified"
"""The call of a record without a class; no class may have this name."""

LONGEST_CLASS_NAME: Final = 120
_WORD = r"[\w.+()\[\]:'#@-]+"
_CLASS_NAME = re.compile(rf"{_WORD}(?: {_WORD})*")


def check_class_name(name: object, place: str) -> str:
    """Return a name that may be a class: words of letters, digits and `_.+()[]:'#@-`, with single spaces between.

    Such a name is one cell of a table and one file name: it has no slash, tab or invisible character.

    Args:
        name: the name.
        place: where it was found, to begin the message with, such as "--genome 'a/b=x.fa'".

    Raises:
        InputError: it is not a text of this form, too long, `.`, `..` or `unclassified`.
    """
    shown = safe_field(name) if isinstance(name, str) else repr(name)
    if not isinstance(name, str) or not _CLASS_NAME.fullmatch(name) or set(name) == {"."} or not name.isprintable():
        raise InputError(
            f"{place} has the class name '{shown}': use letters, digits, single spaces and the characters "
            "_ . + - ( ) [ ] : ' # @."
        )
    if len(name) > LONGEST_CLASS_NAME:
        raise InputError(
            f"{place} has a class name of {len(name)} characters, '{shown[:20]}...': use at most {LONGEST_CLASS_NAME}."
        )
    if name == UNCLASSIFIED:
        raise InputError(
            f"{place} uses the class name '{UNCLASSIFIED}', which stands for records without a call: choose another."
        )
    return name


def check_class_names(names: Iterable[object], place: str) -> tuple[str, ...]:
    """Return names that may be the classes of one model.

    Raises:
        InputError: one of them breaks the rule of `check_class_name`, or occurs twice.
    """
    checked: dict[str, None] = {}
    for name in names:
        if check_class_name(name, place) in checked:
            raise InputError(f"{place} has the class '{name}' twice: give each class one name of its own.")
        checked[str(name)] = None
    return tuple(checked)
