"""Predictions of a sequence model: batches of similar length, averaged over both strands, long sequences in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genomamba.baselines.words import BASES, FIRST_BASE_TOKEN
from genomamba.data.targets import TargetDescription
from genomamba.models.sequence_model import SequenceModel, SequenceState
from genomamba.prediction.metrics import Predictions
from genomamba.tokenizer import COMPLEMENT_IDS, Tokens
from mambacore.devices import device_of, from_numpy, halve_positions, in_fitting_pieces, positions_at_once, to_numpy
from mambacore.non_finite import require_numbers

PIECE_LENGTH_BP: Final = 16_384
"""Longer sequences are processed by a causal stack in pieces of this length, one at a time; on a GPU in longer ones."""
BASES_PER_FORWARD: Final = 32_768
"""Of a batch of several sequences, on a CPU."""
# Sequences are queued to be batched with others of similar length; the queue is bounded.
MOST_WAITING_SEQUENCES: Final = 256
MOST_WAITING_BASES: Final = 1 << 20

NamedTokens = tuple[str, Tokens]


@torch.inference_mode()
def model_outputs(
    model: SequenceModel,
    sequences: Sequence[Tokens],
    advance: Callable[[int], object] = lambda bases: None,
) -> Tensor:
    """Compute outputs (sequences, outputs), float64, on the CPU, in the order of the sequences, without dropout.

    They are logits or standardised numbers, averaged over both strands if the model is configured to.

    Args:
        model: see `SequenceModel`.
        sequences: uint8 (length,) each.
        advance: called with the number of bases processed.
    """
    outputs = torch.zeros(len(sequences), model.config.targets.outputs, dtype=torch.float64)
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
    training = model.training
    model.eval()
    start, device, strands = 0, device_of(model), 1 + model.config.both_strands
    while start < len(order):
        end, shortest = start + 1, len(sequences[order[start]])
        if model.is_causal and shortest > positions_at_once(device, strands * PIECE_LENGTH_BP) // strands:
            outputs[order[start]] = _in_pieces(model, sequences[order[start]])
        else:
            at_once = positions_at_once(device, BASES_PER_FORWARD)
            # Sorted by length, so the last one added is the longest.
            while end < len(order) and (end + 1 - start) * len(sequences[order[end]]) <= at_once:
                end += 1
            try:
                found = _together(model, [sequences[place] for place in order[start:end]])
            except torch.OutOfMemoryError:
                found = None
            if found is None:  # outside of the handler, which holds on to the memory of what failed
                halve_positions(device, at_least=1 if model.is_causal else shortest)
                continue
            outputs[order[start:end]] = found
        advance(sum(len(sequences[place]) for place in order[start:end]))
        start = end
    model.train(training)
    return require_numbers(outputs, "predictions")


def predict_sequences(
    model: SequenceModel, sequences: Iterable[NamedTokens], advance: Callable[[int], object] = lambda bases: None
) -> Iterator[tuple[str, int, npt.NDArray[np.float64]]]:
    """Yield name, length (bp) and predictions (outputs,) of each sequence, in order and in bounded memory.

    Predictions are those of `predictions_from`, NaN for a sequence without a known base (A, C, G or T).
    """
    for waiting in _groups(sequences):
        predictions = np.full((len(waiting), model.config.targets.outputs), np.nan)
        present = [place for place, (_, tokens) in enumerate(waiting) if has_known_base(tokens)]
        if present:
            outputs = model_outputs(model, [waiting[place][1] for place in present], advance)
            predictions[present] = predictions_from(model.config.targets, outputs)
        for (name, tokens), values in zip(waiting, predictions, strict=True):
            yield name, len(tokens), values


def has_known_base(tokens: Tokens) -> bool:
    """Whether a sequence has an A, C, G or T: of others, such as masked ones, nothing can be said."""
    return bool(((tokens >= FIRST_BASE_TOKEN) & (tokens < FIRST_BASE_TOKEN + BASES)).any())


def prediction_columns(description: TargetDescription) -> list[str]:
    """Return the columns of a prediction.

    They are `call`, `probability` and `p_CLASS` for classes, `p_COLUMN` for labels, or the columns of numbers.
    """
    if description.kind == "classes":
        return ["call", "probability", *(f"p_{name}" for name in description.class_names)]
    if description.kind == "labels":
        return [f"p_{name}" for name in description.columns]
    return list(description.columns)


def prediction_values(description: TargetDescription, predictions: npt.NDArray[np.float64]) -> list[Any]:
    """Return the values of one sequence in the order of `prediction_columns`; None without a prediction."""
    values: list[Any] = [None if np.isnan(value) else float(value) for value in predictions]
    if description.kind != "classes":
        return values
    if np.isnan(predictions).any():
        return [None, None, *values]
    best = int(predictions.argmax())
    return [description.class_names[best], values[best], *values]


def _groups(sequences: Iterable[NamedTokens]) -> Iterator[list[NamedTokens]]:
    """Yield groups of consecutive sequences of bounded size."""
    waiting: list[NamedTokens] = []
    bases = 0
    for sequence in sequences:
        waiting.append(sequence)
        bases += len(sequence[1])
        if len(waiting) >= MOST_WAITING_SEQUENCES or bases >= MOST_WAITING_BASES:
            yield waiting
            waiting, bases = [], 0
    if waiting:
        yield waiting


def predictions_from(description: TargetDescription, outputs: Tensor) -> Predictions:
    """Convert `model_outputs` to probabilities of classes or labels, or to numbers in the units of the table."""
    if description.kind == "classes":
        return to_numpy(torch.softmax(outputs, dim=1))
    if description.kind == "labels":
        return to_numpy(torch.sigmoid(outputs))
    return to_numpy(outputs) * np.array(description.deviations) + np.array(description.means)


def padded_batch(sequences: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Return tokens (batch, length of the longest), padded on the right with zeros, and lengths (batch,)."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.uint8)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = from_numpy(sequence)
    return tokens, lengths


def _together(model: SequenceModel, sequences: Sequence[Tokens]) -> Tensor:
    tokens, lengths = (tensor.to(device_of(model)) for tensor in padded_batch(sequences))
    outputs = model.padded(tokens, lengths).cpu().double()
    if not model.config.both_strands:
        return outputs
    return (outputs + model.padded(model.reverse_complement(tokens, lengths), lengths).cpu().double()) / 2


def _in_pieces(model: SequenceModel, sequence: Tokens) -> Tensor:
    """Return the outputs (outputs,) for one long sequence, with both strands as a batch."""
    strands = np.stack([sequence, COMPLEMENT_IDS[sequence[::-1]]] if model.config.both_strands else [sequence])
    device = device_of(model)

    def step(
        piece: slice, before: tuple[Tensor | None, SequenceState | None]
    ) -> tuple[Tensor | None, SequenceState | None]:
        return model(from_numpy(strands[:, piece], device), before[1])

    first: tuple[Tensor | None, SequenceState | None] = (None, None)
    outputs, _ = in_fitting_pieces(step, first, strands.shape[1], len(strands), device, PIECE_LENGTH_BP)
    assert outputs is not None  # there is at least one base
    return outputs.cpu().double().mean(dim=0)
