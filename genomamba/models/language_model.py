"""DNA language models: a core model with its letter policy and objective, stored as one folder.

There are two objectives: *causal*, the next base given all before it, in pieces of any length with a state carried
between them; and *masked*, a hidden base given both sides, on whole sequences only. Folders written here and
checkpoints of other projects (Caduceus, and Mamba in the format of transformers or mamba_ssm) are read by the same
function.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from genomamba.letter_policy import LetterPolicy, letter_policy
from genomamba.tokenizer import COMPLEMENT_IDS, PADDED_VOCABULARY_SIZE, VOCABULARY, CharacterTokenizer, Tokens
from genomamba.weights import find_model
from mambacore import checkpoints
from mambacore.devices import device_of
from mambacore.errors import InputError
from mambacore.model_folder import (
    CONFIG_NAME,
    build_and_load,
    configuration_errors,
    read_model_folder,
    training_details,
    write_model_folder,
)
from mambacore.models import (
    CausalLanguageModel,
    CausalLanguageModelConfig,
    MaskedLanguageModel,
    MaskedLanguageModelConfig,
)
from mambacore.non_finite import require_numbers

MODEL_KIND: Final = "DNA language model"
Objective = Literal["causal", "masked"]
OBJECTIVES: Final[tuple[Objective, ...]] = ("causal", "masked")

BASE_COUNT: Final = 4
FIRST_BASE_TOKEN: Final = VOCABULARY["A"]
"""The token of A; those of C, G and T follow."""
MASK_TOKEN: Final = VOCABULARY["[MASK]"]

CoreModel = CausalLanguageModel | MaskedLanguageModel
_CONFIGURATIONS: Final = {"causal": CausalLanguageModelConfig, "masked": MaskedLanguageModelConfig}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A DNA language model, in evaluation mode.

    Attributes:
        model: the core model.
        policy: how letters are converted to tokens (`genomamba.letter_policy`).
        details: JSON-serialisable training details; empty for checkpoints of other projects.
        source: the folder it was read from, for messages.
    """

    model: CoreModel
    policy: LetterPolicy = dataclasses.field(default_factory=LetterPolicy)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = "the model"

    @property
    def objective(self) -> Objective:
        """The objective: "causal" (next base) or "masked" (hidden bases)."""
        return objective_of(self.model)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Load a model; see `load_language_model`."""
        loaded = load_language_model(folder)
        return cls(loaded.model, loaded.policy, loaded.details, loaded.source)

    def to(self, device: torch.device) -> Self:
        """Move the model to a device; returns this object."""
        self.model.to(device)
        return self

    def tokens(self, letters: bytes | str) -> Tokens:
        """Return the tokens of letters under the model's letter policy, uint8 of shape (length,).

        Raises:
            InputError: if a byte is not a nucleotide code.
        """
        return self.policy.tokens(letters.encode("ascii") if isinstance(letters, str) else letters)

    def require(self, objective: Objective, purpose: str) -> None:
        """Check that the model has an objective.

        Args:
            objective: the objective that is needed.
            purpose: the purpose it is needed for, for the message.

        Raises:
            InputError: if the model has another objective.
        """
        if self.objective != objective:
            raise InputError(
                f"{self.source} is a {self.objective} language model, but {purpose} needs a {objective} one: "
                "give another model."
            )

    @torch.no_grad()
    def next_base_log_probabilities(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return log-probabilities (nats) of the base after each position, given all up to it.

        Args:
            tokens: (batch, length), any integer dtype: a sequence, or its next piece.
            state: state after the previous piece; None at the start.

        Returns:
            (batch, length, 4) for A, C, G and T, normalised over these, at least float32; and the state for the next
            piece. Pieces give the same result as the whole.

        Raises:
            InputError: if the model is masked.
        """
        self.require("causal", "the probability of the next base")
        assert isinstance(self.model, CausalLanguageModel)
        logits, state = self.model(tokens.long().to(device_of(self.model)), state)
        return base_log_probabilities(logits).to(tokens.device), state

    @torch.no_grad()
    def masked_base_log_probabilities(
        self, tokens: Tensor, masked: Tensor | None = None, both_strands: bool = True
    ) -> Tensor:
        """Return log-probabilities (nats) of the base at each position, given both sides.

        Args:
            tokens: (batch, length), any integer dtype; whole sequences.
            masked: (batch, length), boolean: positions to hide from the model. Only there are the probabilities those
                of an unseen base; None hides nothing.
            both_strands: average the logits of both strands if the model has the complement but is not equivariant by
                construction (as for Caduceus-Ph).

        Returns:
            (batch, length, 4) for A, C, G and T, normalised over these, at least float32.

        Raises:
            InputError: if the model is causal.
        """
        self.require("masked", "the probability of a base given both sides")
        assert isinstance(self.model, MaskedLanguageModel)
        place, tokens = tokens.device, tokens.long().to(device_of(self.model))
        if masked is not None:
            tokens = tokens.masked_fill(masked.to(tokens.device), MASK_TOKEN)
        conjoin = both_strands and not self.model.config.equivariant and self.model.complement is not None
        logits = self.model.conjoined_logits(tokens) if conjoin else self.model(tokens)
        return base_log_probabilities(logits).to(place)


def base_log_probabilities(logits: Tensor) -> Tensor:
    """Convert logits of all tokens (..., tokens) to log-probabilities over A, C, G and T (..., 4), at least float32.

    Raises:
        InputError: if one is NaN.
    """
    bases = logits[..., FIRST_BASE_TOKEN : FIRST_BASE_TOKEN + BASE_COUNT]
    found = F.log_softmax(bases.to(torch.promote_types(bases.dtype, torch.float32)), dim=-1)
    return require_numbers(found, "probabilities")


