"""A trained model as an object whose methods do what the commands do.

table = genomamba.load("yeasts").classify("contigs.fa")
vectors = genomamba.load("pretrained").embed({"a": "ACGTACGT"}).vectors
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar

import numpy as np
import torch

from genomamba.classification.novelty import LikelihoodQuantiles
from genomamba.classification.records import RecordClassifier
from genomamba.io.reference import Reference
from genomamba.io.sources import SequenceSource, read_sequences
from genomamba.io.vcf import VariantFile, require_shared_contigs
from genomamba.models import language_model, sequence_model, species_classifier
from genomamba.models.language_model import LanguageModel
from genomamba.models.sequence_model import SequenceModel
from genomamba.models.species_classifier import SpeciesClassifier
from genomamba.prediction.predict import predict_sequences, prediction_columns, prediction_values
from genomamba.results import Embeddings, ResultTable
from genomamba.scoring.embeddings import Embedder, as_the_model_reads, embed_pieces, require_windows, windows_of
from genomamba.scoring.generation import Sampling, generate
from genomamba.scoring.likelihood import sequence_log_likelihood
from genomamba.scoring.variant_scores import (
    ALLELE_COLUMNS,
    DEFAULT_SPAN_BP,
    DEFAULT_WINDOW_BP,
    VariantScorer,
    allele_values,
    require_window,
    score_variants,
)
from genomamba.tokenizer import CharacterTokenizer
from genomamba.weights import find_model
from mambacore.devices import available_device
from mambacore.errors import InputError
from mambacore.model_folder import CONFIG_NAME

_NEEDED: Final = {
    "classify": "a species classifier (`genomamba train`)",
    "embed": "a language model (`genomamba pretrain`)",
    "score_variants": "a language model (`genomamba pretrain`)",
    "log_likelihood": "a language model (`genomamba pretrain`)",
    "generate": "a causal language model (`genomamba pretrain`)",
    "predict": "a fine-tuned sequence model (`genomamba finetune`)",
}


Own = TypeVar("Own", bound="LoadedModel")
Given = ParamSpec("Given")
Result = TypeVar("Result")
PRECISIONS: Final[tuple[str, ...]] = ("float32", "bfloat16")


def _in_precision(method: Callable[Concatenate[Own, Given], Result]) -> Callable[Concatenate[Own, Given], Result]:
    """Run a method with the linear layers in the precision of its model."""

    @functools.wraps(method)
    def run(self: Own, *arguments: Given.args, **options: Given.kwargs) -> Result:
        if self.precision == "float32":  # or what the caller's autocast says
            return method(self, *arguments, **options)
        with torch.autocast(self.device.type, torch.bfloat16):
            return method(self, *arguments, **options)

    return run


class LoadedModel:
    """A loaded model, in evaluation mode.

    Attributes:
        source: the folder or name it was loaded from.
        details: JSON-serialisable training details.
        device: where it computes.
        precision: that of the linear layers, "float32" or "bfloat16".
    """

    kind = "model"
    device = torch.device("cpu")
    precision: str = "float32"

    def __init__(self, source: str, details: Mapping[str, Any]) -> None:
        self.source = source
        self.details = dict(details)

    def classify(self, *_: Any, **__: Any) -> ResultTable:
        """Only for species classifiers: see `LoadedSpeciesClassifier.classify`."""
        raise self._refusal("classify")

    def embed(self, *_: Any, **__: Any) -> Embeddings:
        """Only for language models: see `LoadedLanguageModel.embed`."""
        raise self._refusal("embed")

    def score_variants(self, *_: Any, **__: Any) -> ResultTable:
        """Only for language models: see `LoadedLanguageModel.score_variants`."""
        raise self._refusal("score_variants")

    def log_likelihood(self, *_: Any, **__: Any) -> ResultTable:
        """Only for language models: see `LoadedLanguageModel.log_likelihood`."""
        raise self._refusal("log_likelihood")

    def generate(self, *_: Any, **__: Any) -> ResultTable:
        """Only for language models: see `LoadedLanguageModel.generate`."""
        raise self._refusal("generate")

    def predict(self, *_: Any, **__: Any) -> ResultTable:
        """Only for fine-tuned models: see `LoadedSequenceModel.predict`."""
        raise self._refusal("predict")

    def _refusal(self, method: str) -> InputError:
        return InputError(
            f"{self.source} holds a {self.kind}, but {method} needs {_NEEDED[method]}: load another model."
        )


class LoadedSpeciesClassifier(LoadedModel):
    """A species classifier; `model` is the module itself."""

    kind = species_classifier.MODEL_KIND

    def __init__(self, model: SpeciesClassifier, source: str, details: Mapping[str, Any]) -> None:
        super().__init__(source, details)
        self.model = model

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the probabilities."""
        return tuple(self.model.config.class_names)

    @_in_precision
    def classify(  # type: ignore[override]
        self,
        sequences: SequenceSource,
        minimum_length: int = 1,
        unknown_below: float = 0.0,
        unknown_rate: float = 0.0,
        unknown_shared: float = 0.0,
    ) -> ResultTable:
        """Classify sequences of any length.

        Args:
            sequences: a FASTA or FASTQ file, a mapping of names to letters, or letters.
            minimum_length: shorter records are `unclassified`, bp.
            unknown_below: records whose best class has a lower probability are `unknown`.
            unknown_rate: records with a p-value below this are `unknown`; requires a model trained with held-out
                sequences.
            unknown_shared: records of whose long words no class has this share are `unknown`.

        Returns:
            Columns `record`, `length`, `call`, `probability`, `p_CLASS` for each class, `p_value` with `unknown_rate`,
            and `shared` with `unknown_shared`.

        Raises:
            InputError: if an argument is out of range, or the sequences cannot be read.
        """
        quantiles = LikelihoodQuantiles.from_details(self.details, unknown_rate) if 0 < unknown_rate < 1 else None
        classifier = RecordClassifier(
            self.model,
            minimum_length,
            unknown_below,
            unknown_rate=unknown_rate,
            quantiles=quantiles,
            unknown_shared=unknown_shared,
        )
        columns = ["record", "length", "call", "probability", *(f"p_{name}" for name in self.class_names)]
        columns += classifier.extra_columns
        rows = []
        for row in classifier.classify(sequences):
            known = row.probabilities is not None
            values: list[Any] = [row.probability, *row.probabilities.tolist()] if known else []  # type: ignore[union-attr]
            values = values or [None] * (1 + len(self.class_names))
            extra = [getattr(row, name) for name in classifier.extra_columns]
            rows.append([row.name, row.length, row.call, *values, *extra])
        return ResultTable(columns, rows)


