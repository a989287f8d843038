"""A sequence-level model: the stack of a DNA language model, pooled over the length, and a linear head.

With a causal stack a sequence of any length is processed exactly in pieces with a state carried between them; a
bidirectional stack (Caduceus) takes whole sequences.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn

from genomamba.data.targets import TargetDescription
from genomamba.letter_policy import PADDING_TOKEN, LetterPolicy
from genomamba.models.language_model import LanguageModel, build_language_model, objective_of
from genomamba.tokenizer import (
    ANY_BASE_TOKEN,
    COMPLEMENT_IDS,
    PADDED_VOCABULARY_SIZE,
    UNKNOWN_TOKEN,
    CharacterTokenizer,
)
from genomamba.weights import find_model
from mambacore.devices import wide_dtype
from mambacore.errors import InputError
from mambacore.layers import POOLINGS, PoolingState
from mambacore.model_folder import (
    build_and_load,
    load_tensors_into,
    read_model_folder,
    training_details,
    write_model_folder,
)
from mambacore.models import CausalLanguageModel, MaskedLanguageModel

MODEL_KIND: Final = "DNA sequence model"
HEAD_DEVIATION: Final = 0.02
"""Initial standard deviation of the head's weights, as for the embeddings."""


@dataclass(frozen=True)
class SequenceModelConfig:
    """Configuration of a `SequenceModel`.

    Attributes:
        objective: objective of the language model that the stack is from: "causal" or "masked".
        core: settings of that language model (see `build_language_model`), whose head is not used.
        targets: description of the outputs.
        pooling: "mean" over the length or "last" position.
        both_strands: average the outputs for the sequence and its reverse complement.
        letters: how the language model reads N and ambiguity codes; lower case is the same base as upper case here.
    """

    objective: str
    core: Mapping[str, Any]
    targets: TargetDescription
    pooling: str = "mean"
    both_strands: bool = True
    letters: LetterPolicy = field(default_factory=LetterPolicy)

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"the pooling is {self.pooling!r}: use {' or '.join(POOLINGS)}.")
        if self.core.get("equivariant") and self.pooling != "mean":
            raise InputError(
                "the stack processes both strands at once, whose last positions are opposite ends of the sequence: use "
                "the pooling mean."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_dict` is the inverse."""
        return {
            "objective": self.objective,
            "core": dict(self.core),
            "targets": self.targets.to_dict(),
            "pooling": self.pooling,
            "both_strands": self.both_strands,
            "letters": self.letters.to_config(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SequenceModelConfig":
        """Inverse of `to_dict`."""
        return cls(
            values["objective"],
            values["core"],
            TargetDescription.from_dict(values["targets"]),
            values["pooling"],
            values["both_strands"],
            LetterPolicy(**values["letters"]),
        )


class SequenceState(NamedTuple):
    """State of a causal sequence model between pieces."""

    core: Any
    pooled: PoolingState


class SequenceModel(nn.Module):
    """Maps sequences to outputs: logits of classes or labels, or standardised numbers.

    Raises:
        InputError: if the language model does not support the settings.
    """

    letters: Tensor

    def __init__(self, config: SequenceModelConfig) -> None:
        super().__init__()
        self.config = config
        self.core = build_language_model(config.objective, config.core)
        self.core.head = None
        self.pooling = POOLINGS[config.pooling]()
        self.head = nn.Linear(self._feature_width(), config.targets.outputs)
        nn.init.normal_(self.head.weight, std=HEAD_DEVIATION)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("letters", _letter_table(config.letters), persistent=False)
        self.register_buffer("complement", torch.from_numpy(COMPLEMENT_IDS.copy()).long(), persistent=False)

    @property
    def is_causal(self) -> bool:
        """Whether sequences may be processed in pieces."""
        return isinstance(self.core, CausalLanguageModel)

    def forward(self, tokens: Tensor, state: SequenceState | None = None) -> tuple[Tensor, SequenceState | None]:
        """Process a piece of a sequence.

        Args:
            tokens: (batch, length) of `genomamba.tokenizer`, any integer dtype.
            state: state after the previous piece; None at the start. A bidirectional stack has none.

        Returns:
            The outputs for the sequence so far (batch, outputs), and the state.

        Raises:
            ValueError: if a state is given to a model without one.
        """
        if isinstance(self.core, CausalLanguageModel):
            hidden, core_state = self.core.hidden(self._letters(tokens), None if state is None else state.core)
            pooled, pooling_state = self.pooling(hidden, None if state is None else state.pooled)
            return self._head(pooled), SequenceState(core_state, pooling_state)
        if state is not None:
            raise ValueError("a bidirectional model takes whole sequences and has no state")
        pooled, _ = self.pooling(self._both_directions(self._letters(tokens), None), None)
        return self._head(pooled), None

    def padded(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return outputs (batch, outputs) for sequences of different lengths, padded on the right.

        Args:
            tokens: (batch, length); positions beyond a sequence's length are ignored.
            lengths: (batch,), at least 1.
        """
        letters, length = self._letters(tokens), tokens.shape[1]
        if isinstance(self.core, CausalLanguageModel):
            hidden, _ = self.core.hidden(letters)
        else:
            starts = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
            starts[:, 0] = True
            inside = lengths < length
            starts[inside, lengths[inside]] = True
            hidden = self._both_directions(letters, starts)
        if self.config.pooling == "last":
            return self._head(hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])
        present = torch.arange(length, device=tokens.device) < lengths[:, None]
        total = torch.where(present.unsqueeze(-1), hidden, 0.0).sum(dim=1, dtype=wide_dtype(hidden.device))
        return self._head((total / lengths[:, None]).to(hidden.dtype))

    def reverse_complement(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the reverse complements of sequences padded on the right, (batch, length), padded in the same way."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mirrored = (lengths[:, None] - 1 - positions).clamp(min=0)
        other = self.complement[tokens.long()].gather(1, mirrored).to(tokens.dtype)  # type: ignore[index]
        return torch.where(positions < lengths[:, None], other, tokens)

    def start_from(self, language_model: LanguageModel) -> None:
        """Copy the weights of a language model of the same shape.

        Raises:
            InputError: if the shapes differ; the message names the first difference.
        """
        tensors = {name: tensor for name, tensor in language_model.model.state_dict().items() if name[:5] != "head."}
        load_tensors_into(self.core, tensors, language_model.source)

    def _letters(self, tokens: Tensor) -> Tensor:
        return self.letters[tokens.long()]

    def _feature_width(self) -> int:
        return (
            self.core.config.hidden_width
            if isinstance(self.core, CausalLanguageModel)
            else self.core.config.model_width
        )

    def _both_directions(self, letters: Tensor, starts: Tensor | None) -> Tensor:
        assert isinstance(self.core, MaskedLanguageModel)
        hidden = self.core.hidden(letters, starts)
        if not self.core.config.equivariant:
            return hidden
        # Two strands, the second with flipped channels: their sum is the same for the reverse complement, up to the
        # order of positions, to which the mean is invariant.
        one, other = hidden.chunk(2, dim=-1)
        return (one + other.flip(-1)) / 2

    def _head(self, pooled: Tensor) -> Tensor:
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled.to(self.head.weight.dtype))


def _letter_table(policy: LetterPolicy) -> Tensor:
    """Return the language model's token for each token of a sequence."""
    table = torch.arange(PADDED_VOCABULARY_SIZE)
    if policy.ambiguous == "any":
        table[UNKNOWN_TOKEN] = ANY_BASE_TOKEN
    if policy.any_base == "padding":
        table[table == ANY_BASE_TOKEN] = PADDING_TOKEN
    return table


def sequence_model_on(
    language_model: LanguageModel, targets: TargetDescription, pooling: str, both_strands: bool
) -> SequenceModel:
    """Build a sequence model with the stack and the weights of a language model, and a new head."""
    config = SequenceModelConfig(
        objective_of(language_model.model),
        _json_able(asdict(language_model.model.config)),
        targets,
        pooling,
        both_strands,
        language_model.policy,
    )
    model = SequenceModel(config)
    model.start_from(language_model)
    return model


def save_sequence_model(folder: Path, model: SequenceModel, details: Mapping[str, Any]) -> None:
    """Write a model folder (config.json, model.safetensors, README.md) in one step.

    Args:
        folder: the model folder; an earlier model there is replaced.
        details: JSON-serialisable training details.

    Raises:
        InputError: if the folder cannot be written or contains something else.
    """
    config = {
        "kind": MODEL_KIND,
        "model": model.config.to_dict(),
        "tokenizer": CharacterTokenizer().to_config(),
        "details": dict(details),
    }
    write_model_folder(Path(folder), config, model.state_dict(), _card(model.config))


def load_sequence_model(folder: Path | str) -> tuple[SequenceModel, dict[str, Any]]:
    """Load a model from a folder, or `hf://owner/name@revision`, in evaluation mode, with its details.

    Raises:
        InputError: if the folder is missing, incomplete, damaged, or of another kind or version.
    """
    reference, folder = str(folder), find_model(folder)
    config, tensors = read_model_folder(folder)
    if config.get("kind") != MODEL_KIND:
        raise InputError(
            f"{reference} holds a {config.get('kind', 'model of unknown kind')!s}, not a {MODEL_KIND}: give a folder "
            "that `genomamba finetune` wrote."
        )
    CharacterTokenizer.from_config(config.get("tokenizer", {}))
    settings = config.get("model")
    model = build_and_load(
        lambda: SequenceModel(SequenceModelConfig.from_dict(cast(Mapping[str, Any], settings))),
        {"model": settings},
        tensors,
        folder,
    )
    return model, training_details(config, folder)


def _json_able(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _card(config: SequenceModelConfig) -> str:
    """The model card: what the folder is and how to use it."""
    targets = config.targets
    predicted = {
        "classes": f"the class of `{targets.columns[0]}`: {', '.join(targets.class_names)}",
        "labels": f"each of these labels: {', '.join(targets.columns)}",
        "numbers": f"the numbers {', '.join(targets.columns)}",
    }[targets.kind]
    strands = "averaged over both strands" if config.both_strands else "on the given strand"
    lines = ["# DNA sequence model", "", f"Predicts for each sequence {predicted} ({strands}).", ""]
    return "\n".join([*lines, "    genomamba predict THIS_FOLDER sequences.fa > predictions.tsv", ""])
