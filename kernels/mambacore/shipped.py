"""Models that ship inside a package, found by name wherever a model folder can be named.

A package keeps them in a folder `weights`: one model folder per name, and a table `models.json` with what each is for
and the SHA-256 of its files, which are checked whenever a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from mambacore.errors import InputError
from mambacore.hub import find_model_folder, is_on_hub
from mambacore.model_folder import CARD_NAME, CONFIG_NAME, TENSORS_NAME, is_model_folder

TABLE_NAME: Final = "models.json"
CHECKED_FILES: Final = (CONFIG_NAME, TENSORS_NAME)
SCHEME: Final = "shipped://"
_LOGGER = logging.getLogger(__name__)
# One slash as well: that is what a path makes of two.
_EXPLICIT = re.compile(r"shipped:/{1,2}(?P<name>.*)")
_PLAIN_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class ShippedModel:
    """One row of the table.

    Attributes:
        name: by which it is found.
        folder: its model folder.
        task: what it is for, in a few words.
        figures: what it reached, with the size of the test.
        licence: of the weights.
        parameters: number of learned values.
        sha256: hexadecimal, by the name of the file.
    """

    name: str
    folder: Path
    task: str
    figures: str
    licence: str
    parameters: int
    sha256: Mapping[str, str]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, the card included."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    @property
    def card(self) -> str:
        """The model card."""
        return (self.folder / CARD_NAME).read_text(encoding="utf-8")

    def check(self) -> None:
        """Compare the files with the table.

        Raises:
            InputError: a file is missing or is not the one that was shipped.
        """
        for name, expected in self.sha256.items():
            path = self.folder / name
            try:
                found = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(
                    f"the model {self.name} lacks {path} ({error.strerror or error}): install the package again."
                ) from error
            if found != expected:
                raise InputError(
                    f"the model {self.name} is damaged, {path} is not the file that was shipped: install the package "
                    "again."
                )


class ShippedModels:
    """The models of one package.

    Args:
        folder: with `models.json` and one model folder per name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def table(self) -> dict[str, ShippedModel]:
        """The models by name, sorted."""
        path = self.folder / TABLE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {
                name: ShippedModel(name=name, folder=self.folder / name, **content[name]) for name in sorted(content)
            }
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"the table of shipped models {path} cannot be read ({error}): install the package again."
            ) from error

    def find(self, reference: str | Path) -> Path:
        """The folder that is meant by a MODEL argument.

        A name means the model of that name that ships, unless the working directory has a model folder of that name:
        a path always means what lies there. That is logged as a warning. `shipped://NAME` and `./NAME` say which.

        Args:
            reference: a path, a name of the table, `shipped://NAME`, or `hf://owner/name@revision`.

        Raises:
            InputError: no such model, one whose files are not those that were shipped, or a name that could mean both
                a shipped model and a file or folder here that is not a model.
        """
        if is_on_hub(reference):
            return find_model_folder(reference)
        text, path = str(reference), Path(reference)
        explicit = _EXPLICIT.fullmatch(text)
        if explicit:
            return self._checked(explicit["name"])
        if path.exists() or path.is_symlink():
            # A path of the same letters as the name, not one that has been found to be the same folder.
            if text in self.table and not text.startswith("."):
                self._settle(text, path)
            return path
        if text in self.table:
            return self._checked(text)
        if _PLAIN_NAME.fullmatch(text):
            raise InputError(
                f"there is no model folder {text}, and no shipped model of that name ({self._names()}): check the "
                "path or the name."
            )
        return path

    def _settle(self, name: str, path: Path) -> None:
        if not is_model_folder(path):
            raise InputError(
                f"{name} is the name of a shipped model and of something here that is not a model folder: write "
                f"{SCHEME}{name} for the shipped model."
            )
        _LOGGER.warning(
            "%s is read from the folder of that name in the working directory; %s%s is the shipped model",
            name,
            SCHEME,
            name,
        )

    def _checked(self, name: str) -> Path:
        if name not in self.table:
            raise InputError(f"there is no shipped model {name!r}: there are {self._names()}.")
        model = self.table[name]
        model.check()
        return model.folder

    def _names(self) -> str:
        return ", ".join(self.table) or "none"
