"""Embeddings of sequences from a DNA language model: one vector per record or window.

A vector depends on its sequence alone: not on the rest of the batch, on padding, or on the piece length of a causal
model. Causal models process sequences of any length in pieces, carrying the state over; masked models take whole
sequences.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from genomamba.models.language_model import FIRST_BASE_TOKEN, CoreModel, LanguageModel
from genomamba.tokenizer import COMPLEMENT_IDS, PADDED_VOCABULARY_SIZE, UNKNOWN_TOKEN, VOCABULARY, Tokens
from mambacore.devices import device_of, from_numpy, in_fitting_batches, to_numpy, widened
from mambacore.errors import InputError
from mambacore.models import CausalLanguageModel
from mambacore.non_finite import require_numbers

Pooling = Literal["mean", "last", "max"]
POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)
DEFAULT_PIECE_BP: Final = 1 << 14
_POSITIONS_AT_ONCE: Final = 1 << 15
_SEQUENCES_AT_ONCE: Final = 256


@dataclass(frozen=True)
class Piece:
    """A sequence to embed: bases [start, end) of the record or contig `name`.

    `region` and `strand` are those of the BED row that it belongs to, a dot where it states none.
    """

    name: str
    start: int
    end: int
    tokens: Tokens
    region: str = "."
    strand: str = "."


class Embedder:
    """Maps sequences to vectors of `width` channels.

    Args:
        language_model: a causal or masked model.
        pooling: pooling over positions: "mean", "last" (causal models only) or "max" per channel.
        layer: number of blocks to apply; None for all. The output is normalised by the model's final norm.
        both_strands: average the vectors of the sequence and of its reverse complement.
        piece_length: piece length for causal models, bp; the result does not depend on it.

    Raises:
        InputError: if the pooling is unknown, the layer does not exist, or the piece length is not positive.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        pooling: str = "mean",
        layer: int | None = None,
        both_strands: bool = False,
        piece_length: int = DEFAULT_PIECE_BP,
    ) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"there is no pooling '{pooling}': use {', '.join(POOLINGS)}.")
        if piece_length < 1:
            raise InputError(f"the piece length is {piece_length} bp: use 1 or more.")
        self._model = _up_to_layer(language_model.model, layer)
        self._pooling = pooling
        self._both_strands = both_strands
        self._piece_length = piece_length
        with torch.no_grad():
            self.width = int(self._hidden(torch.full((1, 1), FIRST_BASE_TOKEN), None)[0].shape[-1])

    @torch.no_grad()
    def embed(self, sequences: Sequence[Tokens]) -> npt.NDArray[np.float32]:
        """Return the vectors of sequences of any lengths, (sequences, width); NaN for one without bases."""
        vectors = np.full((len(sequences), self.width), np.nan, dtype=np.float32)
        alike: dict[int, list[int]] = defaultdict(list)
        device = device_of(self._model)
        for number, tokens in enumerate(sequences):
            if len(tokens):
                alike[len(tokens)].append(number)
        for length, numbers in alike.items():
            # Rows of equal length need no padding.

            def compute(rows: slice, numbers: Sequence[int] = numbers) -> npt.NDArray[np.float32]:
                return self._vectors([sequences[number] for number in numbers[rows]])

            found = in_fitting_batches(compute, len(numbers), length, device, _POSITIONS_AT_ONCE)
            vectors[numbers] = np.concatenate(found)
        return vectors

    def _vectors(self, sequences: Sequence[Tokens]) -> npt.NDArray[np.float32]:
        """The vectors of sequences of one length."""
        tokens, device = np.stack(sequences), device_of(self._model)
        pooled = self._pooled(from_numpy(tokens, device))
        if self._both_strands:
            pooled = (pooled + self._pooled(from_numpy(COMPLEMENT_IDS[tokens[:, ::-1]], device))) / 2
        return to_numpy(require_numbers(pooled, "embeddings"), torch.float32)

    def _pooled(self, tokens: Tensor) -> Tensor:
        """(batch, length) to (batch, width), in the device's widest type."""
        causal = isinstance(self._model, CausalLanguageModel)
        piece_length = self._piece_length if causal else tokens.shape[1]
        state: Any = None
        pooled: Tensor | None = None
        for piece in tokens.split(piece_length, dim=1):
            hidden, state = self._hidden(piece.long(), state)
            hidden = widened(hidden)
            if self._pooling == "last":
                pooled = hidden[:, -1]
            elif self._pooling == "max":
                pooled = hidden.amax(1) if pooled is None else torch.maximum(pooled, hidden.amax(1))
            else:
                pooled = hidden.sum(1) if pooled is None else pooled + hidden.sum(1)
        assert pooled is not None  # there is at least one base
        return pooled / tokens.shape[1] if self._pooling == "mean" else pooled

    def _hidden(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        if isinstance(self._model, CausalLanguageModel):
            return self._model.hidden(tokens.to(device_of(self._model)), state)
        return self._model.hidden(tokens.to(device_of(self._model))), None


def embed_pieces(embedder: Embedder, pieces: Iterable[Piece]) -> Iterator[tuple[list[Piece], npt.NDArray[np.float32]]]:
    """Yield batches of sequences, in order, with their vectors."""
    held: list[Piece] = []
    positions = 0
    for piece in pieces:
        held.append(piece)
        positions += len(piece.tokens)
        if positions >= 8 * _POSITIONS_AT_ONCE or len(held) >= _SEQUENCES_AT_ONCE:
            yield held, embedder.embed([one.tokens for one in held])
            held, positions = [], 0
    if held:
        yield held, embedder.embed([one.tokens for one in held])


def windows_of(name: str, tokens: Tokens, start: int, window: int | None, stride: int | None) -> Iterator[Piece]:
    """Yield the windows of a sequence that begins at `start` of its contig; without `window`, the sequence itself.

    Windows begin every `stride` bp (None: non-overlapping) until one reaches the end; the last may be shorter.
    """
    if window is None:
        yield Piece(name, start, start + len(tokens), tokens)
        return
    step = stride or window
    for begin in range(0, len(tokens), step):
        end = min(begin + window, len(tokens))
        yield Piece(name, start + begin, start + end, tokens[begin:end])
        if end == len(tokens):
            return


def as_the_model_reads(language_model: LanguageModel, tokens: Tokens) -> Tokens:
    """Convert tokens of upper-case letters to a model's letter policy: some read N as padding."""
    table = np.arange(PADDED_VOCABULARY_SIZE, dtype=np.uint8)
    for letter in b"ACGTN":
        table[VOCABULARY[chr(letter)]] = language_model.tokens(bytes([letter]))[0]
    table[UNKNOWN_TOKEN] = language_model.tokens(b"R")[0]
    return table[tokens]


def require_windows(window: int | None, stride: int | None) -> None:
    """Check that windows are not empty and strides do not skip bases.

    Raises:
        InputError: if they do; the message gives the allowed range.
    """
    if window is not None and window < 1:
        raise InputError(f"the window is {window} bp: use 1 or more.")
    if stride is not None and window is None:
        raise InputError(f"a stride of {stride} bp needs windows: give --window too.")
    if stride is not None and window is not None and not 1 <= stride <= window:
        raise InputError(f"the stride is {stride} bp: use 1 to {window}, the window, so that no base is skipped.")


def _up_to_layer(model: CoreModel, layer: int | None) -> CoreModel:
    """Return a model that shares the weights of another but has only its first blocks."""
    blocks = model.stack.blocks
    if layer is None or layer == len(blocks):
        return model
    if not 1 <= layer < len(blocks):
        raise InputError(f"the model has no layer {layer}: use 1 to {len(blocks)}.")
    shortened, stack = _shallow(model), _shallow(model.stack)
    stack.blocks = nn.ModuleList(list(blocks)[:layer])
    shortened.stack = stack
    return shortened


def _shallow(module: Any) -> Any:
    """Return a shallow copy of a module, whose submodules can be replaced."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
