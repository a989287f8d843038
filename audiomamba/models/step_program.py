"""A waveform model as a program of native steps: generation without calls between samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn

from audiomamba.data.clock import NO_CLOCK
from audiomamba.data.labels import UNLABELLED
from audiomamba.models.blocks import FeedForwardBlock
from audiomamba.models.waveform_model import Scale, ScaleState, WaveformModel, WaveformState
from mambacore.backends import native_library_for
from mambacore.layers import ResidualBlock
from mambacore.layers.plain_modules import is_plain, operators_are_watched
from mambacore.layers.step_program import ADD, COPY, EMBED, FOLD, GROUP, STEP_DTYPES, UNFOLD, StepProgram, can_step
from mambacore.native_library import Library

_KNOWN_MODULES: Final = ("torch.nn.modules.", "mambacore.layers.", "audiomamba.models.")
"""Where what a program computes is defined."""


def steps_library(model: WaveformModel) -> Library | None:
    """The native library when it can run the whole of this model step by step, else None.

    That is as long as nothing is hung on the model that its steps would bypass: hooks, adapters, subclasses.
    """
    weight = model.head.weight
    blocks = [block for module in model.modules() if isinstance(module, Scale) for block in (*module.down, *module.up)]
    fits = (
        weight.dtype in STEP_DTYPES
        and not torch.is_autocast_enabled(weight.device.type)
        and not operators_are_watched()
        and model.embedding.max_norm is None
        and all(isinstance(block, FeedForwardBlock) or can_step(block) for block in blocks)
        and all(
            is_plain(part, type(part)) and type(part).__module__.startswith(_KNOWN_MODULES) for part in model.modules()
        )
    )
    return native_library_for(weight) if fits else None


def versions_of(model: WaveformModel) -> tuple[tuple[int, int], ...]:
    """What differs once a parameter of a model has been trained on, loaded or replaced."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())