class LoadedLanguageModel(LoadedModel):
    """A language model of DNA; `model` is a `genomamba.models.language_model.LanguageModel`."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model.source, model.details)
        self.model = model

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Kind of model, with its objective."""
        return f"{self.model.objective} {language_model.MODEL_KIND}"

    @_in_precision
    def embed(  # type: ignore[override]
        self,
        sequences: SequenceSource,
        pooling: str = "mean",
        layer: int | None = None,
        both_strands: bool = False,
        window: int | None = None,
        stride: int | None = None,
    ) -> Embeddings:
        """Embed sequences, or windows of them.

        Args:
            sequences: a FASTA or FASTQ file, a mapping of names to letters, or letters.
            pooling, layer, both_strands: see `genomamba.scoring.embeddings.Embedder`.
            window, stride: length of windows and distance between their starts, bp; one vector per window.

        Raises:
            InputError: if an argument is out of range, or the sequences cannot be read.
        """
        require_windows(window, stride)
        embedder = Embedder(self.model, pooling, layer, both_strands)
        pieces = (
            piece
            for record in read_sequences(sequences)
            for piece in windows_of(record.name, as_the_model_reads(self.model, record.tokens), 0, window, stride)
        )
        rows, vectors = [], [np.empty((0, embedder.width), dtype=np.float32)]
        for some, found in embed_pieces(embedder, pieces):
            rows += [(piece.name, piece.start, piece.end) for piece in some]
            vectors.append(found)
        return Embeddings(rows, np.concatenate(vectors))

    @_in_precision
    def log_likelihood(self, sequences: SequenceSource, both_strands: bool = False) -> ResultTable:  # type: ignore[override]
        """Compute the log-likelihood of sequences.

        The first base of a sequence is not scored, nor are letters other than A, C, G and T. For a masked model it is
        the pseudo-log-likelihood of whole sequences (`genomamba.scoring.likelihood.base_losses`).

        Args:
            sequences: a FASTA or FASTQ file, a mapping of names to letters, or letters.
            both_strands: average both strands.

        Returns:
            Columns `record`, `length` (bp), `bases` (scored), `log_likelihood` (nats), `per_base` and `perplexity`.
        """
        rows = []
        for record in read_sequences(sequences):
            found = sequence_log_likelihood(self.model, as_the_model_reads(self.model, record.tokens), both_strands)
            figures = (found.per_base, found.perplexity) if found.bases else (None, None)
            rows.append((record.name, len(record.tokens), found.bases, found.log_likelihood, *figures))
        return ResultTable(("record", "length", "bases", "log_likelihood", "per_base", "perplexity"), rows)

    @_in_precision
    def score_variants(  # type: ignore[override]
        self,
        variants: str | os.PathLike[str],
        reference: str | os.PathLike[str],
        window: int = DEFAULT_WINDOW_BP,
        span: int = DEFAULT_SPAN_BP,
        both_strands: bool = True,
        chromosome_map: Mapping[str, str] | None = None,
    ) -> ResultTable:
        """Score every allele of a VCF file against its reference.

        Args:
            variants: VCF or BCF file, plain or compressed.
            reference: FASTA file that the variants were called against.
            window: length of the compared windows around each allele, bp.
            span: see `genomamba.scoring.variant_scores.VariantScorer`.
            both_strands: average both strands.
            chromosome_map: maps chromosome names in the VCF file to different ones in the reference.

        Returns:
            One row per allele, with the columns of `genomamba score-variants`.

        Raises:
            InputError: if pysam is not installed, an argument is out of range, or a file cannot be read.
        """
        require_window(window)
        names = dict(chromosome_map or {})
        rows = []
        with VariantFile(variants) as records, Reference(os.fspath(reference)) as genome:
            chromosomes = list(dict.fromkeys(names.get(one.chromosome, one.chromosome) for one in records.records()))
            require_shared_contigs(chromosomes, genome.lengths, records.label, os.fspath(reference))
            scorer = VariantScorer(self.model, span)
            for variant, scores in score_variants(records.records(), genome, scorer, window, both_strands, names):
                rows += [allele_values(variant, allele) for allele in scores]
        return ResultTable(ALLELE_COLUMNS, rows)

    @_in_precision
    def generate(  # type: ignore[override]
        self,
        length: int,
        records: int = 1,
        prompt: SequenceSource | None = None,
        temperature: float = 1.0,
        top_k: int = 4,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> ResultTable:
        """Generate new DNA.

        Args:
            length: bp of each record.
            records: number of records per prompt.
            prompt: sequences to continue, as for `embed`; the records do not repeat them.
            temperature, top_k, top_p: see `genomamba.scoring.generation.Sampling`.
            seed: record number i is a function of (seed, i).

        Returns:
            Columns `record`, `prompt` (its name, or None), `sequence` and `log_likelihood` (nats, summed).

        Raises:
            InputError: if the model is masked, or an argument is out of range.
        """
        if records < 1:
            raise InputError(f"records is {records}: use 1 or more.")
        prompts: list[tuple[str | None, Any]] = [(None, np.empty(0, dtype=np.uint8))]
        if prompt is not None:
            prompts = [(one.name, as_the_model_reads(self.model, one.tokens)) for one in read_sequences(prompt)]
        repeated = [one for one in prompts for _ in range(records)]
        sampling = Sampling(temperature, top_k, top_p)
        decode = CharacterTokenizer().decode
        rows = [
            (f"generated_{made.index + 1}", name, decode(made.tokens), made.log_likelihood)
            for (name, _), made in zip(
                repeated,
                generate(self.model, [tokens for _, tokens in repeated], length, sampling, seed),
                strict=True,
            )
        ]
        return ResultTable(("record", "prompt", "sequence", "log_likelihood"), rows)


class LoadedSequenceModel(LoadedModel):
    """A fine-tuned model of whole sequences; `model` is the module itself."""

    kind = sequence_model.MODEL_KIND

    def __init__(self, model: SequenceModel, source: str, details: Mapping[str, Any]) -> None:
        super().__init__(source, details)
        self.model = model

    @_in_precision
    def predict(self, sequences: SequenceSource) -> ResultTable:  # type: ignore[override]
        """Predict labels or numbers for sequences.

        Args:
            sequences: a FASTA or FASTQ file, a mapping of names to letters, or letters.

        Returns:
            Columns `record` and `length` (bp), then `call`, `probability` and `p_CLASS` for classes, `p_COLUMN` for
            labels, or the columns of numbers. A sequence without bases has None.
        """
        description = self.model.config.targets
        named = ((record.name, record.tokens) for record in read_sequences(sequences))
        rows = [
            (name, length, *prediction_values(description, values))
            for name, length, values in predict_sequences(self.model, named)
        ]
        return ResultTable(("record", "length", *prediction_columns(description)), rows)


def load(
    model: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Any:
    """Load a trained model of any kind.

    Args:
        model: a model folder, or `hf://owner/name@revision` on the Hugging Face Hub.
        device: device to run on, such as "cpu" or "cuda".
        precision: precision of the linear layers; bfloat16 is faster where the device multiplies in it, and rounds.

    Returns:
        A `LoadedSpeciesClassifier`, `LoadedLanguageModel` or `LoadedSequenceModel`, with the methods of its kind.

    Raises:
        InputError: if the model or device does not exist, the precision is another one, or the folder is damaged or
            holds another kind of model.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}: use {' or '.join(PRECISIONS)}.")
    place = available_device(device)
    loaded = _load(os.fspath(model), place)
    loaded.device, loaded.precision = place, precision
    return loaded


def _load(reference: str, place: torch.device) -> LoadedModel:
    """Load a model and move it to a device."""
    folder = find_model(reference)
    kind = _kind_of(folder)
    if kind == species_classifier.MODEL_KIND:
        classifier, details = species_classifier.load_classifier(folder)
        return LoadedSpeciesClassifier(classifier.to(place), reference, details)
    if kind == sequence_model.MODEL_KIND:
        sequences, details = sequence_model.load_sequence_model(folder)
        return LoadedSequenceModel(sequences.to(place), reference, details)
    if kind is not None and kind != language_model.MODEL_KIND:
        other = ": use `audiomamba.load`" if "waveform" in kind or "clip" in kind else ": give another folder"
        raise InputError(f"{reference} holds a {kind}, not a DNA model{other}.")
    loaded = language_model.load_language_model(folder)
    loaded.model.to(place)
    return LoadedLanguageModel(LanguageModel(loaded.model, loaded.policy, loaded.details, reference))


def _kind_of(folder: Path) -> str | None:
    """Return the kind given in a folder; None for checkpoints of other projects and unreadable folders."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kind = config.get("kind") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None
