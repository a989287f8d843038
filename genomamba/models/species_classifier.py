"""The species classifier: a causal selective model that accumulates, base by base, evidence for each class.

Two kinds of evidence are added. The *likelihood* of a class is how well its head predicts the next base; it accumulates
over the length by construction, as in a Markov model. The *deviation* is learned discriminatively. Both are pooled over
the length; the confidence in a given mean grows with the length and is calibrated on held-out sequence.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genomamba.class_names import check_class_names
from genomamba.classification.combination import Combination
from genomamba.classification.parts import CountedParts, is_part_tensor
from genomamba.tokenizer import CharacterTokenizer
from genomamba.weights import find_model
from mambacore.devices import wide_dtype
from mambacore.errors import InputError
from mambacore.layers import POOLINGS, ContextEmbedding, PoolingState, ResidualStack, parameters_without_decay
from mambacore.layers.configuration import MixerChoice, layer_descriptions
from mambacore.layers.stack import StackState
from mambacore.model_folder import build_and_load, read_model_folder, training_details, write_model_folder
from mambacore.parallel import active_ranks

MODEL_KIND = "species classifier"
BASES = 4
FIRST_BASE_TOKEN = 7  # A; C, G and T follow
# Confidence is relative to a window of this length.
REFERENCE_LENGTH_BP = 1024
# Evidence adds up over thousands of bases, so that of a single base is tiny. These factors keep the heads' weights of
# order one, as optimizers expect: without them the logits reach hundreds within the first steps.
CLASS_LIKELIHOOD_SCALE = 0.05
DEVIATION_SCALE = 0.001
# Thousands of contexts with unregularised evidence would overfit the training chromosomes.
CONTEXT_EVIDENCE_DECAY = 20.0


@dataclasses.dataclass(frozen=True)
class SpeciesClassifierConfig:
    """Configuration of a `SpeciesClassifier`.

    Attributes:
        class_names: the classes, in the order of the outputs.
        model_width, layers: width and depth of the stack.
        mixer: mixer of its layers: a name of `mambacore.layers.MIXERS`, a mapping of `name` and options, or a list of
            these with one per layer.
        state_size, kernel_width, expansion, step_rank: options of every mixer that has them
            (see `mambacore.layers.SelectiveMixer`).
        context_widths: the embedding sums the entries of a table for each of these context lengths (bases up to a
            position).
        evidence_context_widths: context lengths that contribute evidence directly, bypassing the layers: pooled over
            the length, this part is a logistic regression on k-mer spectra.
        feature_width: width of the nonlinear features, the inputs of the class heads.
        pooling: `mean` over the length, or `last` position.
        likelihood_weight: weight of the next-base loss relative to the classification loss.
        classification_gradient: share of the classification loss's gradient that reaches the layers. With 1 they learn
            to classify, and overfit the training chromosomes; with 0 they learn next-base prediction only, and the
            heads alone learn the classes, which generalises better to unseen chromosomes.
        shortest_window_bp: training also classifies shorter windows within a window, of this length, doubled
            repeatedly.
    """

    class_names: tuple[str, ...]
    model_width: int = 64
    layers: int = 4
    mixer: MixerChoice = "selective"
    state_size: int = 8
    kernel_width: int = 4
    expansion: int = 2
    step_rank: int | None = None
    context_widths: tuple[int, ...] = (1, 3, 6)
    evidence_context_widths: tuple[int, ...] = (4, 6)
    feature_width: int = 128
    pooling: str = "mean"
    likelihood_weight: float = 1.0
    classification_gradient: float = 0.0
    shortest_window_bp: int = 1024

    def __post_init__(self) -> None:
        if isinstance(self.class_names, str) or not isinstance(self.class_names, Iterable):
            raise InputError(f"class_names is {self.class_names!r} in the model's configuration; it must be a list")
        object.__setattr__(self, "class_names", check_class_names(self.class_names, "the model's configuration"))
        for name in ("context_widths", "evidence_context_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.pooling not in POOLINGS:
            raise InputError(
                f"pooling is {self.pooling!r} in the model's configuration; choose {' or '.join(POOLINGS)}"
            )
        if not 0 <= self.classification_gradient <= 1:
            raise InputError(
                f"classification_gradient is {self.classification_gradient!r} in the model's configuration; it must be "
                "a number from 0 to 1"
            )
        positive = (
            "feature_width",
            "model_width",
            "layers",
            "state_size",
            "kernel_width",
            "expansion",
            "shortest_window_bp",
        )
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(
                    f"{name} is {value!r} in the model's configuration; it must be an integer of at least 1"
                )
        for name in ("context_widths", "evidence_context_widths"):
            widths = getattr(self, name)
            if not widths or any(not isinstance(width, int) or not 1 <= width <= 10 for width in widths):
                raise InputError(f"{name} is {widths!r} in the model's configuration; list integers from 1 to 10")
        self.layer_descriptions()

    def layer_descriptions(self) -> list[dict[str, Any]]:
        """Return the mixer descriptions of the stack.

        Raises:
            InputError: if a mixer or option is unknown, or the list's length differs from the number of layers.
        """
        shared = {name: getattr(self, name) for name in ("state_size", "kernel_width", "expansion", "step_rank")}
        return layer_descriptions(self.mixer, self.layers, shared)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SpeciesClassifierConfig":
        """Inverse of `to_dict`.

        Raises:
            InputError: if a key is unknown or missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"the model's configuration has the unknown key {unknown[0]!r}; use {', '.join(sorted(known))}"
            )
        if "class_names" not in values:
            raise InputError("the model's configuration has no class_names; the model folder is damaged")
        return cls(**values)


