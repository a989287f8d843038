"""Language models of DNA as models of `transformers`: `AutoModel.from_pretrained(folder)` and pipelines.

`import genomamba` is enough, and imports nothing of `transformers`: each of its auto classes gets our classes when the
module that defines it is imported.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
# Module of an auto class -> our module whose `register` is to be called once it is imported.
_REGISTRATIONS = {
    f"{_AUTO}configuration_auto": "genomamba.huggingface.configuration",
    f"{_AUTO}modeling_auto": "genomamba.huggingface.modeling",
    f"{_AUTO}tokenization_auto": "genomamba.huggingface.tokenization",
}


def register_when_imported() -> None:
    """Register with the auto classes that are imported, and with the others as soon as they are."""
    if any(isinstance(finder, _Registrar) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Registrar())
    for name in _REGISTRATIONS:
        if name in sys.modules:
            _register(name)


class _Registrar:
    """Finds the modules of the auto classes as Python would, and registers after they have been run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The specification of a module of an auto class; None for any other module."""
        if name not in _REGISTRATIONS:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        if found is None or found.loader is None:
            return None
        loader: Any = found.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(name)

        loader.exec_module = execute_and_register
        return found


def _register(name: str) -> None:
    importlib.import_module(_REGISTRATIONS[name]).register()