def objective_of(model: CoreModel) -> Objective:
    """Return the objective of a core model."""
    return "causal" if isinstance(model, CausalLanguageModel) else "masked"


def save_language_model(
    folder: Path, model: CoreModel, details: Mapping[str, Any], policy: LetterPolicy | None = None
) -> None:
    """Write a model folder (config.json, model.safetensors, README.md) in one step.

    Args:
        folder: the model folder; an earlier model there is replaced.
        model: the model, with the vocabulary of `genomamba.tokenizer`.
        details: JSON-serialisable training details.
        policy: letter policy used in training.

    Raises:
        InputError: if the folder cannot be written or contains something else.
    """
    objective = objective_of(model)
    config = {
        "kind": MODEL_KIND,
        # By which `transformers` finds the classes of `genomamba.huggingface`.
        "model_type": "genomamba",
        "architectures": ["GenomambaForCausalLM" if objective == "causal" else "GenomambaForMaskedLM"],
        "objective": objective,
        "model": dataclasses.asdict(model.config),
        "tokenizer": CharacterTokenizer().to_config(),
        "letter_policy": (policy or LetterPolicy()).to_config(),
        "details": dict(details),
    }
    write_model_folder(Path(folder), config, model.state_dict(), _card(model, details))


def load_language_model(folder: Path | str) -> LanguageModel:
    """Load a DNA language model, in evaluation mode.

    Args:
        folder: a folder written by `save_language_model`, a Caduceus, transformers or mamba_ssm checkpoint in
            safetensors, or `hf://owner/name@revision` on the Hugging Face Hub. A checkpoint of another project must
            have the hg38 vocabulary of `genomamba.tokenizer` (12 tokens, padded to 16).

    Raises:
        InputError: if the folder is missing, incomplete, damaged, or of another kind, version or vocabulary.
    """
    reference, folder = str(folder), find_model(folder)
    if not _is_ours(folder):
        return _load_foreign(folder, reference)
    config, tensors = read_model_folder(folder)
    if config.get("kind") != MODEL_KIND:
        raise InputError(
            f"{reference} holds a {config.get('kind', 'model of unknown kind')!s}, not a {MODEL_KIND}: "
            "give another folder."
        )
    CharacterTokenizer.from_config(config.get("tokenizer", {}))
    with configuration_errors(folder / CONFIG_NAME):
        policy = LetterPolicy(**config["letter_policy"])
        settings = config["model"]
    model = build_and_load(lambda: build_language_model(config["objective"], settings), settings, tensors, folder)
    return LanguageModel(model, policy, training_details(config, folder), reference)


def build_language_model(objective: str, settings: Mapping[str, Any]) -> CoreModel:
    """Build a model with random weights.

    Args:
        objective: "causal" or "masked".
        settings: settings of `mambacore.models.CausalLanguageModelConfig` or `MaskedLanguageModelConfig`. By default
            the vocabulary, the complements of its tokens and the tokens of contexts are those of `genomamba.tokenizer`.

    Raises:
        InputError: if the objective or a setting is unknown or invalid.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"the objective is {objective!r}: use {' or '.join(OBJECTIVES)}.")
    kind = _CONFIGURATIONS[objective]
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise InputError(f"a {objective} language model has no setting {unknown[0]!r}: use {', '.join(sorted(known))}.")
    values: dict[str, Any] = {"vocabulary_size": PADDED_VOCABULARY_SIZE}
    if objective == "masked":
        values |= {"complement": COMPLEMENT_IDS.tolist()} | dict(settings)
        if values["complement"] is not None:
            values["complement"] = tuple(values["complement"])
        return MaskedLanguageModel(MaskedLanguageModelConfig(**values))
    values |= {"context_symbols": (FIRST_BASE_TOKEN, BASE_COUNT)} | dict(settings)
    values["mixers"] = tuple(values["mixers"])
    return CausalLanguageModel(CausalLanguageModelConfig(**values))


def _is_ours(folder: Path) -> bool:
    """Whether the folder has our format; true without a readable configuration, for our error messages."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(config, dict) or "format_version" in config


def _load_foreign(folder: Path, reference: str) -> LanguageModel:
    model = checkpoints.load(folder)
    size = model.config.padded_vocabulary_size
    if not len(VOCABULARY) <= size <= PADDED_VOCABULARY_SIZE:
        raise InputError(
            f"{reference} has a vocabulary of {size} tokens, but only the hg38 vocabulary ({len(VOCABULARY)} tokens, "
            f"padded to {PADDED_VOCABULARY_SIZE}) is supported: give a model of single bases."
        )
    policy = letter_policy("caduceus") if isinstance(model, MaskedLanguageModel) else LetterPolicy()
    return LanguageModel(model, policy, {}, reference)


def _card(model: CoreModel, details: Mapping[str, Any]) -> str:
    """Return the model card: a description and how to use the model."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    predicts = {
        "causal": "predicts each base from those before it",
        "masked": "predicts hidden bases from both sides",
    }[objective_of(model)]
    lines = [
        "# DNA language model",
        "",
        f"{parameters:,} parameters; {predicts}, single bases as tokens.",
        "",
        "```python",
        "from genomamba.models.language_model import load_language_model",
        "",
        'language_model = load_language_model("THIS_FOLDER")',
        "```",
        "",
    ]
    for title, key in (("Trained on", "references"), ("Held out", "held_out"), ("Window (bp)", "length")):
        value = details.get(key)
        if value:
            lines += [f"{title}: {', '.join(map(str, value)) if isinstance(value, list) else value}.", ""]
    return "\n".join(lines)