class ClassifierState(NamedTuple):
    """State of a classifier between pieces of a record."""

    contexts: Tensor  # (batch, history): the last bases, for the embedding
    evidence_contexts: Tensor  # the same for the evidence of contexts
    stack: StackState
    prediction: Tensor  # (batch, classes, bases): log-probability of the next base under each class
    evidence: PoolingState  # (batch, classes)


class Reading(NamedTuple):
    """Inputs of the class heads for every base."""

    likelihood: Tensor  # (batch, length, classes): log-probability of the base under each class; 0 where unknown
    features: Tensor  # (batch, length, feature_width)
    contexts: list[Tensor]  # (batch, length) each: rows of the tables of `SpeciesClassifier.context_evidence`
    known: Tensor  # (batch, length): whether the base is A, C, G or T


class SpeciesClassifier(nn.Module):
    """Classifies DNA of any length, given as a whole or piece by piece."""

    def __init__(self, config: SpeciesClassifierConfig) -> None:
        super().__init__()
        self.config = config
        classes = len(config.class_names)
        self.embedding = ContextEmbedding(BASES, config.context_widths, config.model_width)
        self.stack = ResidualStack(config.model_width, config.layer_descriptions())
        self.next_base = nn.Linear(config.model_width, BASES)
        # Initially there is no evidence for any class.
        self.features = nn.Linear(config.model_width, config.feature_width)
        self.class_next_base = nn.Linear(config.feature_width, classes * BASES)
        self.deviation = nn.Linear(config.feature_width, classes)
        self.context_evidence = ContextEmbedding(BASES, config.evidence_context_widths, classes)
        for parameter in (
            *self.class_next_base.parameters(),
            *self.deviation.parameters(),
            *self.context_evidence.parameters(),
        ):
            nn.init.zeros_(parameter)
        # Parts based on counts instead of training (`genomamba.classification`), and the weights of all parts.
        self.parts: CountedParts | None = None
        self.combination: Combination | None = None
        self.pooling = POOLINGS[config.pooling]()
        self.confidence_intercept = nn.Parameter(torch.tensor(0.9 * math.log(REFERENCE_LENGTH_BP)))
        self.confidence_slope = nn.Parameter(torch.tensor(0.9))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "SpeciesClassifier":
        """Load a classifier from a model folder, or from `hf://owner/name@revision` on the Hub, in evaluation mode.

        Raises:
            InputError: as `load_classifier`.
        """
        return load_classifier(folder)[0]

    def save_pretrained(self, folder: Path | str, details: Mapping[str, Any] | None = None) -> None:
        """Write a model folder (config.json, model.safetensors and a card) that `from_pretrained` reads."""
        save_classifier(Path(folder), self, details=dict(details or {}))

    def forward(self, tokens: Tensor, state: ClassifierState | None = None) -> tuple[Tensor, ClassifierState]:
        """Process a piece of a record.

        Args:
            tokens: (batch, length), token ids in any integer dtype.
            state: state after the previous piece; None at the start.

        Returns:
            The evidence per base for each class, pooled over the record so far (batch, classes), and the state.
        """
        evidence, _, state = self._evidence(tokens, state)
        pooled, pooling_state = self.pooling(evidence, state.evidence)
        return pooled, state._replace(evidence=pooling_state)

    def _evidence(self, tokens: Tensor, state: ClassifierState | None) -> tuple[Tensor, Tensor, ClassifierState]:
        """Return base-wise evidence (batch, length, classes), its likelihood part, and state with the old pooling."""
        reading, outgoing = self.read(tokens, state)
        deviation = sum(
            table(numbers) for table, numbers in zip(self.context_evidence.tables, reading.contexts, strict=True)
        )
        with torch.autocast(tokens.device.type, enabled=False):
            deviation = (deviation + self.deviation(reading.features)) * DEVIATION_SCALE
        likelihood = _scale_gradient(reading.likelihood, self.config.classification_gradient)
        # Gaps (N) are a property of an assembly, not of a species: they are no evidence.
        return likelihood + deviation * reading.known.unsqueeze(-1), reading.likelihood, outgoing

    def read(self, tokens: Tensor, state: ClassifierState | None = None) -> tuple[Reading, ClassifierState]:
        """Return the components of the evidence of (batch, length) tokens, and the state with the old pooling."""
        if active_ranks() is not None:
            raise InputError(
                "a species classifier cannot process a sequence that is split over ranks; give each rank whole records"
            )
        batch, length = tokens.shape
        classes = len(self.config.class_names)
        bases = tokens.long() - FIRST_BASE_TOKEN
        embedded, contexts = self.embedding(bases, None if state is None else state.contexts)
        hidden, stack_state = self.stack(embedded, None if state is None else state.stack)
        numbers, evidence_contexts = self.context_evidence.context_numbers(
            bases, None if state is None else state.evidence_contexts
        )
        following, features = self._predict_next_base(hidden)
        first = hidden.new_full((batch, classes, BASES), -math.log(BASES)) if state is None else state.prediction
        predicted = torch.cat([first.unsqueeze(1), following[:, :-1]], dim=1) if length else following
        known = (bases >= 0) & (bases < BASES)
        here = torch.where(known, bases, 0)[:, :, None, None].expand(-1, -1, classes, 1)
        likelihood = predicted.gather(3, here).squeeze(3) * known.unsqueeze(-1)
        pooled = (
            PoolingState(hidden.new_zeros(batch, classes, dtype=wide_dtype(hidden.device)), 0)
            if state is None
            else state.evidence
        )
        outgoing = ClassifierState(
            contexts, evidence_contexts, stack_state, following[:, -1] if length else first, pooled
        )
        return Reading(likelihood, features, numbers, known), outgoing

    def _predict_next_base(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return class-wise next-base log-probabilities and features for (batch, length, model_width).

        Their shapes are (batch, length, classes, bases) and (batch, length, feature_width). Computed in full precision
        even under autocast: evidence is a small difference of large numbers.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.next_base.weight.dtype)
            features = F.gelu(self.features(_scale_gradient(hidden, self.config.classification_gradient)))
            class_logits = self.class_next_base(features).unflatten(2, (len(self.config.class_names), BASES))
            logits = self.next_base(hidden).unsqueeze(2) + class_logits * CLASS_LIKELIHOOD_SCALE
            # Over four bases, as a kernel of its own takes three times as long on a CPU.
            return logits - logits.logsumexp(dim=-1, keepdim=True), features

    def logits(self, pooled_evidence: Tensor, length_bp: Tensor | int) -> Tensor:
        """Turn pooled evidence (batch, classes) over `length_bp` bases into logits.

        The factor is exp(intercept + slope * log(length / 1024)): slope 1 corresponds to independent bases, 0 to longer
        sequences without additional information. It never changes which class is best.
        """
        length = torch.as_tensor(length_bp, dtype=torch.float32).clamp(min=1.0)
        factor = torch.exp(self.confidence_intercept + self.confidence_slope * torch.log(length / REFERENCE_LENGTH_BP))
        return pooled_evidence * (factor.unsqueeze(-1) if factor.dim() else factor)

    def loss(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the training losses of windows (batch, length) with labels (batch,).

        The window and the shorter windows within it (halves, quarters, ... down to `shortest_window_bp`) are all
        classified, each length with the same weight. The other loss is the next-base loss of the true class, in nats
        per base.
        """
        evidence, likelihood, _ = self._evidence(tokens, None)
        length = tokens.shape[1]
        entropies = []
        window = length
        while True:
            windows = length // window
            inside = evidence[:, : windows * window].unflatten(1, (windows, window)).flatten(0, 1)
            logits = self.logits(self.pooling(inside)[0], window)
            entropies.append(F.cross_entropy(logits, labels.repeat_interleave(windows)))
            if window == length:
                accuracy = (logits.argmax(-1) == labels).float().mean()
            if window // 2 < self.config.shortest_window_bp:
                break
            window //= 2
        true_class = labels[:, None, None].expand(-1, length, 1)
        likelihood_loss = -likelihood.gather(2, true_class).mean()
        cross_entropy = torch.stack(entropies).mean()
        return {
            "loss": cross_entropy + self.config.likelihood_weight * likelihood_loss,
            "cross_entropy": cross_entropy.detach(),
            "likelihood_loss": likelihood_loss.detach(),
            "accuracy": accuracy,
        }

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer groups.

        Weight decay applies to matrices, more strongly to the evidence of contexts, and not to norms, biases, the
        embedding, the confidence and the scan's dynamics.
        """
        spared = {id(parameter) for parameter in parameters_without_decay(self)}
        contexts = list(self.context_evidence.parameters())
        spared |= {id(parameter) for parameter in (*self.embedding.parameters(), *contexts)}
        decaying = [parameter for parameter in self.parameters() if parameter.dim() > 1 and id(parameter) not in spared]
        chosen = {id(parameter) for parameter in (*decaying, *contexts)}
        others = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
        return [
            {"params": decaying, "weight_decay": weight_decay},
            {"params": contexts, "weight_decay": CONTEXT_EVIDENCE_DECAY * weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]


def _scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """Return the same values, with the gradient scaled by `factor`."""
    return tensor.detach() if factor == 0 else tensor * factor + (tensor * (1 - factor)).detach()


def save_classifier(folder: Path, model: SpeciesClassifier, *, details: dict[str, Any]) -> None:
    """Write a model folder (config.json, model.safetensors, README.md) in one step.

    Args:
        folder: the model folder; an earlier model there is replaced.
        details: JSON-serialisable training details, used in classification and evaluation.
    """
    config = {
        "kind": MODEL_KIND,
        "classifier": model.config.to_dict(),
        "tokenizer": CharacterTokenizer().to_config(),
        "details": details,
    }
    tensors = dict(model.state_dict())
    if model.parts is not None and model.combination is not None:
        config["combination"] = model.combination.to_dict()
        tensors |= model.parts.to_tensors()
    write_model_folder(Path(folder), config, tensors, _card(model.config, details))


def load_classifier(folder: Path | str) -> tuple[SpeciesClassifier, dict[str, Any]]:
    """Read a model folder: the classifier in evaluation mode, and the details saved with it.

    Args:
        folder: the model folder, or `hf://owner/name@revision` on the Hugging Face Hub.

    Raises:
        InputError: if the folder is missing, incomplete, damaged, or of another kind or version.
    """
    folder = find_model(folder)
    config, tensors = read_model_folder(folder)
    if config.get("kind") != MODEL_KIND:
        raise InputError(
            f"{folder} holds a {config.get('kind', 'model of unknown kind')!s}, not a {MODEL_KIND}; give another folder"
        )
    for key in ("classifier", "tokenizer"):
        if not isinstance(config.get(key), dict):
            raise InputError(
                f"{folder}/config.json has no {key!r} section; the model folder is damaged, train or copy it again"
            )
    CharacterTokenizer.from_config(config["tokenizer"])
    settings, own = config["classifier"], {name: value for name, value in tensors.items() if not is_part_tensor(name)}
    model = build_and_load(
        lambda: SpeciesClassifier(SpeciesClassifierConfig.from_dict(settings)), settings, own, folder
    )
    if isinstance(config.get("combination"), dict):
        model.combination = Combination.from_dict(config["combination"])
        model.parts = CountedParts.from_tensors(tensors, model.combination.part_names)
        if (model.parts.words is None) != (model.combination.words_one_in is None):
            raise InputError("the long words in the model folder are damaged: train or copy it again.")
    return model, training_details(config, folder)


def _card(config: SpeciesClassifierConfig, details: Mapping[str, Any]) -> str:
    """The model card: what the folder is and how to use it."""
    mixers = ", ".join(dict.fromkeys(description["name"] for description in config.layer_descriptions()))
    lines = [
        "# Species classifier",
        "",
        f"Classes: {', '.join(config.class_names)}.",
        "",
        f"{config.layers} layers ({mixers}) of width {config.model_width}; DNA of any length, both strands averaged.",
        "",
        "    genomamba classify THIS_FOLDER contigs.fa",
        "",
    ]
    held_out = details.get("holdout")
    if held_out:
        lines += [f"Sequences held out of training: {', '.join(held_out)}.", ""]
    return "\n".join(lines)
