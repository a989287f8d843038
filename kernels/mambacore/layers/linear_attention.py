"""Attention without softmax, in time linear in the length: as a mixer, and chunkwise for similar mixers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.backends import compute_dtype
from mambacore.layers.attention import head_count
from mambacore.layers.mixer import Mixer, check_state, register_mixer
from mambacore.non_finite import cleaned, spoiled_since, taint_of
from mambacore.parallel import recurrence_over_ranks

# Positions computed in parallel. Scores take CHUNK / head_width of the values' memory, and every chunk one memory.
CHUNK = 64


def chunkwise_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    memory: Tensor,
    log_decay: Tensor | None = None,
    sequence_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Update and read a memory of outer products at every position:

        memory_t = exp(log_decay) * memory_{t-1} + keys_t values_t^T
        output_t = memory_t^T queries_t

    Within a chunk this is a matrix product; between chunks the memory is carried over (Sun et al., arXiv
    2307.08621, equation 7).

    Args:
        queries: (batch, length, heads, key_width).
        keys: (batch, length, heads, key_width).
        values: (batch, length, heads, value_width).
        memory: (batch, heads, key_width, value_width), before the first position.
        log_decay: (heads,), at most 0; no decay by default.
        sequence_starts: (batch, length), boolean, True where a new record begins: the memory does not cross into it.

    Returns:
        Outputs (batch, length, heads, value_width), and the memory after the last position. Where a key or a value of
        a head is not finite, the head's outputs are NaN from that position on, to the end of the record.
    """
    length = queries.shape[1]
    if log_decay is None:
        log_decay = queries.new_zeros(1)
    remainder = length % CHUNK
    outputs = [values[:, :0]]
    for begin, end, chunk in ((0, length - remainder, CHUNK), (length - remainder, length, remainder)):
        if end > begin:
            queries_here, keys_here, values_here = (
                tensor[:, begin:end].unflatten(1, (-1, chunk)) for tensor in (queries, keys, values)
            )
            starts = None if sequence_starts is None else sequence_starts[:, begin:end].unflatten(1, (-1, chunk))
            # A memory sums over the whole past: it keeps its dtype, whatever autocast uses.
            with torch.autocast(queries.device.type, enabled=False):
                output, memory = _walk_chunks(queries_here, keys_here, values_here, memory, log_decay, starts)
            outputs.append(output.flatten(1, 2))
    return torch.cat(outputs, dim=1), memory


def _walk_chunks(
    queries: Tensor, keys: Tensor, values: Tensor, memory: Tensor, log_decay: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute whole chunks: (batch, chunks, positions, heads, width), starts (batch, chunks, positions)."""
    queries, keys, values = (tensor.permute(0, 3, 1, 2, 4) for tensor in (queries, keys, values))
    chunk = queries.shape[3]
    position = torch.arange(chunk, device=queries.device)
    distance = (position[:, None] - position).clamp(min=0)
    # Decay over so many positions, with dimensions (batch, heads, chunks, positions, positions).
    rate = log_decay.view(1, -1, 1, 1, 1)
    taint = taint_of(keys) + taint_of(values)
    keys, values = cleaned(keys), cleaned(values)
    hidden, record = position[:, None] < position, None
    faded = torch.exp(rate * distance).tril().to(queries.dtype)
    from_memory, to_memory, kept = (
        torch.exp(rate * steps).to(queries.dtype)
        for steps in ((position + 1)[:, None], (chunk - 1 - position)[:, None], position.new_full((1, 1), chunk))
    )
    if starts is not None:
        record = starts.cumsum(2).unsqueeze(1).unsqueeze(-1)  # 0 for the record that continues into the chunk
        last = record[:, :, :, -1:]
        hidden = hidden | (record != record.transpose(-1, -2))
        from_memory, to_memory, kept = from_memory * (record == 0), to_memory * (record == last), kept * (last == 0)
    spoiled = spoiled_since(taint, record, -2)
    written = (keys * to_memory).transpose(-1, -2) @ values + spoiled[:, :, :, -1:]
    kept = kept.expand(*kept.shape[:2], written.shape[2], 1, 1)
    memories = []
    for number in range(written.shape[2]):
        memories.append(memory)
        memory = _faded(memory, kept[:, :, number], record is not None) + written[:, :, number]
    scores = (queries @ keys.transpose(-1, -2) * faded).masked_fill(hidden, 0.0)
    read = queries @ torch.stack(memories, dim=2)
    outputs = scores @ values + _faded(read, from_memory, record is not None) + spoiled
    return outputs.permute(0, 2, 3, 1, 4), memory


def _faded(values: Tensor, factor: Tensor, may_be_cut: bool) -> Tensor:
    """Values times a factor; where a record was cut off and the factor is zero, not even NaN remains."""
    return (values * factor).masked_fill(factor == 0, 0.0) if may_be_cut else values * factor


class LinearAttentionState(NamedTuple):
    """Sums over the positions so far, float32 or float64."""

    memory: Tensor  # (batch, heads, head_width, head_width + 1); the last column is the normaliser


@register_mixer
class LinearAttentionMixer(Mixer):
    """Causal linear attention (Katharopoulos et al., arXiv 2006.16236, equations 9, 18 and 19).

    A query weights a key by the inner product of their features, elu(x) + 1 (equation 7), instead of its exponential.

    Args:
        model_width: channels of the sequence.
        heads: number of heads; by default at most 8, of at least 8 channels each.
        linear_bias: the input and output projections have biases.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    name = "linear_attention"
    supports_context_parallel = True

    def __init__(self, model_width: int, heads: int | None = None, linear_bias: bool = False) -> None:
        super().__init__()
        self.model_width = model_width
        self.heads = head_count(model_width, heads)
        self.input_projection = nn.Linear(model_width, 3 * model_width, bias=linear_bias)
        self.output_projection = nn.Linear(model_width, model_width, bias=linear_bias)

    def forward(
        self, sequence: Tensor, state: LinearAttentionState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, LinearAttentionState]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state."""
        projected = self.input_projection(sequence).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = projected.to(compute_dtype(sequence.dtype)).unbind(2)
        # A column of ones in the values sums the weights: the normaliser.
        values = F.pad(values, (0, 1), value=1.0)
        batch, _, heads, width = keys.shape
        nothing = keys.new_zeros(batch, heads, width, width + 1)
        check_state("state.memory", None if state is None else state.memory, tuple(nothing.shape))

        def run(memory: Tensor | None) -> tuple[Tensor, Tensor]:
            memory = nothing if memory is None else memory
            return chunkwise_attention(features(queries), features(keys), values, memory, None, sequence_starts)

        sums, memory = recurrence_over_ranks(
            run,
            final_state=lambda memory: run(memory)[1],
            total_decay=lambda: torch.ones_like(nothing[:, :, :1, :1]),
            initial_state=None if state is None else state.memory,
            sequence_starts=sequence_starts,
        )
        mixed = sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(sums.dtype).tiny)
        return self.output_projection(mixed.flatten(-2).to(sequence.dtype)), LinearAttentionState(memory)


def features(vectors: Tensor) -> Tensor:
    """Return elu(x) + 1 as x + 1 above zero and exp(x) below, which does not round to zero as the sum does."""
    return torch.where(vectors > 0, vectors + 1, vectors.clamp(max=0).exp())
