"""Validation of species class names, from options, lists, folders and model files alike."""

import re
from collections.abc import Iterable
from typing import Final

from mambacore.errors import InputError
from mambacore.safe_text import safe_field

UNCLASSIFIED: Final = "unclassified"
"""The call for a record that is not assigned to a class; reserved, so not a valid class name."""

LONGEST_CLASS_NAME: Final = 120
_WORD = r"[\w.+()\[\]:'#@-]+"
_CLASS_NAME = re.compile(rf"{_WORD}(?: {_WORD})*")


def check_class_name(name: object, place: str) -> str:
    """Check and return a class name: words of letters, digits and `_.+()[]:'#@-`, separated by single spaces.

    Such a name fits a table cell and a file name: it has no slash, tab or invisible character.

    Args:
        name: the name.
        place: where it was found, for error messages, such as "--genome 'a/b=x.fa'".

    Raises:
        InputError: if it is not a string of this form, too long, `.`, `..` or `unclassified`.
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
            f"{place} uses the class name '{UNCLASSIFIED}', which is reserved for unassigned records: choose another."
        )
    return name


def check_class_names(names: Iterable[object], place: str) -> tuple[str, ...]:
    """Check and return the class names of one model.

    Raises:
        InputError: as `check_class_name`, or if a name is repeated.
    """
    checked: dict[str, None] = {}
    for name in names:
        if check_class_name(name, place) in checked:
            raise InputError(f"{place} has the class '{name}' twice: give each class its own name.")
        checked[str(name)] = None
    return tuple(checked)
