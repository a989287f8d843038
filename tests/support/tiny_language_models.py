"""Small language models of DNA with random weights, in float64 so that laws hold to rounding."""

from pathlib import Path

import numpy as np
import torch

from genomamba.letter_policy import letter_policy
from genomamba.models.language_model import LanguageModel, build_language_model, save_language_model

SETTINGS = {
    "causal": ("causal", {"model_width": 8, "mixers": ["selective", "selective"]}),
    "contexts": (
        "causal",
        {
            "model_width": 8,
            "mixers": ["selective"],
            "context_widths": [3],
            "output_context_widths": [2],
            "tied_head": False,
        },
    ),
    "hybrid": ("causal", {"model_width": 8, "mixers": ["attention", "s4d"]}),
    "masked": ("masked", {"model_width": 8, "layers": 2}),
    "equivariant": ("masked", {"model_width": 8, "layers": 2, "equivariant": True}),
}


def language_model(kind: str, policy: str = "bases") -> LanguageModel:
    """A model of a kind of `SETTINGS`, always the same; its tables are large enough to have opinions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective, settings = SETTINGS[kind]
        model = build_language_model(objective, settings).double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for table in (model.embedding, model.head):
            if table is not None:
                table.weight.data *= 10
    return LanguageModel(model, letter_policy(policy))


def model_folder(folder: Path, kind: str) -> Path:
    """The same model in float32 as a folder."""
    save_language_model(folder, language_model(kind).model.float(), {})
    return folder


def random_letters(length: int, seed: int, alphabet: bytes = b"ACGT") -> bytes:
    """Letters drawn uniformly."""
    return np.frombuffer(alphabet, dtype=np.uint8)[
        np.random.default_rng(seed).integers(len(alphabet), size=length)
    ].tobytes()


def write_fasta(path: Path, contigs: dict[str, bytes], width: int = 60) -> Path:
    """A FASTA file with lines of one length."""
    lines = []
    for name, letters in contigs.items():
        lines.append(b">" + name.encode())
        lines += [letters[begin : begin + width] for begin in range(0, len(letters), width)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path
