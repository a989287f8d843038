"""Walks through a model sample by sample: native steps, or the model itself; and how each next class is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiomamba.models import WaveformModel, WaveformState
from audiomamba.models.step_program import WaveformSteps
from mambacore.devices import wide_dtype, widened
from mambacore.layers.plain_modules import calls_are_watched
from mambacore.models.captured_step import CapturedStep
from mambacore.models.sampling import sample_tokens, token_log_likelihoods
from mambacore.non_finite import require_numbers

SAMPLE_STREAM: Final = 2
DURATION_STREAM: Final = 5
"""What the random numbers of a clip are for."""

Walk = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(clips, count) uniforms to classes and their log-likelihoods of the same shape, going on from call to call."""


class Sampling(NamedTuple):
    """How the next class is chosen; see `WaveformGenerator.generate`."""

    temperature: float
    top_p: float
    guidance: float

    def choose(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """One class for each clip from the logits of (clips, or twice as many with guidance, classes)."""
        if self.guidance == 1:
            return sample_classes(logits, uniforms, self.temperature, self.top_p)
        labelled, unlabelled = widened(logits).chunk(2)
        guided = unlabelled + self.guidance * (labelled - unlabelled)
        chosen, _ = sample_classes(guided, uniforms, self.temperature, self.top_p)
        return chosen, torch.log_softmax(labelled, -1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


class NativeWalk:
    """Steps of the native program, all that have the same conditions in one call.

    Args:
        state: of (clips, or twice as many with guidance), after all but the last of the known classes.
        known: (1, samples) classes.
    """

    def __init__(
        self, steps: WaveformSteps, rows: int, state: WaveformState | None, known: Tensor, sampling: Sampling
    ) -> None:
        self._steps, self._sampling = steps, sampling
        self._memory = steps.memory(rows, state)
        self._conditions = None if state is None or state.clock is None else (state.labels, state.clock[:, 0])
        self._tokens = known[:, -1].repeat(rows)
        self._position = known.shape[1] - 1

    def __call__(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """(clips, count) uniforms to classes and their log-likelihoods of the same shape."""
        temperature, top_p, guidance = self._sampling
        found = self._steps.run(
            self._memory, self._tokens, self._position, uniforms, temperature=temperature, top_p=top_p,
            guidance=None if guidance == 1 else guidance, conditions=self._conditions,
        )  # fmt: skip
        self._position += uniforms.shape[1]
        return found


class ComposedWalk:
    """Steps of the model itself; on a GPU as captured graphs."""

    def __init__(
        self, model: WaveformModel, state: WaveformState | None, known: Tensor, clips: int, sampling: Sampling
    ) -> None:
        self._device = model.head.weight.device
        copies = 1 if sampling.guidance == 1 else 2

        def advance(uniform: Tensor, carried: tuple[Tensor, WaveformState | None]) -> tuple[tuple[Tensor, ...], object]:
            token, before = carried
            logits, after = model(token.repeat(copies, 1), before)
            chosen, likelihood = sampling.choose(logits[:, 0], uniform)
            return (chosen, likelihood), (chosen.unsqueeze(1), after)

        token = known[:, -1:].expand(clips, 1).to(self._device)
        self._step = CapturedStep(advance, (token, state), self._device, capture=not calls_are_watched(model))

    def __call__(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """(clips, count) uniforms to classes and their log-likelihoods of the same shape."""
        on_device = uniforms.to(wide_dtype(self._device)).to(self._device)
        classes, likelihoods = zip(*(self._step(uniform) for uniform in on_device.unbind(1)), strict=True)
        return torch.stack(classes, dim=1).cpu(), torch.stack(likelihoods, dim=1).cpu()


def sample_classes(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sample one class per row by its cumulative probabilities, as the native steps do.

    Args:
        logits: (batch, classes).
        uniforms: (batch,), from 0 to below 1: the same number gives the same class.
        temperature, top_p: see `WaveformGenerator.generate`.

    Returns:
        Classes (batch,) and their log-likelihoods (batch,) by the logits as they are.
    """
    chosen = sample_tokens(logits, temperature, top_p, uniforms=uniforms)
    return chosen, token_log_likelihoods(logits, chosen)


class Begun(NamedTuple):
    """The checked arguments of a generation."""

    known: Tensor  # (1, 1 + samples of the prompt): the classes that every clip begins with, after the middle class
    length: int  # samples to generate
    rows: Tensor  # (clips times candidates, label sets), numbers of labels
    clocks: Tensor  # (clips times candidates,), int64: durations of the clocks in samples
    sampling: Sampling
    streams: tuple[np.random.Generator, ...]  # the random numbers of each row
    numbers: tuple[int, ...]
    asked: tuple[dict[str, str], ...]  # the labels of each clip
    gain: float

    def pieces(self, walk: Walk, at_once: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where each piece begins, its classes and their log-likelihoods, (clips, samples).

        Raises:
            InputError: if the model computes NaN.
        """
        for first in range(0, self.length, at_once):
            here = min(at_once, self.length - first)
            uniforms = torch.from_numpy(np.stack([stream.random(here) for stream in self.streams]))
            classes, log_likelihoods = walk(uniforms)
            yield first, classes, require_numbers(log_likelihoods, "probabilities")


def random_stream(seed: int, number: int, purpose: int, candidate: int = 0) -> np.random.Generator:
    """Return a random number generator of a clip."""
    key = np.array([seed, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, candidate, purpose]))
