"""Sampling of windows for fitting and choosing baselines, and the split into fitting and validation sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genomamba.baselines.words import FIRST_BASE_TOKEN
from genomamba.tokenizer import COMPLEMENT_IDS
from mambacore.errors import InputError

MAXIMUM_UNKNOWN_FRACTION = 0.01
MAXIMUM_DRAWS_PER_WINDOW = 200
SET_ASIDE_FRACTION = 0.25


class UnknownBasesError(InputError):
    """A class has hardly any window of some length without many unknown bases."""


@dataclass(frozen=True)
class LabelledWindows:
    """Windows of one length, tokens uint8 (length,) each, and their classes, int64 (windows,)."""

    windows: list[np.ndarray]
    labels: np.ndarray


def draw_windows(
    sequences_by_class: Sequence[Sequence[np.ndarray]], length: int, per_class: int, generator: np.random.Generator
) -> LabelledWindows:
    """Sample windows: a sequence of at least `length` bp, a start and a strand, each uniformly.

    Windows with more than 1 % of unknown bases are sampled again.

    Args:
        sequences_by_class: Tokens of each class.
        length: Window length, bp.
        per_class: Number of windows of each class.
        generator: Source of randomness.

    Raises:
        InputError: a class has no sequence as long as the window.
        UnknownBasesError: a class has hardly any window without unknown bases.
    """
    windows: list[np.ndarray] = []
    for label, sequences in enumerate(sequences_by_class):
        long_enough = [tokens for tokens in sequences if len(tokens) >= length]
        if not long_enough:
            raise InputError(
                f"class number {label + 1} has no sequence of {length} bp for the baselines (its longest is "
                f"{max(map(len, sequences), default=0)} bp): give longer sequences"
            )
        for _ in range(per_class):
            windows.append(_draw_known_window(long_enough, length, label, generator))
    return LabelledWindows(windows, np.repeat(np.arange(len(sequences_by_class)), per_class))


def _draw_known_window(
    sequences: Sequence[np.ndarray], length: int, label: int, generator: np.random.Generator
) -> np.ndarray:
    for _ in range(MAXIMUM_DRAWS_PER_WINDOW):
        tokens = sequences[int(generator.integers(len(sequences)))]
        start = generator.integers(len(tokens) - length + 1)
        window = tokens[start : start + length]
        unknown = np.count_nonzero((window < FIRST_BASE_TOKEN) | (window > FIRST_BASE_TOKEN + 3))
        if unknown <= MAXIMUM_UNKNOWN_FRACTION * length:
            return window if generator.random() < 0.5 else COMPLEMENT_IDS[window[::-1]]
    raise UnknownBasesError(
        f"class number {label + 1} has hardly any window of {length} bp with at most "
        f"{MAXIMUM_UNKNOWN_FRACTION:.0%} unknown bases: give sequences with fewer N"
    )


@dataclass(frozen=True)
class SetAside:
    """Two disjoint parts of the training sequences: for fitting candidates, and for choosing between them."""

    fitting: list[list[np.ndarray]]
    choosing: list[list[np.ndarray]]


def set_aside(
    sequences_by_class: Sequence[Sequence[np.ndarray]],
    sequence_names: Sequence[Sequence[str]] | None,
    generator: np.random.Generator,
) -> SetAside:
    """Set aside whole sequences for validation, about a quarter of each class, in random order.

    Sequences with the same name are set aside together in all classes, because chromosomes of the same name in two
    strains or species are mostly homologous, and a candidate that overfits one must not be rewarded on the other. If
    all sequences of a class have the same name (a single bacterial chromosome), the last quarter of each is used.

    Args:
        sequences_by_class: Tokens of each class.
        sequence_names: Names in the same order; without names every sequence is treated separately.
        generator: Source of randomness.
    """
    if sequence_names is None:
        sequence_names = [
            [f"{label}:{index}" for index in range(len(sequences))]
            for label, sequences in enumerate(sequences_by_class)
        ]
    bases_by_class: list[dict[str, int]] = []
    for names, sequences in zip(sequence_names, sequences_by_class, strict=True):
        bases: dict[str, int] = {}
        for name, tokens in zip(names, sequences, strict=True):
            bases[name] = bases.get(name, 0) + len(tokens)
        bases_by_class.append(bases)

    chosen: set[str] = set()
    all_names = sorted({name for bases in bases_by_class for name in bases})
    for index in generator.permutation(len(all_names)):
        candidate = all_names[index]
        concerned = [bases for bases in bases_by_class if candidate in bases]
        if any(_is_short(bases, chosen) for bases in concerned) and all(
            set(bases) - chosen - {candidate} for bases in concerned
        ):
            chosen.add(candidate)

    fitting, choosing = [], []
    for names, sequences in zip(sequence_names, sequences_by_class, strict=True):
        kept = [tokens for name, tokens in zip(names, sequences, strict=True) if name not in chosen]
        aside = [tokens for name, tokens in zip(names, sequences, strict=True) if name in chosen]
        if not aside:
            boundaries = [round(len(tokens) * (1 - SET_ASIDE_FRACTION)) for tokens in kept]
            aside = [tokens[boundary:] for tokens, boundary in zip(kept, boundaries, strict=True)]
            kept = [tokens[:boundary] for tokens, boundary in zip(kept, boundaries, strict=True)]
        fitting.append(kept)
        choosing.append(aside)
    return SetAside(fitting, choosing)


def _is_short(bases: dict[str, int], chosen: set[str]) -> bool:
    """Whether less than the required fraction of this class has been chosen so far."""
    return sum(count for name, count in bases.items() if name in chosen) < SET_ASIDE_FRACTION * sum(bases.values())
