"""Generating waveforms, and going on with given ones.

A clip is a function of the model, the seed and its number: it is the same alone, in a batch, in any order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiomamba.data.quantisers import Quantiser
from audiomamba.data.waveforms import Waveform, read_header, read_waveform, resample
from audiomamba.models import WaveformModel, load_waveform_model
from audiomamba.models.step_program import WaveformSteps, steps_library
from audiomamba.models.waveform_model import PIECE_POSITIONS
from mambacore.errors import InputError
from mambacore.models.sampling import check_sampling
from mambacore.state import map_state

SAMPLES_AT_ONCE: Final = 1024
"""Steps between two reports of progress, and between two moments at which a run can be interrupted."""

LONGEST_SECONDS: Final = 3600
"""A clip is held in memory until it is whole, 16 bytes per sample: 0.9 GB for an hour at 16 kHz."""


class GeneratedClips(NamedTuple):
    """Clips, each with its prompt in front where there was one."""

    classes: Tensor  # (clips, samples), int64
    log_likelihoods: Tensor  # (clips, generated samples), float64: nats, under the model as it is
    quantiser: Quantiser
    numbers: tuple[int, ...]  # of the clips: with the seed, what they are a function of
    seconds_taken: float  # by the steps, without reading the prompt

    @property
    def samples(self) -> Tensor:
        """(clips, samples), float32, from -full_scale to full_scale."""
        return self.quantiser.decode(self.classes)

    @property
    def bits_per_sample(self) -> Tensor:
        """(clips,), float64: how surprising each clip is to the model; low ones are likely."""
        return -self.log_likelihoods.mean(1) / np.log(2)

    @property
    def samples_per_second(self) -> float:
        """How fast they were generated, all together."""
        return self.log_likelihoods.numel() / max(self.seconds_taken, 1e-9)

    @property
    def real_time_factor(self) -> float:
        """Seconds of sound per second of work, all clips together: 1 and above keeps up with a player."""
        return self.samples_per_second / self.quantiser.sample_rate_hz


class WaveformGenerator:
    """A model that generates.

    Args:
        model: on the CPU its selective, S4D and feed-forward layers run as native steps; anything else through PyTorch.
    """

    def __init__(self, model: WaveformModel) -> None:
        self.model = model.eval()
        self.quantiser = model.config.quantiser
        library = steps_library(model)
        self._steps = None if library is None else WaveformSteps(model, library)

    @property
    def is_native(self) -> bool:
        """Whether thousands of steps are one call."""
        return self._steps is not None

    def generate(
        self,
        clips: int = 1,
        seconds: float = 1.0,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        *,
        prompt: Tensor | None = None,
        first_clip: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> GeneratedClips:
        """Draw clips sample by sample.

        Args:
            clips: how many, generated side by side.
            seconds: how long each is, without the prompt.
            seed: from 0 to 2^64 - 1.
            temperature: logits are divided by it; 0 takes the likeliest sample.
            top_p: draw among the fewest classes whose probabilities add up to this much.
            prompt: (samples,) classes that every clip begins with; read in parallel, not step by step.
            first_clip: number of the first clip; (seed, number) says which random numbers it is drawn with.
            progress: called with how many samples, over all clips, were added.

        Raises:
            InputError: numbers that make no sense.
        """
        check_sampling(temperature, top_p)
        if clips < 1:
            raise InputError(f"{clips} clips were asked for; ask for at least one")
        if not 0 < seconds <= LONGEST_SECONDS:
            raise InputError(f"clips of {seconds} seconds were asked for; ask for more than 0 and at most an hour")
        if not 0 <= seed < 2**64:
            raise InputError(f"the seed is {seed}; use a whole number from 0 to 2^64 - 1")
        count = max(1, round(seconds * self.quantiser.sample_rate_hz))
        numbers = tuple(range(first_clip, first_clip + clips))
        streams = [_stream(seed, number) for number in numbers]
        known = torch.full((1, 1), self.quantiser.middle_class)
        if prompt is not None:
            known = torch.cat([known, prompt.long().unsqueeze(0)], dim=1)
        before = known.shape[1] - 1
        classes = torch.empty(clips, before + count, dtype=torch.int64)
        likelihoods = torch.empty(clips, count, dtype=torch.float64)
        classes[:, :before] = known[:, 1:]
        with torch.inference_mode():
            walk = self._walk(known, clips, temperature, top_p)
            begin = time.perf_counter()
            for first in range(0, count, SAMPLES_AT_ONCE):
                here = min(SAMPLES_AT_ONCE, count - first)
                uniforms = torch.from_numpy(np.stack([stream.random(here) for stream in streams]))
                drawn, found = walk(uniforms)
                classes[:, before + first : before + first + here] = drawn
                likelihoods[:, first : first + here] = found
                if progress is not None:
                    progress(drawn.numel())
        seconds_taken = time.perf_counter() - begin
        return GeneratedClips(classes, likelihoods, self.quantiser, numbers, seconds_taken)

    def continue_clip(
        self,
        clip: Path | str | Waveform,
        seconds: float = 1.0,
        clips: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> GeneratedClips:
        """Go on with a clip: what comes out begins with it.

        Args:
            clip: a file at the model's rate, or a waveform of any rate, which is resampled.
            seconds, clips, seed, temperature, top_p, progress: see :meth:`generate`.

        Raises:
            InputError: as :meth:`generate`; a file that cannot be read, or one of another rate than the model's.
        """
        return self.generate(
            clips, seconds, seed, temperature, top_p, prompt=self.prompt(clip), progress=progress
        )  # fmt: skip

    def prompt(self, clip: Path | str | Waveform) -> Tensor:
        """(samples,) classes of a clip to go on with.

        Raises:
            InputError: a file that cannot be read, one of another rate than the model's, or one of more than an hour.
        """
        rate = self.quantiser.sample_rate_hz
        if isinstance(clip, Waveform):
            return self.quantiser.encode(resample(clip.samples, clip.sample_rate_hz, rate))
        header = read_header(clip)
        if header.sample_rate_hz != rate:
            raise InputError(
                f"{clip} has {header.sample_rate_hz} Hz but the model {rate} Hz; resample the clip to the model's rate "
                "first"
            )
        if header.seconds > LONGEST_SECONDS:
            raise InputError(f"{clip} lasts {header.seconds / 3600:.1f} hours; cut it to at most one to go on with it")
        return self.quantiser.encode(read_waveform(clip).samples)

    def _walk(
        self, known: Tensor, clips: int, temperature: float, top_p: float
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Read all but the last of the (1, samples) known classes; what then steps with (clips, count) uniforms."""
        device = self.model.head.weight.device
        state = None
        if known.shape[1] > 1:
            # Of a long prompt only the states are kept between the pieces, not what the head would read.
            for piece in known[:, :-1].split(PIECE_POSITIONS, dim=1):
                _, state = self.model.hidden(piece.to(device), state)
        if self._steps is not None:
            steps, memory = self._steps, self._steps.memory(1, state).expand(clips, -1).contiguous()
            tokens, position = known[:, -1].repeat(clips), known.shape[1] - 1

            def native(uniforms: Tensor) -> tuple[Tensor, Tensor]:
                nonlocal position
                found = steps.run(memory, tokens, position, uniforms, temperature=temperature, top_p=top_p)
                position += uniforms.shape[1]
                return found

            return native

        held = state if state is None else repeated(state, clips)
        token = known[:, -1:].expand(clips, 1).to(device)

        def composed(uniforms: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal held, token
            drawn, found = [], []
            for uniform in uniforms.unbind(1):
                logits, held = self.model(token, held)
                chosen, likelihood = draw(logits[:, 0], uniform.to(device), temperature, top_p)
                token = chosen.unsqueeze(1)
                drawn.append(chosen.cpu())
                found.append(likelihood.cpu())
            return torch.stack(drawn, dim=1), torch.stack(found, dim=1)

        return composed


def draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One class per row, by its cumulative probabilities, as the native steps draw it.

    Args:
        logits: (batch, classes).
        uniforms: (batch,), from 0 to below 1: the same number draws the same class.
        temperature, top_p: see :meth:`WaveformGenerator.generate`.

    Returns:
        Classes (batch,) and their log-likelihoods (batch,) by the logits as they are.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    logits = logits.to(wide)
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
        if top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            ordered = torch.where(before < top_p, ordered, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        sums = probabilities.cumsum(-1)
        wanted = uniforms.to(wide).unsqueeze(-1) * sums[:, -1:]
        # The last class that may be drawn, should rounding find no sum above what is wanted.
        last = (probabilities > 0).cumsum(-1).argmax(-1)
        chosen = torch.minimum((sums <= wanted).sum(-1), last)
    return chosen, torch.log_softmax(logits, -1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def load(folder: Path | str) -> WaveformGenerator:
    """A generator from a model folder, or from ``hf://owner/name@revision`` on the Hugging Face Hub.

    Raises:
        InputError: as :func:`audiomamba.models.load_waveform_model`.
    """
    return WaveformGenerator(load_waveform_model(folder)[0])


def repeated(state: object, clips: int) -> object:
    """A state of one sequence as that of many."""
    return map_state(lambda tensor: tensor.expand(clips, *tensor.shape[1:]).contiguous(), state)


def _stream(seed: int, number: int) -> np.random.Generator:
    """The random numbers of a clip."""
    key = np.array([seed, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 2]))