class WaveformSteps:
    """A model as it is now, ready for steps.

    Args:
        model: one for which `steps_library` gives a library.
        library: that one.
        weight_format: see `mambacore.layers.step_program.StepProgram`.

    Attributes:
        weights_read: `versions_of` the model, which the steps are a copy of.
    """

    def __init__(self, model: WaveformModel, library: Library, weight_format: str | None = None) -> None:
        self.library, self.weights_read = library, versions_of(model)
        self.classes = model.config.quantiser.classes
        self.program = StepProgram(model.head.weight.dtype, weight_format)
        self._scales: list[_ScalePlaces] = []
        self._label_embedding, self._clock_embedding = model.label_embedding, model.clock_embedding
        self._label_sets = len(model.config.label_sets)
        self._conditions: list[int] = []  # per depth, where a clip's vectors lie: memory that no step writes to
        width = model.config.model_width
        entrance, self.logits = self.program.place(width), self.program.place(self.classes)
        self.program.add(EMBED, [model.embedding.weight], target=entrance, width=width)
        self._scale(model.scales, model, 0, 1, entrance)
        self.program.norm(model.final_norm, entrance, entrance)
        self.program.linear(model.head, entrance, self.logits)

    def _scale(self, scale: Scale, model: WaveformModel, depth: int, period: int, hidden: int) -> None:
        """The operations of a depth, in place on `hidden`; `period` samples make one of its positions."""
        program, width = self.program, model.config.width(depth)
        places = _ScalePlaces()
        self._scales.append(places)
        if self._label_embedding is not None or self._clock_embedding is not None:
            self._conditions.append(program.place(width))
            program.add(ADD, source=self._conditions[-1], target=hidden, width=width)
        skips = [program.place(width)]
        program.add(COPY, source=hidden, target=skips[0], width=width)
        if scale.deeper is None:
            places.up = self._blocks(scale.up, hidden)
            program.add(ADD, source=skips[0], target=hidden, width=width)
            return
        for block in scale.down:
            places.down += self._blocks([block], hidden)
            skips.append(program.place(width))
            program.add(COPY, source=hidden, target=skips[-1], width=width)
        factor, coarse_width = scale.down_pooling.factor, model.config.width(depth + 1)
        places.partial, places.current = program.place(factor * width), program.place(factor * width)
        received, coarse = program.place(width), program.place(coarse_width)
        group: dict[str, Any] = {"period": period, "factor": factor}
        # What the group before this one knew, before it is replaced by what this one knows; and before anything is
        # written to its inputs, for up to here another thread may work on it.
        program.add(UNFOLD, source=places.current, target=received, width=width, **group)
        program.add(FOLD, source=hidden, target=places.partial, width=width, **group)
        complete = program.add(GROUP, **group)
        program.linear(scale.down_pooling.linear, places.partial, coarse)
        self._scale(scale.deeper, model, depth + 1, period * factor, coarse)
        program.linear(scale.up_pooling.linear, coarse, places.current)
        program.end_group(complete)
        # `hidden` is the last of the skips itself.
        program.add(ADD, source=received, target=hidden, width=width)
        if scale.is_unet:
            for block, skip in zip(scale.up, reversed(skips[:-1]), strict=True):
                places.up += self._blocks([block], hidden)
                program.add(ADD, source=skip, target=hidden, width=width)
        else:
            program.add(COPY, source=hidden, target=skips[0], width=width)
            places.up = self._blocks(scale.up, hidden)
            program.add(ADD, source=skips[0], target=hidden, width=width)

    def _blocks(self, blocks: nn.ModuleList | list[nn.Module], hidden: int) -> list[int | None]:
        """The operations of blocks; where their states are, None for a block that has none."""
        places: list[int | None] = []
        for block in blocks:
            if isinstance(block, FeedForwardBlock):
                self.program.feed_forward(block.norm, block.input_projection, block.output_projection, hidden)
                places.append(None)
            else:
                assert isinstance(block, ResidualBlock)  # see `steps_library`
                places.append(self.program.block(block, hidden))
        return places

    @torch.no_grad()
    def memory(self, batch: int, state: WaveformState | None = None) -> Tensor:
        """The memories (batch, numbers) of sequences with this state; None at the start without labels and clock."""
        memory = torch.zeros(batch, self.program.memory_size, dtype=self.program.dtype)
        labels, clock = (None, None) if state is None else (state.labels, state.clock)
        if labels is None:
            labels = torch.full((batch, self._label_sets), UNLABELLED)
        if clock is None:
            clock = torch.full((batch, 2), NO_CLOCK)
        self._condition(memory, labels, clock[:, :1], clock[:, 1:])
        if state is not None and state.scales is not None:
            for places, scale in zip(self._scales, state.scales, strict=True):
                self._write(memory, places, scale)
        return memory

    def _condition(self, memory: Tensor, labels: Tensor, durations: Tensor, positions: Tensor) -> None:
        """Write what a clip is conditioned on at (batch, 1) positions; the next steps add it to their sequences."""
        by_label = None if self._label_embedding is None else self._label_embedding(labels)
        embedding = self._clock_embedding
        bins = None if embedding is None else embedding.bins_at(durations, positions)
        for depth, place in enumerate(self._conditions):
            parts = [] if by_label is None else [by_label[depth]]
            if embedding is not None and bins is not None:
                parts.append(embedding.vectors(bins, labels, depth))
            found = sum(parts[1:], parts[0]).squeeze(1)
            memory[:, place : place + found.shape[-1]] = found

    def _write(self, memory: Tensor, places: _ScalePlaces, scale: ScaleState) -> None:
        for place, state in zip((*places.down, *places.up), (*scale.down, *scale.up), strict=True):
            if place is not None:
                self.program.write_state(memory, place, state)
        if scale.down_pooling is not None and scale.up_pooling is not None:
            partial, current = scale.down_pooling.partial.flatten(1), scale.up_pooling.current.flatten(1)
            memory[:, places.partial : places.partial + partial.shape[1]] = partial
            memory[:, places.current : places.current + current.shape[1]] = current

    def run(
        self,
        memory: Tensor,
        tokens: Tensor,
        position: int,
        uniforms: Tensor | None = None,
        given: Tensor | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        guidance: float | None = None,
        conditions: tuple[Tensor | None, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `mambacore.layers.step_program.StepProgram.run`, bin after bin of the clock.

        Args:
            conditions: labels (batch, label sets), and durations (batch,) of the clocks in samples; needed for
                a model with a clock whose steps are in more than one bin.
        """
        count = (uniforms if given is None else given).shape[1]  # type: ignore[union-attr]
        found = []
        for first, last in self._stretches(position, count, conditions):
            if conditions is not None:
                labels, durations = conditions
                if labels is None:
                    labels = torch.full((len(memory), self._label_sets), UNLABELLED)
                with torch.no_grad():
                    self._condition(memory, labels, durations.unsqueeze(1), torch.full((len(memory), 1), first))
            here = slice(first - position, last - position)
            found.append(
                self.program.run(
                    self.library, memory, tokens, position=first, logits=self.logits, classes=self.classes,
                    uniforms=None if uniforms is None else uniforms[:, here],
                    given=None if given is None else given[:, here],
                    temperature=temperature, top_p=top_p, guidance=guidance,
                )
            )  # fmt: skip
        if len(found) == 1:
            return found[0]
        drawn, log_likelihoods = zip(*found, strict=True)
        return torch.cat(drawn, dim=1), torch.cat(log_likelihoods, dim=1)

    def _stretches(
        self, position: int, count: int, conditions: tuple[Tensor | None, Tensor] | None
    ) -> list[tuple[int, int]]:
        """The steps from `position` on, cut where the bin of any clip changes."""
        end = position + count
        if self._clock_embedding is None or conditions is None or count == 0:
            return [(position, end)]
        period = self._clock_embedding.periods[-1]
        starts = torch.arange(position // period * period, end, period)
        bins = self._clock_embedding.bins_at(conditions[1].unsqueeze(1), starts)
        changed = (bins[:, 1:] != bins[:, :-1]).any(0)
        cuts = [position, *starts[1:][changed].tolist(), end]
        return list(pairwise(cuts))


class _ScalePlaces:
    """Where the states of a depth are."""

    def __init__(self) -> None:
        self.down: list[int | None] = []
        self.up: list[int | None] = []
        self.partial = 0
        self.current = 0
