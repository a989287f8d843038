"""The gated recurrent unit as a mixer."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mambacore.layers.mixer import Mixer, register_mixer
from mambacore.packing import record_numbers


class GRUState(NamedTuple):
    """The state of a gated recurrent unit."""

    hidden: Tensor  # (batch, inner_width)


@register_mixer
class GRUMixer(Mixer):
    """A gated recurrent unit (Cho et al., arXiv 1406.1078) and a projection.

    The recurrence is PyTorch's `nn.GRU`, in which the reset gate acts after the recurrent matrix, not before it. It
    cannot run in parallel along the sequence.

    Args:
        model_width: channels of the sequence.
        expansion: hidden channels per model channel.
        linear_bias: the projection has a bias.
    """

    name = "gru"

    def __init__(self, model_width: int, expansion: int = 1, linear_bias: bool = False) -> None:
        super().__init__()
        self.model_width = model_width
        self.recurrence = nn.GRU(model_width, expansion * model_width, batch_first=True)
        self.output_projection = nn.Linear(expansion * model_width, model_width, bias=linear_bias)

    def forward(
        self, sequence: Tensor, state: GRUState | None = None, sequence_starts: Tensor | None = None
    ) -> tuple[Tensor, GRUState]:
        """Map (batch, length, model_width) and the incoming state to the same shape and the outgoing state."""
        hidden = sequence.new_zeros(sequence.shape[0], self.recurrence.hidden_size) if state is None else state.hidden
        if sequence.shape[1] == 0:
            return sequence, GRUState(hidden)
        if sequence_starts is None:
            outputs, final = self.recurrence(sequence, hidden.unsqueeze(0))
            return self.output_projection(outputs), GRUState(final.squeeze(0))
        outputs, hidden = self._records_apart(sequence, hidden, sequence_starts)
        return self.output_projection(outputs), GRUState(hidden)

    def _records_apart(self, sequence: Tensor, hidden: Tensor, sequence_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run all records as a batch, each from its own start, without padding.

        PyTorch requires the positions of such a batch sorted by their position in their record, longest record first.
        """
        batch, length = sequence_starts.shape
        begins = sequence_starts.clone()
        begins[:, 0] = True
        record = record_numbers(begins.flatten().unsqueeze(0)).squeeze(0) - 1  # of every position, over all rows
        first = begins.flatten().nonzero().squeeze(-1)
        place = torch.arange(batch * length, device=record.device) - first[record]
        record_length = torch.bincount(record)
        by_rank = torch.argsort(record_length, descending=True, stable=True)
        rank = torch.argsort(by_rank)
        order = torch.argsort(place * len(first) + rank[record])
        # A record that continues from the previous piece starts from the incoming state, all others from zero.
        goes_on = (first % length == 0) & ~sequence_starts.flatten()[first]
        start = torch.where(goes_on.unsqueeze(-1), hidden[first // length], torch.zeros_like(hidden[:1]))
        packed = PackedSequence(sequence.flatten(0, 1)[order], torch.bincount(place).cpu())
        outputs, final = self.recurrence(packed, start[by_rank].unsqueeze(0))
        unsorted = outputs.data[torch.argsort(order)].unflatten(0, (batch, length))
        last_record = record.unflatten(0, (batch, length))[:, -1]
        return unsorted, final.squeeze(0)[rank[last_record]]
