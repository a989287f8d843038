"""Softmax attention as a mixer, with rotary positions, and helpers of all mixers with heads."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.backends import compute_dtype
from mambacore.devices import wide_dtype
from mambacore.layers.mixer import Mixer, register_mixer
from mambacore.non_finite import cleaned, spoiled_since, taint_of
from mambacore.packing import record_numbers

# By default a mixer has as many heads as possible, up to this number, of at least this width.
MOST_HEADS, NARROWEST_HEAD = 8, 8
# If an explicit mask is needed, this many queries are processed at a time, so that it stays small.
QUERY_BLOCK = 1024


def head_count(model_width: int, heads: int | None) -> int:
    """Return the given number of heads, or the default: at most 8, each of an even width of at least 8.

    Raises:
        ValueError: if the heads do not divide the width.
    """
    if heads is None:
        fitting = (number for number in range(MOST_HEADS, 0, -1) if model_width % (2 * number) == 0)
        return next((number for number in fitting if model_width // number >= NARROWEST_HEAD), 1)
    if heads < 1 or model_width % heads:
        raise ValueError(f"{heads} heads do not divide a model_width of {model_width}; choose a divisor")
    return heads


def even_head_count(model_width: int, heads: int | None) -> int:
    """`head_count` for heads whose channels are rotated in pairs.

    Raises:
        ValueError: if the heads do not divide the width, or their width is odd.
    """
    heads = head_count(model_width, heads)
    if model_width // heads % 2:
        raise ValueError(
            f"heads of width {model_width // heads} cannot be rotated in pairs; choose heads of an even width"
        )
    return heads


def rotated(vectors: Tensor, first_position: int, base: float) -> Tensor:
    """Rotate each pair of neighbouring channels by its frequency times the position (RoFormer, equations 14 and 15).

    The inner product of two rotated vectors then depends only on their distance. Angles are computed in float64, since
    float32 cannot resolve neighbouring positions beyond millions of them.

    Args:
        vectors: (batch, length, heads, head_width), with an even head_width.
        first_position: position of the first vector.
        base: pair i of `head_width / 2` rotates by `base ** (-2 i / head_width)` per position.
    """
    length, head_width = vectors.shape[1], vectors.shape[-1]
    position = torch.arange(
        first_position, first_position + length, dtype=wide_dtype(vectors.device), device=vectors.device
    )
    exponent = torch.arange(0, head_width, 2, dtype=wide_dtype(vectors.device), device=vectors.device) / head_width
    angle = (position[:, None] * base**-exponent).unsqueeze(1)  # (length, 1, head_width / 2)
    dtype = compute_dtype(vectors.dtype)
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    first, second = vectors.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(vectors.dtype)


class AttentionState(NamedTuple):
    """The keys and values so far: the memory of attention grows with the sequence."""

    keys: Tensor  # (batch, past, heads, head_width), rotated
    values: Tensor  # (batch, past, heads, head_width)
    visible: Tensor | None  # (batch, past), boolean: which belong to the current record; None: all
    positions: int  # number so far


@register_mixer
class AttentionMixer(Mixer):
    """Causal multi-head attention (Vaswani et al., arXiv 1706.03762) with rotary positions (Su et al., 2104.09864).

    Args:
        model_width: channels of the sequence.
        heads: number of heads, each of even width. By default at most 8, of at least 8 channels each.
        rotary_base: the rotations' wavelengths are between 2 pi and 2 pi times this many positions.
        linear_bias: the input and output projections have biases.

    Raises:
        ValueError: if the heads do not divide the width, or their width is odd.
    """

    name = "attention"

    def __init__(
        self, model_width: int, heads: int | None = None, rotary_base: float = 10_000.0, linear_bias: bool = False
    ) -> None:
        super().__init__()
        self.model_width = model_width
        self.heads = even_head_count(model_width, heads)
        self.rotary_base = rotary_base
        self.input_projection = nn.Linear(model_width, 3 * model_width, bias=linear_bias)
        self.output_projection = nn.Linear(model_width, model_width, bias=linear_bias)

    def forward(
        self, sequence: Tensor, state: AttentionState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state."""
        projected = self.input_projection(sequence).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = projected.unbind(2)
        positions = 0 if state is None else state.positions
        queries, keys = (rotated(vectors, positions, self.rotary_base) for vectors in (queries, keys))
        records = _records_of_keys(state, sequence_starts, sequence)
        if state is not None:
            keys, values = torch.cat([state.keys, keys], dim=1), torch.cat([state.values, values], dim=1)
        mixed = _attend(queries, keys, values, records)
        state = _remembered(keys, values, records, positions + sequence.shape[1])
        return self.output_projection(mixed.flatten(-2)), state


def _records_of_keys(state: AttentionState | None, sequence_starts: Tensor | None, sequence: Tensor) -> Tensor | None:
    """Return the record of every key (batch, past + length): 0 for the incoming one and -1 for those before it.

    None if there is only one record.
    """
    visible = None if state is None else state.visible
    if visible is None and sequence_starts is None:
        return None
    batch, length, _ = sequence.shape
    if visible is None:
        visible = sequence.new_ones(batch, 0 if state is None else state.keys.shape[1], dtype=torch.bool)
    here = visible.new_zeros(batch, length).long() if sequence_starts is None else record_numbers(sequence_starts)
    return torch.cat([visible.long() - 1, here], dim=1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, records: Tensor | None) -> Tensor:
    """Attend from each query, at the last positions, to the keys of its record up to its position."""
    length, past = queries.shape[1], keys.shape[1] - queries.shape[1]
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
    is_first = bool(past == 0)  # lengths are symbolic in an exported graph
    if records is None and length == 1:  # sees everything
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
    taint = (taint_of(keys) + taint_of(values)).squeeze(-1)  # (batch, heads, past + length)
    spoiled = spoiled_since(taint, None if records is None else records.unsqueeze(1).expand_as(taint))[..., past:, None]
    keys, values = cleaned(keys), cleaned(values)
    if records is None and is_first:
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True) + spoiled
        return mixed.transpose(1, 2)
    key_position = torch.arange(past + length, device=queries.device)
    outputs = [queries[:, :, :0]]
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        rows, seen = slice(past + begin, past + end), slice(past + end)
        mask = key_position[seen] <= key_position[rows, None]
        if records is not None:
            mask = mask & (records[:, None, rows, None] == records[:, None, None, seen])
        outputs.append(
            F.scaled_dot_product_attention(
                queries[:, :, begin:end], keys[:, :, seen], values[:, :, seen], attn_mask=mask
            )
        )
    return (torch.cat(outputs, dim=2) + spoiled).transpose(1, 2)


def _remembered(keys: Tensor, values: Tensor, records: Tensor | None, positions: int) -> AttentionState:
    """Return the state after the last position, without keys that no row will attend to again."""
    if records is None or records.shape[1] == 0:
        return AttentionState(keys, values, None, positions)
    visible = records == records[:, -1:]
    first = int(visible.any(0).byte().argmax())
    return AttentionState(keys[:, first:], values[:, first:], visible[:, first:], positions)
