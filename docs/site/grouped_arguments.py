"""Lets a docstring describe several arguments at once: `width, height: in pixels.` becomes an entry for each."""

import re
from typing import Any

import griffe

GROUP = re.compile(r"^( +)(\w+(?:, \w+)+):( .*(?:\n\1 +\S.*)*)$", re.MULTILINE)


class GroupedArguments(griffe.Extension):
    """Splits grouped entries before docstrings are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a function, class or module."""
        if obj.docstring is not None:
            obj.docstring.value = GROUP.sub(_entries, obj.docstring.value)


def _entries(group: re.Match[str]) -> str:
    indent, names, text = group.groups()
    return "\n".join(f"{indent}{name}:{text}" for name in names.split(", "))
