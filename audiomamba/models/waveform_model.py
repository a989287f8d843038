"""The multi-scale waveform model: SaShiMi (arXiv 2202.09729), its U-Net, and the Mamba paper's (2312.00752, 4.4).

samples -> stage 0 -> pool -> stage 1 -> pool -> centre -> pool -> stage 1 -> pool -> stage 0 -> logits
              `----------------`-- skips ----------------------------'           |
              `------------------------------------------------------------------'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomamba.data.clock import NO_CLOCK
from audiomamba.data.labels import UNLABELLED
from audiomamba.models.blocks import stage_blocks
from audiomamba.models.conditions import ClockEmbedding, LabelEmbedding
from audiomamba.models.configuration import WaveformModelConfig
from audiomamba.models.pooling import DownPooling, DownPoolingState, UpPooling, UpPoolingState
from audiomamba.weights import find_model
from mambacore.devices import halve_positions, positions_at_once
from mambacore.errors import InputError
from mambacore.layers import RootMeanSquareNorm, parameters_without_decay
from mambacore.layers.plain_modules import calls_are_watched
from mambacore.model_folder import build_and_load, read_model_folder, training_details, write_model_folder
from mambacore.parallel import active_ranks

MODEL_KIND: Final = "waveform model"

# Without gradients a long waveform is processed in pieces of this many samples (over the batch), so that the skips of
# all blocks fit in memory; a multiple of the usual poolings.
PIECE_POSITIONS = 16384

# Of the tables' first values over the classes, from -1 to 1: radians per unit. The head's start is flat enough that all
# classes are about as likely.
LOWEST_FREQUENCY = 0.5
HIGHEST_FREQUENCY = 60.0
HEAD_DEVIATION = 0.5


class ScaleState(NamedTuple):
    """States of the blocks and the poolings of one depth; at the centre only `up`."""

    down: tuple[Any, ...]  # a state per block of the downsampling path
    down_pooling: DownPoolingState | None
    up_pooling: UpPoolingState | None
    up: tuple[Any, ...]  # a state per block of the upsampling path


class WaveformState(NamedTuple):
    """State of a waveform model."""

    scales: tuple[ScaleState, ...] | None  # one per depth, from the sampling rate to the centre; None at the start
    labels: Tensor | None = None  # (batch, label sets), int64; None for a model without labels
    clock: Tensor | None = None  # (batch, 2), int64: durations and positions; None for a model without a clock


class Scale(nn.Module):
    """One depth of the model: its downsampling and upsampling stages, and everything deeper in between.

    Args:
        config: of the model.
        depth: 0 at the sampling rate.
    """

    def __init__(self, config: WaveformModelConfig, depth: int) -> None:
        super().__init__()
        width, stage = config.width(depth), config.stages[depth]
        self.is_unet = config.blocks_on_the_way_down
        self.deeper = Scale(config, depth + 1) if depth < len(config.pooling) else None
        self.down = nn.ModuleList()
        self.up = stage_blocks(width, stage.mixers(), stage.feed_forward_expansion)
        if self.deeper is not None:
            if self.is_unet:
                self.down = stage_blocks(width, stage.mixers(), stage.feed_forward_expansion)
            factor, coarse_width = config.pooling[depth], config.width(depth + 1)
            self.down_pooling = DownPooling(width, coarse_width, factor)
            self.up_pooling = UpPooling(coarse_width, width, factor)

    def forward(
        self,
        sequence: Tensor,
        scales: tuple[ScaleState, ...] | None = None,
        conditions: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, tuple[ScaleState, ...]]:
        """Run this depth and those below it.

        Args:
            sequence: (batch, length, width).
            scales: the incoming states from this depth on; None at the start.
            conditions: (batch, positions or 1, width of the depth) from this depth on, added to the sequences; None
                for none.

        Returns:
            The same shape as the sequence, and the outgoing states.
        """
        if scales is not None and sequence.shape[1] == 0:
            return sequence, scales  # a step completes a group only now and then: nothing to do below
        if conditions is not None:
            sequence, conditions = sequence + conditions[0], conditions[1:]
        state, below = (None, None) if scales is None else (scales[0], scales[1:])
        if self.deeper is None:
            outputs, up = _walk(self.up, sequence, None if state is None else state.up)
            return outputs + sequence, (ScaleState((), None, None, up),)
        hidden, skips, down = sequence, [sequence], []
        for number, block in enumerate(self.down):
            hidden, block_state = block(hidden, None if state is None else state.down[number])
            skips.append(hidden)
            down.append(block_state)
        coarse, down_pooling = self.down_pooling(hidden, None if state is None else state.down_pooling)
        coarse, below_after = self.deeper(coarse, below, conditions)
        hidden, up_pooling = self.up_pooling(coarse, sequence.shape[1], None if state is None else state.up_pooling)
        hidden = hidden + skips.pop()
        incoming = (None,) * len(self.up) if state is None else state.up
        if self.is_unet:
            up_states = []
            for block, before in zip(self.up, incoming, strict=True):
                hidden, after = block(hidden, before)
                hidden = hidden + skips.pop()  # last in, first out
                up_states.append(after)
            up = tuple(up_states)
        else:
            outputs, up = _walk(self.up, hidden, incoming)
            hidden = outputs + hidden
        return hidden, (ScaleState(tuple(down), down_pooling, up_pooling, up), *below_after)


def _walk(blocks: nn.ModuleList, sequence: Tensor, states: tuple[Any, ...] | None) -> tuple[Tensor, tuple[Any, ...]]:
    """Run a sequence of blocks, each with its state."""
    outgoing = []
    for block, state in zip(blocks, states or (None,) * len(blocks), strict=True):
        sequence, after = block(sequence, state)
        outgoing.append(after)
    return sequence, tuple(outgoing)


def _smooth_over_classes(classes: int, width: int) -> Tensor:
    """(classes, width): first rows of a table for classes in the order of their amplitudes, neighbours nearly alike.

    Column j is a cosine of frequency f_j and a random phase over the classes: random features (Rahimi & Recht 2007),
    whose frequencies are a geometric series, so that distant and neighbouring classes can both be
    distinguished. Mean 0, variance 1.
    """
    place = torch.linspace(-1, 1, classes).unsqueeze(1)
    frequencies = torch.logspace(math.log10(LOWEST_FREQUENCY), math.log10(HIGHEST_FREQUENCY), width)
    return math.sqrt(2) * torch.cos(place * frequencies + 2 * math.pi * torch.rand(width))


class WaveformModel(nn.Module):
    """Predicts the next class of a waveform from all previous ones: `(tokens, state) -> (logits, state)`.

    A model with labels predicts the waveforms that carry them, one with a clock those of a given duration: labels and
    clock are part of the state, so a piece of a clip needs nothing but what the piece before it left.

    Args:
        config: see `audiomamba.models.WaveformModelConfig`.

    Raises:
        InputError: if an option of a mixer is invalid.
    """

    def __init__(self, config: WaveformModelConfig) -> None:
        super().__init__()
        self.config = config
        classes = config.quantiser.classes
        self.embedding = nn.Embedding(classes, config.model_width)
        self.scales = Scale(config, 0)
        self.label_embedding = LabelEmbedding(config) if config.label_sets else None
        self.clock_embedding = ClockEmbedding(config) if config.clock.bins else None
        self.final_norm = RootMeanSquareNorm(config.model_width)
        self.head = nn.Linear(config.model_width, classes)
        # Classes are ordered amplitudes. Tables that reflect this initially save hundreds of steps.
        with torch.no_grad():
            self.embedding.weight.copy_(_smooth_over_classes(classes, config.model_width))
            self.head.weight.copy_(
                _smooth_over_classes(classes, config.model_width) * HEAD_DEVIATION / config.model_width**0.5
            )
            self.head.bias.zero_()

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> WaveformModel:
        """Load a model from a folder, or from `hf://owner/name@revision` on the Hub, in evaluation mode.

        Raises:
            InputError: as `audiomamba.models.load_waveform_model`.
        """
        return load_waveform_model(folder)[0]

    def save_pretrained(self, folder: Path | str, details: Mapping[str, Any] | None = None) -> None:
        """Write a model folder (config.json, model.safetensors and a card) that `from_pretrained` reads."""
        save_waveform_model(Path(folder), self, details=dict(details or {}))

    def labelled_state(self, labels: Tensor | None, clock: Tensor | None = None) -> WaveformState | None:
        """Return the initial state of clips with labels and a clock; what the model does not have is left out.

        Args:
            labels: (batch, label sets), numbers as `audiomamba.data.labels.label_numbers` gives them; None for a start
                without labels.
            clock: (batch, 2), the durations of the clips' sound and the positions at which they begin, both in samples
                (see `audiomamba.data.clock`), the latter rounded down to whole groups of all depths; a duration of 0,
                and None, are a start without a clock.
        """
        labels = None if labels is None or self.label_embedding is None else labels.long()
        clock = None if clock is None or self.clock_embedding is None else self.clock_embedding.begun(clock.long())
        return None if labels is None and clock is None else WaveformState(None, labels, clock)

    def forward(self, tokens: Tensor, state: WaveformState | None = None) -> tuple[Tensor, WaveformState]:
        """Compute the logits of the class after each position.

        Args:
            tokens: (batch, length), classes of the quantiser in any integer dtype. A waveform begins with the middle
                class, after which its first sample is predicted.
            state: state after the previous piece, or `labelled_state`; None at the start of an unlabelled clip.

        Returns:
            Logits (batch, length, classes) and the state for the next piece.
        """
        hidden, state = self.hidden(tokens, state)
        return self.logits(hidden), state

    def hidden(self, tokens: Tensor, state: WaveformState | None = None) -> tuple[Tensor, WaveformState]:
        """Compute the input of the head, (batch, length, model_width), and the state for the next piece.

        Logits of a million samples take a gigabyte: compute them from parts of this.

        Raises:
            InputError: inside `mambacore.parallel.context_parallel`.
        """
        if active_ranks() is not None:
            raise InputError(
                "a waveform model cannot process a sequence that is split over ranks; give each rank whole clips"
            )
        rows, pieces, begin = max(1, tokens.shape[0]), [], 0
        short = tokens.shape[1] <= max(1, PIECE_POSITIONS // rows)
        if torch.is_grad_enabled() or short or calls_are_watched(self):
            return self._hidden(tokens, state)
        while begin < tokens.shape[1]:
            positions = max(1, positions_at_once(tokens.device, PIECE_POSITIONS) // rows)
            try:
                found = self._hidden(tokens[:, begin : begin + positions], state)
            except torch.OutOfMemoryError:
                found = None
            if found is None:  # outside of the handler, which holds on to the memory of what failed
                halve_positions(tokens.device, at_least=PIECE_POSITIONS)
                continue
            pieces.append(found[0])
            state = found[1]
            begin += positions
        assert state is not None  # the waveform is longer than one piece
        return torch.cat(pieces, dim=1), state

    def _hidden(self, tokens: Tensor, state: WaveformState | None) -> tuple[Tensor, WaveformState]:
        scales, labels, clock = WaveformState(None) if state is None else state
        batch, length = tokens.shape
        conditions: tuple[Tensor, ...] | None = None
        if self.label_embedding is not None:
            if labels is None:
                labels = tokens.new_full((batch, len(self.config.label_sets)), UNLABELLED, dtype=torch.int64)
            conditions = self.label_embedding(labels)
        if self.clock_embedding is not None:
            if clock is None:
                clock = tokens.new_full((batch, 2), NO_CLOCK, dtype=torch.int64)
            by_time = self.clock_embedding(clock, labels, self._lengths(length, scales))
            conditions = by_time if conditions is None else tuple(map(torch.add, conditions, by_time))
            clock = torch.stack([clock[:, 0], clock[:, 1] + length], dim=1)
        sequence, scales = self.scales(self.embedding(tokens.long()), scales, conditions)
        return self.final_norm(sequence), WaveformState(scales, labels, clock)

    def _lengths(self, length: int, scales: tuple[ScaleState, ...] | None) -> list[int]:
        """The positions of a piece at each depth: the groups that it completes, counted from the start of the clip."""
        found = [length]
        for depth, factor in enumerate(self.config.pooling):
            pooling = None if scales is None else scales[depth].up_pooling
            found.append(((0 if pooling is None else pooling.phase) + found[-1]) // factor)
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head: (..., model_width) to (..., classes)."""
        return self.head(hidden)

    def loss(
        self, inputs: Tensor, targets: Tensor, state: WaveformState | None = None
    ) -> tuple[Tensor, Tensor, WaveformState]:
        """Compute the negative log-likelihood of a clip or a piece of one.

        Args:
            inputs, targets: (batch, length), as in `audiomamba.data.clips.Example`; a target of -100 is padding.
            state: state after the previous piece, or `labelled_state`; None at the start of an unlabelled clip.

        Returns:
            The negative log-likelihood in nats, summed over all targets except padding (divide it by their number and
            by log 2 for bits per sample), their number, and the state for the next piece.
        """
        hidden, state = self.hidden(inputs, state)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        stretch = max(1, PIECE_POSITIONS // max(1, inputs.shape[0]))
        for read, wanted in zip(hidden.split(stretch, dim=1), targets.split(stretch, dim=1), strict=True):
            logits = self.logits(read).flatten(0, 1).to(total.dtype)
            total = total + F.cross_entropy(logits, wanted.flatten().long(), reduction="sum")
        return total, (targets >= 0).sum(), state

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer groups: weight decay for matrices, none for norms, biases, embeddings and the dynamics."""
        embeddings = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        spared = {id(parameter) for parameter in (*parameters_without_decay(self), *embeddings)}
        decaying = [parameter for parameter in self.parameters() if parameter.dim() > 1 and id(parameter) not in spared]
        chosen = {id(parameter) for parameter in decaying}
        others = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
        return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def save_waveform_model(folder: Path | str, model: WaveformModel, *, details: Mapping[str, Any]) -> None:
    """Write a model folder (config.json, model.safetensors, README.md) in one step.

    Args:
        folder: the model folder; an earlier model there is replaced.
        details: JSON-serialisable training details.

    Raises:
        InputError: if the folder contains something else, or cannot be written.
    """
    config = {"kind": MODEL_KIND, "model": model.config.to_dict(), "details": dict(details)}
    write_model_folder(Path(folder), config, model.state_dict(), _card(model))


def load_waveform_model(folder: Path | str) -> tuple[WaveformModel, dict[str, Any]]:
    """Read a model folder: the model in evaluation mode, and the details saved with it.

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
    if not isinstance(config.get("model"), dict):
        raise InputError(
            f"{folder}/config.json has no 'model' section; the model folder is damaged, train or copy it again"
        )
    model = build_and_load(
        lambda: WaveformModel(WaveformModelConfig.from_dict(config["model"])),
        {"model": config["model"]},
        tensors,
        folder,
    )
    return model, training_details(config, folder)


def _card(model: WaveformModel) -> str:
    """Return the model card."""
    config, quantiser = model.config, model.config.quantiser
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = ["# Waveform model", ""]
    lines.append(
        f"Predicts waveforms at {quantiser.sample_rate_hz} Hz sample by sample, in {quantiser.classes} classes "
        f"({quantiser.scheme}, full scale {quantiser.full_scale:g}). {parameters:,} parameters."
    )
    lines.append("")
    for depth, stage in enumerate(config.stages):
        names = ", ".join(dict.fromkeys(mixer["name"] for mixer in stage.mixers()))
        where = "centre" if depth == len(config.pooling) else f"depth {depth}"
        lines.append(f"- {where}: {stage.layers} layers per stage ({names}) of width {config.width(depth)}")
    lines += [
        "",
        "    from audiomamba.models import WaveformModel",
        "",
        '    model = WaveformModel.from_pretrained("THIS_FOLDER")',
        "",
    ]
    return "\n".join(lines)
