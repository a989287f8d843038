"""Generation of waveforms, optionally conditioned on labels, and continuation of given ones.

A clip is a function of the model, its labels, the seed and its number: it is the same alone, in a batch, in any order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from audiomamba.candidates import Judge, best_candidates, judge_of
from audiomamba.data.clock import NO_CLOCK
from audiomamba.data.labels import UNLABELLED, LabelSet, check_labels, label_numbers, labels_of_clip
from audiomamba.data.sampling_settings import BY_LIKELIHOOD, SamplingSettings
from audiomamba.data.waveforms import Waveform, read_header, read_waveform, resample
from audiomamba.generated import GeneratedClips, Prompt
from audiomamba.models import WaveformModel, WaveformState, load_waveform_model
from audiomamba.models.clip_classifier import ClipClassifier, load_clip_classifier
from audiomamba.models.step_program import WaveformSteps, steps_library, versions_of
from audiomamba.models.waveform_model import PIECE_POSITIONS
from audiomamba.sampling import (
    DURATION_STREAM,
    SAMPLE_STREAM,
    Begun,
    ComposedWalk,
    NativeWalk,
    Sampling,
    Walk,
    random_stream,
)
from mambacore.devices import available_device
from mambacore.errors import InputError
from mambacore.layers.step_weights import WEIGHT_FORMATS
from mambacore.state import map_state, state_tensors

SAMPLES_AT_ONCE: Final = 1024
"""Steps between two reports of progress, and between two moments at which a run can be interrupted."""

LONGEST_SECONDS: Final = 3600
"""A clip is kept in memory until it is complete, 16 bytes per sample: 0.9 GB for an hour at 16 kHz."""

STREAMED_PIECES_PER_SECOND: Final = 100
"""How often `WaveformGenerator.stream` hands over what has come: a piece lasts 10 ms, which nobody hears as a delay."""


class WaveformGenerator:
    """Generates clips with a waveform model.

    Args:
        model: on the CPU its selective, S4D and feed-forward layers run as native steps; all else in PyTorch.
        weights: what native steps keep the weights of linear layers in: `float32`, `bfloat16`, `int8` (a scale per
            output; their inputs are rounded to 8 bits too) or `mixed` (int8 below a pooling, else bfloat16), which are
            read faster; None for those of the model. Prompts are read with the model's own.

    Raises:
        InputError: if the format is unknown, or weights are to be rounded for a model without native steps.
    """

    def __init__(self, model: WaveformModel, weights: str | None = None) -> None:
        self.model = model.eval()
        self.quantiser = model.config.quantiser
        self._classifiers: dict[str, ClipClassifier] = {}
        self._weights = weights
        self._steps: WaveformSteps | None = None
        self._native_steps()

    @property
    def is_native(self) -> bool:
        """Whether thousands of steps run in one native call."""
        return self._native_steps() is not None

    def _native_steps(self) -> WaveformSteps | None:
        """The native steps of the model as it is now, if it has them."""
        library = steps_library(self.model)
        _check_weights(self._weights, self.model, native=library is not None)
        if library is None:
            return None
        if self._steps is None or self._steps.weights_read != versions_of(self.model):
            self._steps = WaveformSteps(self.model, library, self._weights)
        return self._steps

    @property
    def label_sets(self) -> tuple[LabelSet, ...]:
        """The label sets that the model is conditioned on; empty for an unconditional model."""
        return self.model.config.label_sets

    def generate(
        self,
        clips: int = 1,
        seconds: float = 1.0,
        seed: int = 0,
        temperature: float | None = None,
        top_p: float | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        guidance: float | None = None,
        clock: float | None = None,
        candidates: int | None = None,
        judge: str | None = None,
        prompt: Prompt | Tensor | None = None,
        first_clip: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> GeneratedClips:
        """Generate clips sample by sample.

        `None` for `temperature`, `top_p`, `guidance`, `candidates` or `judge` is what the model suggests
        (`WaveformModelConfig.sampling`); for most models that is 1.

        Args:
            clips: number of clips, generated as a batch.
            seconds: duration of each clip, without the prompt.
            seed: from 0 to 2^64 - 1.
            temperature: logits are divided by it; 0 chooses the most likely class.
            top_p: sample from the smallest set of classes whose probabilities sum to at least this.
            labels: values of label sets to condition on, such as `{"digit": "7"}`; `each` cycles through all values,
                clip by clip. Other sets are left to the model.
            guidance: how far to go from the logits without labels to those with them: 1 samples from the model as it
                was trained, more exaggerates what the labels say (classifier-free guidance; Ho & Salimans, arXiv
                2207.12598), at twice the work.
            clock: seconds from the beginning of a clip, or of its prompt, to the end of its sound, for a model with a
                clock (see `audiomamba.data.clock`); 0 for none. By default the whole of a clip with a prompt; else a
                duration of training clips with these labels, but at most the whole clip.
            candidates: clips to generate for each, of which the one that fits its labels best is kept
                (`audiomamba.candidates.best_candidates`), at so many times the work.
            judge: what fits best is chosen by: `likelihood`, the model's own, or a clip classifier (a folder, or the
                name of a shipped one) that tells the values of one of the label sets asked for apart.
            prompt: what every clip begins with (see `prompt`), or its (samples,) classes; read in parallel, not step by
                step.
            first_clip: number of the first clip; (seed, number) determines its random numbers.
            progress: called with how many samples, over all clips, were added.

        Raises:
            InputError: if a number is out of range, or the model does not have a label.
        """
        settings = self.settings(temperature, top_p, guidance, candidates, judge, labels=labels)
        chooses_by = self._judge(settings, labels or {}, suggested=judge is None)
        begun = self._begin(clips, seconds, seed, labels, settings, clock, prompt, first_clip)
        candidates = settings.candidates
        before = begun.known.shape[1] - 1
        classes = torch.empty(clips * candidates, before + begun.length, dtype=torch.int64)
        likelihoods = torch.empty(clips * candidates, begun.length, dtype=torch.float64)
        classes[:, :before] = begun.known[:, 1:]
        with torch.inference_mode():
            walk = self._walk(begun)
            begin = time.perf_counter()
            for first, chosen, found in begun.pieces(walk, SAMPLES_AT_ONCE):
                classes[:, before + first : before + first + chosen.shape[1]] = chosen
                likelihoods[:, first : first + chosen.shape[1]] = found
                if progress is not None:
                    progress(chosen.numel())
            if candidates > 1:
                each = classes.unflatten(0, (clips, candidates))
                rows, clocks = begun.rows[::candidates], begun.clocks[::candidates]
                best = best_candidates(self.model, each, rows, clocks, chooses_by)
                kept = torch.arange(clips) * candidates + best
                classes, likelihoods = classes[kept], likelihoods[kept]
        seconds_taken = time.perf_counter() - begin
        return GeneratedClips(
            classes, likelihoods, self.quantiser, begun.numbers, seconds_taken, begun.asked, begun.gain
        )

    def stream(
        self,
        seconds: float = 1.0,
        seed: int = 0,
        temperature: float | None = None,
        top_p: float | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        guidance: float | None = None,
        clock: float | None = None,
        prompt: Prompt | Tensor | None = None,
        number: int = 0,
        samples_at_once: int | None = None,
    ) -> Iterator[Tensor]:
        """Generate one clip and yield its samples as they are generated.

        Args:
            seconds, seed, temperature, top_p, labels, guidance, clock, prompt: see `generate`.
            number: number of the clip; (seed, number) determines its random numbers.
            samples_at_once: in a piece; None for those of 10 ms. The clip does not depend on it.

        Returns:
            Pieces of (samples,) float32 that make up the clip that `generate` returns: the prompt, where there is one,
            then what follows it.

        Raises:
            InputError: as `generate`, immediately rather than with the first piece.
        """
        at_once = samples_at_once
        if at_once is None:
            at_once = max(1, self.quantiser.sample_rate_hz // STREAMED_PIECES_PER_SECOND)
        if at_once < 1:
            raise InputError(f"pieces of {at_once} samples were asked for; ask for at least one")
        settings = self.settings(temperature, top_p, guidance, 1, labels=labels)
        begun = self._begin(1, seconds, seed, labels, settings, clock, prompt, number)
        return self._streamed(begun, at_once)

    @torch.inference_mode()
    def _streamed(self, begun: Begun, at_once: int) -> Iterator[Tensor]:
        if begun.known.shape[1] > 1:
            yield self.quantiser.decode(begun.known[0, 1:])
        for _, chosen, _ in begun.pieces(self._walk(begun), at_once):
            yield self.quantiser.decode(chosen[0])

    def settings(
        self,
        temperature: float | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        candidates: int | None = None,
        judge: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
    ) -> SamplingSettings:
        """Return the settings that clips with these labels are sampled with: the model's where none is given.

        Raises:
            InputError: if a value is out of range, or needs labels and there are none.
        """
        stored = self.model.config.sampling
        return stored.chosen(temperature, top_p, guidance, candidates, judge, labelled=bool(labels))

    def _judge(self, settings: SamplingSettings, labels: Mapping[str, str], suggested: bool) -> Judge | None:
        """The classifier that candidates are compared by; one that is only suggested may know none of the labels.

        Raises:
            InputError: if it cannot be read, or was chosen and knows none of the labels asked for.
        """
        if settings.candidates == 1 or settings.judge == BY_LIKELIHOOD:
            return None
        if settings.judge not in self._classifiers:
            classifier = load_clip_classifier(settings.judge)[0].to(self.model.head.weight.device)
            self._classifiers[settings.judge] = classifier
        judge = judge_of(self._classifiers[settings.judge], self.label_sets, labels)
        if judge is None and not suggested:
            raise InputError(
                f"{settings.judge} tells none of the labels apart that were asked for ({', '.join(labels)}); choose "
                f"another judge, or {BY_LIKELIHOOD}"
            )
        return judge

    def gain(self, prompt: Prompt | None = None) -> float:
        """Return the gain of samples relative to recordings: that of the prompt, or the typical one in training."""
        return self.model.config.preparation.typical_gain if prompt is None else prompt.gain

    def _begin(
        self,
        clips: int,
        seconds: float,
        seed: int,
        labels: Mapping[str, str] | None,
        settings: SamplingSettings,
        clock: float | None,
        prompt: Prompt | Tensor | None,
        first_clip: int,
    ) -> Begun:
        """Check the other arguments of a generation; each clip has as many rows as candidates.

        Raises:
            InputError: see `generate`.
        """
        if clips < 1:
            raise InputError(f"{clips} clips were asked for; ask for at least one")
        if not 0 < seconds <= LONGEST_SECONDS:
            raise InputError(f"clips of {seconds} seconds were asked for; ask for more than 0 and at most an hour")
        if not 0 <= seed < 2**64:
            raise InputError(f"the seed is {seed}; use an integer from 0 to 2^64 - 1")
        check_labels(labels or {}, self.label_sets)
        numbers = tuple(range(first_clip, first_clip + clips))
        asked = tuple(labels_of_clip(labels or {}, self.label_sets, number) for number in numbers)
        rows = torch.tensor([label_numbers(one, self.label_sets) for one in asked]).view(clips, len(self.label_sets))
        known = torch.full((1, 1), self.quantiser.middle_class)
        begun = prompt if isinstance(prompt, Prompt) or prompt is None else Prompt(prompt, self.gain())
        if begun is not None:
            known = torch.cat([known, begun.classes.long().unsqueeze(0)], dim=1)
        length = max(1, round(seconds * self.quantiser.sample_rate_hz))
        clocks = [
            self._clock_samples(clock, known.shape[1] - 1, length, row, random_stream(seed, number, DURATION_STREAM))
            for row, number in zip(rows.tolist(), numbers, strict=True)
        ]
        return Begun(
            known=known,
            length=length,
            rows=rows.repeat_interleave(settings.candidates, 0),
            clocks=torch.tensor(clocks).repeat_interleave(settings.candidates),
            sampling=Sampling(settings.temperature, settings.top_p, settings.guidance),
            streams=tuple(
                random_stream(seed, number, SAMPLE_STREAM, candidate)
                for number in numbers
                for candidate in range(settings.candidates)
            ),
            numbers=numbers,
            asked=asked,
            gain=self.gain(begun),
        )

    def _clock_samples(
        self, clock: float | None, before: int, length: int, labels: list[int], stream: np.random.Generator
    ) -> int:
        """The duration of a clip's clock in samples.

        Args:
            clock: as in `generate`.
            before, length: samples of the prompt, and to be generated.
            labels: numbers of the clip's labels.
            stream: random numbers for the duration.

        Raises:
            InputError: see `generate`.
        """
        config = self.model.config
        if clock is not None:
            if not config.clock.bins:
                raise InputError("the model was trained without a clock; leave it out")
            if not 0 <= clock <= LONGEST_SECONDS:
                raise InputError(f"the clock runs for {clock:g} seconds; use 0 (no clock) to an hour")
            return round(clock * config.quantiser.sample_rate_hz)
        if not config.clock.bins:
            return NO_CLOCK
        if before:
            return before + length
        seconds = config.clock.typical_seconds(labels, stream.random(2).tolist())
        return min(length, max(1, round(seconds * config.quantiser.sample_rate_hz)))

    def continue_clip(
        self,
        clip: Path | str | Waveform,
        seconds: float = 1.0,
        clips: int = 1,
        seed: int = 0,
        temperature: float | None = None,
        top_p: float | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        guidance: float | None = None,
        clock: float | None = None,
        candidates: int | None = None,
        judge: str | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> GeneratedClips:
        """Continue a clip; the results begin with it.

        Args:
            clip: a file at the model's rate, or a waveform of any rate, which is resampled.
            seconds, clips, seed, temperature, top_p, labels, guidance, clock, candidates, judge, progress: see
                `generate`.

        Raises:
            InputError: as `generate`, or if the file cannot be read or does not have the model's rate.
        """
        return self.generate(
            clips, seconds, seed, temperature, top_p, labels=labels, guidance=guidance, clock=clock,
            candidates=candidates, judge=judge, prompt=self.prompt(clip), progress=progress,
        )  # fmt: skip

    def prompt(self, clip: Path | str | Waveform) -> Prompt:
        """Read a clip to continue, prepared like the model's training clips.

        Raises:
            InputError: a file that cannot be read, one of another rate than the model's, or one of more than an hour.
        """
        rate = self.quantiser.sample_rate_hz
        preparation = self.model.config.preparation.without_trimming()
        if isinstance(clip, Waveform):
            samples = resample(clip.samples, clip.sample_rate_hz, rate)
        else:
            header = read_header(clip)
            if header.sample_rate_hz != rate:
                raise InputError(
                    f"{clip} has {header.sample_rate_hz} Hz but the model {rate} Hz; resample the clip to the model's "
                    "rate first"
                )
            if header.seconds > LONGEST_SECONDS:
                raise InputError(
                    f"{clip} lasts {header.seconds / 3600:.1f} hours; cut it to at most one to continue it"
                )
            samples = read_waveform(clip).samples
        prepared, gain = preparation.prepared(samples, rate)
        return Prompt(self.quantiser.encode(prepared), gain)

    def _walk(self, begun: Begun) -> Walk:
        """Process all but the last of the known classes, and return a function that steps from there."""
        known, labels, clocks, sampling = begun.known, begun.rows, begun.clocks, begun.sampling
        if sampling.guidance != 1:  # the same clips once more, without labels
            labels = torch.cat([labels, torch.full_like(labels, UNLABELLED)])
            clocks = clocks.repeat(2)
        state = self._read(known[:, :-1], labels, clocks)
        steps = self._native_steps()
        if steps is not None:
            return NativeWalk(steps, len(labels), state, known, sampling)
        return ComposedWalk(self.model, state, known, len(begun.rows), sampling)

    def _read(self, known: Tensor, labels: Tensor, clocks: Tensor) -> WaveformState | None:
        """The state of clips after the (1, samples) classes that all of them begin with.

        Clips with the same labels and clock have one state. Each is read by itself, so that it depends on nothing else.

        Args:
            labels: (clips, label sets).
            clocks: (clips,), durations in samples.
        """
        device = self.model.head.weight.device

        def begin(rows: Tensor) -> WaveformState | None:
            duration = rows[:, -1:]
            clock = torch.cat([duration, torch.zeros_like(duration)], dim=1)
            return self.model.labelled_state(rows[:, :-1].to(device), clock.to(device))

        rows = torch.cat([labels, clocks.unsqueeze(1)], dim=1)
        if known.shape[1] == 0:
            return begin(rows)
        kinds, kind_of = torch.unique(rows, dim=0, return_inverse=True)
        states = []
        for kind in kinds.split(1):
            state = begin(kind)
            # Of a long prompt only the states are kept between the pieces, not what the head would read.
            for piece in known.split(PIECE_POSITIONS, dim=1):
                _, state = self.model.hidden(piece.to(device), state)
            states.append(state)
        parts = [iter(list(state_tensors(state))) for state in states]
        return map_state(
            lambda _: torch.cat([next(part) for part in parts])[kind_of.to(device)].contiguous(), states[0]
        )


def load(folder: Path | str, device: str | torch.device = "cpu", weights: str | None = None) -> WaveformGenerator:
    """Load a generator from a model folder, or from `hf://owner/name@revision` on the Hugging Face Hub.

    Args:
        folder: the model.
        device: device to run on, such as "cpu" or "cuda".
        weights: see `WaveformGenerator`.

    Raises:
        InputError: the device is not available here, or as `audiomamba.models.load_waveform_model` and
            `WaveformGenerator`.
    """
    place = available_device(device)
    return WaveformGenerator(load_waveform_model(folder)[0].to(place), weights)


def _check_weights(weights: str | None, model: WaveformModel, native: bool) -> None:
    if weights is None:
        return
    if weights not in WEIGHT_FORMATS:
        raise InputError(f"the weights {weights!r} are unknown; use {', '.join(WEIGHT_FORMATS)}")
    if not native:
        raise InputError(f"weights in {weights} are for native steps, which this model has not; leave them out")
    if model.head.weight.dtype == torch.float64:
        raise InputError(f"weights in {weights} are for models in float32, and this one is in float64; leave them out")
