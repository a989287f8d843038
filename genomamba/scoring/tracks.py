"""Log-likelihoods of all bases of a genome under a language model, in bounded memory whatever the contig length.

Causal models process a region in pieces, carrying the state over; the strands are processed one after the other, each
in its own direction, and averaged. Masked models process overlapping windows in which every eighth base is hidden at a
time until all are scored: an eighth of the input is hidden, compared with up to 15 % in training.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from genomamba.data.bed import Region
from genomamba.io.reference import Reference
from genomamba.io.vcf import is_known
from genomamba.models.language_model import LanguageModel
from genomamba.scoring.likelihood import base_log_likelihoods
from genomamba.tokenizer import COMPLEMENT_IDS, Tokens
from mambacore.devices import from_numpy, to_numpy
from mambacore.errors import InputError

Values = npt.NDArray[np.float32]
"""Log-likelihoods (nats) of bases; NaN for other letters, and for a base without any context."""

DEFAULT_PIECE_BP: Final = 1 << 16
DEFAULT_CONTEXT_BP: Final = 4096
DEFAULT_WINDOW_BP: Final = 1024
HIDDEN_EVERY: Final = 8


@dataclass(frozen=True)
class TrackPiece:
    """Values of consecutive bases of a contig, from `start` (0-based)."""

    contig: str
    start: int
    values: Values


class TrackMaker:
    """Computes log-likelihoods of the bases of regions.

    Args:
        language_model: a causal or masked model.
        genome: reference of the regions.
        both_strands: average both strands instead of using only the given one. A base that one strand cannot score (the
            first of a contig) has the value of the other.
        context: for causal models: bases before a region, on each strand, that are processed but not scored, bp.
        window: for masked models: window length, bp. The middle half of each window is scored.
        piece_length: bases per forward pass; it affects only speed and memory.

    Raises:
        InputError: if a length is invalid.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        genome: Reference,
        both_strands: bool = True,
        context: int = DEFAULT_CONTEXT_BP,
        window: int = DEFAULT_WINDOW_BP,
        piece_length: int = DEFAULT_PIECE_BP,
    ) -> None:
        if context < 0:
            raise InputError(f"the context is {context} bp: use 0 or more.")
        if window < 4 * HIDDEN_EVERY or window % 4:
            raise InputError(f"the window is {window} bp: use a multiple of 4 from {4 * HIDDEN_EVERY}.")
        if piece_length < 1:
            raise InputError(f"the piece length is {piece_length} bp: use 1 or more.")
        self._language_model = language_model
        self._genome = genome
        self._both_strands = both_strands
        self._context = context
        self._window = window
        self._piece_length = piece_length

    @property
    def readings(self) -> int:
        """Number of passes over each base."""
        if self._language_model.objective == "masked":
            return 1
        return 2 if self._both_strands else 1

    def pieces(self, region: Region) -> Iterator[TrackPiece | int]:
        """Yield the values of a region in order, interspersed with numbers of processed bases for progress."""
        if self._language_model.objective == "masked":
            yield from self._masked_pieces(region)
            return
        if not self._both_strands:
            for start, values in self._causal_pieces(region, reverse=False):
                yield TrackPiece(region.contig, start, values)
                yield len(values)
            return
        with tempfile.TemporaryFile() as stored:
            # The other strand is computed from the last base on, so it is kept on disk until the given one is done.
            for _, values in self._causal_pieces(region, reverse=True):
                stored.write(values.tobytes())
                yield len(values)
            for start, values in self._causal_pieces(region, reverse=False):
                item = values.itemsize
                stored.seek((region.end - start - len(values)) * item)
                other = np.frombuffer(stored.read(len(values) * item), dtype=np.float32)[::-1]
                mean = (values + other) / 2
                mean = np.where(np.isnan(values), other, np.where(np.isnan(other), values, mean))
                yield TrackPiece(region.contig, start, mean.astype(np.float32))
                yield len(values)

    @torch.no_grad()
    def _causal_pieces(self, region: Region, reverse: bool) -> Iterator[tuple[int, Values]]:
        """Yield the start and the values of pieces of a region.

        With `reverse`, starts and values are in the coordinates and the direction of the other strand.
        """
        contig_length = self._genome.length(region.contig)
        # Positions on the processed strand, in its own direction.
        start, end = (
            (contig_length - region.end, contig_length - region.start) if reverse else (region.start, region.end)
        )
        state: Any = None
        before: torch.Tensor | None = None
        position = max(0, start - self._context)
        while position < end:
            stop = min(start if position < start else end, position + self._piece_length)
            letters, tokens = self._read(region.contig, position, stop, contig_length, reverse)
            found, state = self._language_model.next_base_log_probabilities(from_numpy(tokens)[None], state)
            following = found[:, -1:]
            if before is None:
                before = torch.full_like(following, torch.nan)
            if position >= start:
                predicted = torch.cat([before, found[:, :-1]], dim=1)[0]
                yield position, _values(predicted, tokens, letters)
            before, position = following, stop

    @torch.no_grad()
    def _masked_pieces(self, region: Region) -> Iterator[TrackPiece | int]:
        contig_length = self._genome.length(region.contig)
        step, flank = self._window // 2, self._window // 4
        # Windows start at multiples of the step in the contig, so that a base has the same value in any region.
        for begin in range(region.start // step * step, region.end, step):
            start, end = max(0, begin - flank), min(contig_length, begin + step + flank)
            letters, tokens = self._read(region.contig, start, end, contig_length, reverse=False)
            places = torch.arange(start, end)
            masked = places % HIDDEN_EVERY == torch.arange(HIDDEN_EVERY)[:, None]
            found = self._language_model.masked_base_log_probabilities(
                from_numpy(tokens).expand(HIDDEN_EVERY, -1), masked, self._both_strands
            )
            hidden = found[places % HIDDEN_EVERY, torch.arange(end - start)]
            values = _values(hidden, tokens, letters)
            first, last = max(begin, region.start), min(begin + step, region.end)
            yield TrackPiece(region.contig, first, values[first - start : last - start])
            yield last - first

    def _read(self, contig: str, start: int, end: int, contig_length: int, reverse: bool) -> tuple[bytes, Tokens]:
        """Return upper-case letters and tokens of [start, end) of a strand, positions in its own direction."""
        if not reverse:
            letters = self._genome.letters(contig, start, end).upper()
            return letters, self._language_model.tokens(letters)
        letters = self._genome.letters(contig, contig_length - end, contig_length - start).upper()
        return letters[::-1], COMPLEMENT_IDS[self._language_model.tokens(letters)[::-1]]


def runs(values: Values) -> Iterator[tuple[int, int]]:
    """Yield the starts and ends of runs of values without gaps."""
    present = np.concatenate([[False], ~np.isnan(values), [False]])
    boundaries = np.flatnonzero(present[1:] != present[:-1])
    yield from zip(boundaries[::2].tolist(), boundaries[1::2].tolist(), strict=True)


def _values(log_probabilities: torch.Tensor, tokens: Tokens, letters: bytes) -> Values:
    """Convert log-probabilities (length, 4) and the observed bases to values (length,)."""
    values = to_numpy(base_log_likelihoods(log_probabilities, from_numpy(tokens)), torch.float32)
    return np.where(is_known(letters), values, np.float32(np.nan)).astype(np.float32)
