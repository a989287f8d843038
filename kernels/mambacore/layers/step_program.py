"""Whole models as programs of native operations, so that thousands of steps are one call (generation_kernel.cpp).

A program works on the memory of each sequence, one row of numbers in which every state and every activation has its
place. It is made once from a model's modules; what it needs of their parameters is copied and laid out anew, so a model
that is trained on needs another program.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from mambacore.backends import ELEMENT_TYPES, compute_dtype
from mambacore.contracts import Expected, check_devices, check_shapes
from mambacore.layers.dual_steps import (
    DualState,
    mamba2_operation,
    mamba3_operation,
    state_from,
    state_numbers,
)
from mambacore.layers.gated_norm import GroupedRootMeanSquareNorm, is_plain_norm_after_gate
from mambacore.layers.mamba2 import Mamba2Mixer, Mamba2State
from mambacore.layers.mamba3 import Mamba3Mixer, Mamba3State
from mambacore.layers.norm import RootMeanSquareNorm
from mambacore.layers.plain_modules import is_plain
from mambacore.layers.s4d import S4DMixer, S4DState
from mambacore.layers.selective import SELECTED, SelectiveMixer, SelectiveState, as_complex
from mambacore.layers.stack import ResidualBlock
from mambacore.layers.step_layout import PADDING, channels_last, padded
from mambacore.layers.step_weights import WEIGHT_FORMATS, in_parts, panels, weight_dtype
from mambacore.native_library import Generation, Library, StepOperation

EMBED, NORM, LINEAR, COPY, ADD, SELECTIVE, S4D, FEED_FORWARD, FOLD, UNFOLD, GROUP, MAMBA2, MAMBA3 = range(13)
# Which weights of an operation are those of linear layers, by their number, and of how many parts each is; the others
# are numbers per channel. Biases of several parts are padded like them.
MATRICES: Final = {
    LINEAR: {0: 1}, SELECTIVE: {1: 2, 5: 1, 6: 1, 11: 1}, S4D: {8: 2}, FEED_FORWARD: {1: 1, 3: 1},
    MAMBA2: {1: 1, 10: 1}, MAMBA3: {1: 1, 11: 1},
}  # fmt: skip
BIASES_OF_PARTS: Final = {SELECTIVE: {2: 2}, S4D: {9: 2}}
# From a selective layer's step rank to its channels: few inputs, which decide how fast states fade, so never rounded.
NEVER_ROUNDED: Final = {SELECTIVE: (6,)}
BlockState = SelectiveState | S4DState | DualState
STEP_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16)

_INT8_ELEMENT: Final = 3  # MAMBACORE_INT8


# What a block with an operation is made of, hooks and subclasses excluded.
_PARTS: Final = (
    ResidualBlock, SelectiveMixer, S4DMixer, Mamba2Mixer, Mamba3Mixer, RootMeanSquareNorm, GroupedRootMeanSquareNorm,
    nn.Linear, nn.Dropout,
)  # fmt: skip


def can_step(block: nn.Module) -> bool:
    """Whether a residual block has an operation, and nothing is hung on it that the operation would bypass."""
    if not isinstance(block, ResidualBlock) or block.feed_forward is not None:
        return False
    if not all(type(part) in _PARTS and is_plain(part, type(part)) for part in block.modules()):
        return False
    mixer = block.mixer
    if not isinstance(mixer, _PARTS[1:5]) or block.drops_channels:
        return False
    if isinstance(mixer, SelectiveMixer) and mixer.selective != SELECTED:
        return False
    if isinstance(mixer, Mamba2Mixer):
        return is_plain_norm_after_gate(mixer.gate_norm, mixer.groups)
    return not isinstance(mixer, Mamba3Mixer) or mixer.has_native_step


class StepProgram:
    """Operations in order, and the places of what they work on.

    Args:
        dtype: of the model: float32, float64 or bfloat16. Weights of linear layers are kept in it; everything else, the
            memory included, is in float32, or float64 for float64.
        weight_format: one of `mambacore.layers.step_weights.WEIGHT_FORMATS`, to round the weights of linear layers to;
            None keeps them as they are.

    Attributes:
        memory_size: numbers in the memory of a sequence, so far.

    Raises:
        ValueError: a format that is unknown, or not for a model of this dtype.
    """

    def __init__(self, dtype: torch.dtype, weight_format: str | None = None) -> None:
        self.dtype, self._model_dtype = compute_dtype(dtype), dtype
        self.weight_format = weight_format
        if weight_format is not None:
            if weight_format not in WEIGHT_FORMATS:
                raise ValueError(f"weight_format is {weight_format!r}; use one of {', '.join(WEIGHT_FORMATS)}")
            if self.dtype != torch.float32:
                raise ValueError(f"weights in {weight_format} are for models in float32 or bfloat16, not {dtype}")
        self.memory_size = 0
        self._operations: list[StepOperation] = []
        self._kept: list[Tensor] = []  # what the operations point at
        self._tokens = 0  # how many tokens every embedding knows
        self._open_groups = 0

    @property
    def weight_dtype(self) -> torch.dtype:
        """What the weights of linear layers that are added now are kept in."""
        if self.weight_format is None:
            return self._model_dtype
        return weight_dtype(self.weight_format, in_group=self._open_groups > 0)

    def place(self, width: int) -> int:
        """Room for so many numbers, which start as zeros."""
        offset = self.memory_size
        self.memory_size += padded(width)
        return offset

    def add(self, kind: int, weights: Sequence[Tensor | None] = (), **values: float) -> int:
        """One more operation; returns its number."""
        element = _INT8_ELEMENT if self.weight_dtype == torch.int8 else ELEMENT_TYPES[self.weight_dtype]
        operation = StepOperation(kind=kind, weight_element=element, **values)
        if kind == EMBED:
            assert weights[0] is not None  # an embedding is its weight
            self._tokens = min(self._tokens or len(weights[0]), len(weights[0]))
        if kind == GROUP:
            self._open_groups += 1
        for number, weight in enumerate(weights):
            if weight is not None:
                kept = self._laid_out(kind, number, weight)
                self._kept.append(kept)
                operation.weights[number] = kept.data_ptr()
        self._operations.append(operation)
        return len(self._operations) - 1

    def _laid_out(self, kind: int, number: int, weight: Tensor) -> Tensor:
        """A copy as the kernel reads it, also of what is so already: training goes on in place."""
        parts = MATRICES.get(kind, {}).get(number)
        if parts is None:
            kept = weight.detach().to(self.dtype, memory_format=torch.contiguous_format, copy=True)
            parts = BIASES_OF_PARTS.get(kind, {}).get(number, 1)
            return in_parts(kept, parts) if kept.dim() == 1 else kept
        dtype = self.dtype if number in NEVER_ROUNDED.get(kind, ()) else self.weight_dtype
        if self.weight_format is None and torch.promote_types(weight.dtype, dtype) != dtype:
            raise ValueError(
                f"a program of {self.weight_dtype} would round a weight of {weight.dtype}; make it of the finest dtype "
                "in the model"
            )
        return panels(weight, dtype, parts)

    def end_group(self, group: int) -> None:
        """The operations from after a GROUP up to here are those that it may leave out."""
        self._operations[group].skip = len(self._operations) - 1 - group
        self._open_groups -= 1

    @torch.no_grad()
    def linear(self, layer: nn.Linear, source: int, target: int) -> None:
        """target = layer(source)."""
        self.add(
            LINEAR, [layer.weight, layer.bias], source=source, target=target, width=layer.in_features,
            outputs=layer.out_features,
        )  # fmt: skip

    def norm(self, norm: RootMeanSquareNorm, source: int, target: int) -> None:
        """target = norm(source)."""
        width = norm.weight.shape[0]
        self.add(NORM, [norm.weight], source=source, target=target, width=width, epsilon=norm.epsilon)

    def block(self, block: ResidualBlock, target: int) -> int:
        """target = block(target); returns the place of its state."""
        mixer = block.mixer
        if isinstance(mixer, SelectiveMixer):
            return self._selective(block, mixer, target)
        if isinstance(mixer, Mamba2Mixer | Mamba3Mixer):
            return self._dual(block, mixer, target)
        assert isinstance(mixer, S4DMixer)  # see `can_step`
        return self._s4d(block, mixer, target)

    @torch.no_grad()
    def feed_forward(self, norm: RootMeanSquareNorm, expand: nn.Linear, contract: nn.Linear, target: int) -> None:
        """target += contract(GELU(expand(norm(target))))."""
        weights = [
            norm.weight, expand.weight, expand.bias, contract.weight, contract.bias,
        ]  # fmt: skip
        self.add(
            FEED_FORWARD, weights, target=target, width=expand.in_features, inner_width=expand.out_features,
            epsilon=norm.epsilon,
        )  # fmt: skip

    @torch.no_grad()
    def _selective(self, block: ResidualBlock, mixer: SelectiveMixer, target: int) -> int:
        inner, kernel_width = mixer.convolution_weight.shape
        state_matrix = mixer.state_matrix.to(torch.complex128)
        come, go = mixer.input_projection, mixer.output_projection
        assert mixer.selection_projection is not None and mixer.step_projection is not None  # see `can_step`
        turns = state_matrix.imag / (2 * torch.pi)
        state = self.place((kernel_width - 1 + mixer.matrix_width) * padded(inner))
        weights = [
            block.norm.weight,
            come.weight,
            come.bias,
            channels_last(mixer.convolution_weight),
            None if mixer.convolution_bias is None else channels_last(mixer.convolution_bias),
            mixer.selection_projection.weight,
            mixer.step_projection.weight,
            mixer.step_bias,
            _by_panel(channels_last(state_matrix.real / torch.log(torch.tensor(2.0, dtype=torch.float64)))),
            _by_panel(channels_last(turns)) if mixer.complex_state else None,
            channels_last(mixer.skip_weight),
            go.weight,
            go.bias,
        ]
        self.add(
            SELECTIVE, weights, target=target, state=state, width=come.in_features, inner_width=inner,
            state_size=mixer.state_size, kernel_width=kernel_width, step_rank=mixer.step_rank,
            is_complex=mixer.complex_state, epsilon=block.norm.epsilon,
        )  # fmt: skip
        return state

    @torch.no_grad()
    def _dual(self, block: ResidualBlock, mixer: Mamba2Mixer | Mamba3Mixer, target: int) -> int:
        if isinstance(mixer, Mamba2Mixer):
            kind, operation = MAMBA2, mamba2_operation(block.norm, mixer)
        else:
            kind, operation = MAMBA3, mamba3_operation(block.norm, mixer)
        state = self.place(operation.state_size)
        self.add(kind, operation.weights, target=target, state=state, **operation.sizes)
        return state

    @torch.no_grad()
    def _s4d(self, block: ResidualBlock, mixer: S4DMixer, target: int) -> int:
        width = mixer.skip_weight.shape[0]
        per_channel = mixer.state_size * (2 if mixer.complex_state else 1)
        state = self.place(per_channel * padded(width))
        matrices = []
        step_size = mixer.step_size().unsqueeze(-1)
        exponent = step_size * mixer.state_matrix
        driven = step_size * torch.expm1(exponent) / exponent  # the zero-order hold of B = 1
        output_matrix = as_complex(mixer.output_matrix) if mixer.complex_state else mixer.output_matrix
        for matrix in (torch.exp(exponent), driven, output_matrix):
            matrices += [channels_last(matrix.real), channels_last(matrix.imag) if matrix.is_complex() else None]
        projection = mixer.output_projection
        weights = [
            block.norm.weight, *matrices, channels_last(mixer.skip_weight), projection.weight, projection.bias,
        ]  # fmt: skip
        self.add(
            S4D, weights, target=target, state=state, width=width, state_size=mixer.state_size,
            is_complex=mixer.complex_state, epsilon=block.norm.epsilon,
        )  # fmt: skip
        return state

    def write_state(self, memory: Tensor, place: int, state: BlockState) -> None:
        """Put a block's state into the memories (batch, memory_size)."""
        if isinstance(state, Mamba2State | Mamba3State):
            row = state_numbers(state)
        else:
            numbers = [_states_first(state.scan)]
            if isinstance(state, SelectiveState):
                numbers = [channels_last(state.convolution.movedim(-1, 0)), _by_panel(numbers[0])]
            row = torch.cat([part.flatten(1) for part in numbers], dim=1)
        memory[:, place : place + row.shape[1]] = row

    def read_state(self, memory: Tensor, place: int, mixer: nn.Module) -> BlockState:
        """A block's state out of the memories (batch, memory_size): what `write_state` has put there."""
        if isinstance(mixer, Mamba2Mixer | Mamba3Mixer):
            return state_from(memory[:, place:], mixer)
        assert isinstance(mixer, SelectiveMixer | S4DMixer)  # see `can_step`
        channels, states = mixer.log_decay_rate.shape
        numbers = states * (2 if mixer.complex_state else 1)
        history = mixer.convolution_weight.shape[1] - 1 if isinstance(mixer, SelectiveMixer) else 0
        rows = memory[:, place : place + (history + numbers) * padded(channels)].unflatten(1, (-1, padded(channels)))
        convolution, scan = rows[:, :history, :channels].clone(), rows[:, history:]
        if isinstance(mixer, SelectiveMixer):
            scan = scan.reshape(-1, padded(channels) // PADDING, numbers, PADDING).transpose(1, 2).flatten(2)
        scan = scan[..., :channels].movedim(1, 2)
        held = as_complex(scan.contiguous()) if mixer.complex_state else scan.contiguous()
        return SelectiveState(convolution, held) if isinstance(mixer, SelectiveMixer) else S4DState(held)

    def run(
        self,
        library: Library,
        memory: Tensor,
        tokens: Tensor,
        *,
        position: int,
        logits: int,
        classes: int,
        uniforms: Tensor | None = None,
        given: Tensor | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        guidance: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As many steps as `uniforms` or `given` have columns, in place in memory and tokens.

        Args:
            library: the native library.
            memory: (batch, memory_size), of the program's dtype.
            tokens: (batch,), int64: what the first step reads; afterwards the last that was drawn.
            position: of the first step, 0 at the start of a sequence.
            logits: place of the logits after a step.
            classes: how many logits there are.
            uniforms: (batch, count), float64, from 0 to below 1: what the tokens are drawn with.
            given: (batch, count), int64: tokens that are taken instead.
            temperature, top_p: as `mambacore.models.sampling.sample_tokens`; 0 takes the likeliest.
            guidance: row `n` of the first half of the memories and row `n` of the second follow one token, drawn from
                second + guidance (first - second) of their logits (classifier-free guidance; Ho & Salimans, arXiv
                2207.12598, equation 6); `uniforms` and `given` have half as many rows as the memories.

        Returns:
            Tokens and their log-likelihoods, float64, by the logits as they are (of a pair, the first's): both of the
            shape of `uniforms` or `given`.

        Raises:
            ValueError: tensors that do not fit the program, or tokens that its embedding does not know.
            TypeError: tensors of another dtype than the ones above.
        """
        like = uniforms if given is None else given
        if like is None:
            raise ValueError("uniforms or given must be there, to choose tokens by; give one of the two")
        paired = guidance is not None
        self._check(like, memory, tokens, position, logits, classes, given, rows_per_column=2 if paired else 1)
        drawing, count = like.shape
        like = like.contiguous()
        drawn = torch.empty(drawing, count, dtype=torch.int64)
        log_likelihoods = torch.empty(drawing, count, dtype=torch.float64)
        operations = (StepOperation * len(self._operations))(*self._operations)
        library.generate(
            Generation(
                batch=len(memory), count=count, operation_count=len(operations), position=position,
                memory_size=self.memory_size, logits=logits, classes=classes, element=ELEMENT_TYPES[self.dtype],
                threads=torch.get_num_threads(), temperature=temperature, top_p=top_p,
                operations=ctypes.addressof(operations), memory=memory.data_ptr(), tokens=tokens.data_ptr(),
                uniforms=like.data_ptr() if given is None else None, given=None if given is None else like.data_ptr(),
                drawn=drawn.data_ptr(), log_likelihoods=log_likelihoods.data_ptr(),
                helped=self._open_groups == 0 and processors() > 1,
                paired=paired,
                guidance=1.0 if guidance is None else guidance,
            )
        )  # fmt: skip
        return drawn, log_likelihoods

    def _check(
        self,
        like: Tensor,
        memory: Tensor,
        tokens: Tensor,
        position: int,
        logits: int,
        classes: int,
        given: Tensor | None,
        rows_per_column: int,
    ) -> None:
        """Refuse what the native library would read or write out of bounds."""
        name, dtype = ("uniforms", torch.float64) if given is None else ("given", torch.int64)
        if like.dim() != 2:
            raise ValueError(
                f"{name} must be (batch, count) but has shape {tuple(like.shape)}; give one column per step"
            )
        batch = like.shape[0] * rows_per_column
        check_shapes(
            {
                "memory": Expected(memory, (batch, self.memory_size), "make it for this program and batch"),
                "tokens": Expected(tokens, (batch,), "give one token per sequence"),
            },
            of="program and batch",
        )
        check_devices(torch.empty(0), {"memory": memory, "tokens": tokens, name: like}, of="native library")
        for argument, tensor, wanted in (
            (name, like, dtype),
            ("memory", memory, self.dtype),
            ("tokens", tokens, torch.int64),
        ):
            if tensor.dtype != wanted:
                raise TypeError(f"{argument} must be {wanted} but is {tensor.dtype}; convert it first")
            if argument != name and not tensor.is_contiguous():
                raise ValueError(f"{argument} is written in place and must be contiguous but is not; copy it first")
        if position < 0:
            raise ValueError(f"position must not be negative but is {position}; count from the start of the sequence")
        known_tokens = self._tokens or classes  # a program may have no embedding
        if not 0 < classes <= known_tokens or not 0 <= logits <= self.memory_size - classes:
            raise ValueError(
                f"logits must be the place of {classes} numbers, as many as the embedding has tokens ({known_tokens}) "
                f"at most, but it is {logits} in a memory of {self.memory_size}; take the place that was made for them"
            )
        for argument, numbers, known in (("tokens", tokens, known_tokens), ("given", given, classes)):
            if numbers is not None and numbers.numel() and not (numbers.min() >= 0 and numbers.max() < known):
                raise ValueError(
                    f"{argument} must lie from 0 to {known - 1} but lie from {numbers.min()} to {numbers.max()}; "
                    "give tokens of this model's vocabulary"
                )
        if given is None and like.numel() and not (like.min() >= 0 and like.max() < 1):
            raise ValueError("uniforms must lie from 0 to below 1 but do not; draw them with torch.rand")


def processors() -> int:
    """Processors that this process may run on: threads beyond them only take turns."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _by_panel(numbers: Tensor) -> Tensor:
    """(..., states, channels) as (..., channels / 16, states, 16), which one sequence of channels reads in one go."""
    return numbers.unflatten(-1, (-1, PADDING)).transpose(-3, -2).contiguous()


def _states_first(states: Tensor) -> Tensor:
    """(batch, channels, state_size) as (batch, numbers, padded channels), a complex number's parts in turn."""
    if states.is_complex():
        states = torch.view_as_real(states.resolve_conj()).flatten(2)
    return channels_last(states.movedim(1, 0)).contiguous()
