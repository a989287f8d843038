"""DNA models on the shared core: readers, models, and their applications.

model = genomamba.load("yeasts")  # a folder, or hf://owner/name@revision
table = model.classify("contigs.fa")
print(table)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from genomamba.huggingface import register_when_imported

if TYPE_CHECKING:
    from genomamba.loaded import LoadedLanguageModel, LoadedModel, LoadedSequenceModel, LoadedSpeciesClassifier, load
    from genomamba.results import Embeddings, ResultTable

__all__ = [
    "Embeddings",
    "LoadedLanguageModel",
    "LoadedModel",
    "LoadedSequenceModel",
    "LoadedSpeciesClassifier",
    "ResultTable",
    "load",
]

_MODULES = dict.fromkeys(__all__, "genomamba.loaded") | {
    "Embeddings": "genomamba.results",
    "ResultTable": "genomamba.results",
}

register_when_imported()


def __getattr__(name: str) -> Any:
    """Import a name on first access, because importing torch takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module 'genomamba' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
