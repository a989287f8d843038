"""Embeddings of characters together with their preceding context."""

import torch
from torch import Tensor, nn

from mambacore.parallel import active_ranks, history_over_ranks


class ContextEmbedding(nn.Module):
    """The sum of embeddings of contexts: for each width, that of the last `width` symbols up to a position.

    A table for contexts of 6 letters gives the first layer directly what short convolutions would have to compose.
    Contexts that contain a symbol outside the alphabet, or extend before the start, contribute nothing.

    Args:
        symbol_count: size of the alphabet of contexts; symbols are numbered from 0.
        context_widths: widths of the contexts, each with a table of `symbol_count ** width + 1` entries.
        model_width: output channels.
    """

    def __init__(self, symbol_count: int, context_widths: tuple[int, ...], model_width: int) -> None:
        super().__init__()
        self.symbol_count = symbol_count
        self.context_widths = context_widths
        self.tables = nn.ModuleList(
            nn.Embedding(symbol_count**width + 1, model_width, padding_idx=symbol_count**width)
            for width in context_widths
        )
        with torch.no_grad():
            for table in self.tables:
                table.weight /= len(context_widths) ** 0.5

    @property
    def history(self) -> int:
        """Number of earlier symbols that the next position needs."""
        return max(self.context_widths) - 1

    def forward(self, symbols: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed (batch, length) integers; those outside [0, symbol_count) are symbols outside the alphabet.

        The state is the last `history` symbols, (batch, history), with -1 before the start.
        """
        numbers, state = self.context_numbers(symbols, state)
        embedded = self.tables[0](numbers[0])
        for table, number in zip(self.tables[1:], numbers[1:], strict=True):
            embedded = embedded + table(number)
        return embedded, state

    def context_numbers(self, symbols: Tensor, state: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Return for each context width the table row at every position, (batch, length), and the state.

        The oldest symbol is the most significant digit. The last row is for contexts outside the alphabet.
        """
        if state is None:
            state = symbols.new_full((symbols.shape[0], self.history), -1)
        outgoing, ranks = None, active_ranks()
        if ranks is not None and self.history > 0:
            # In an exchange no symbol is encoded as zero, here as -1.
            moved = history_over_ranks(ranks, symbols.long() + 1, self.history, state.long() + 1)
            state, outgoing = ((history - 1).to(symbols.dtype) for history in moved)
        extended = torch.cat([state, symbols], dim=1)
        length = symbols.shape[1]
        known = (extended >= 0) & (extended < self.symbol_count)
        digits = torch.where(known, extended, 0)
        number = torch.zeros_like(symbols)
        complete = torch.ones_like(symbols, dtype=torch.bool)
        found: dict[int, Tensor] = {}
        for back in range(self.history + 1):
            first = self.history - back
            number = number + digits[:, first : first + length] * self.symbol_count**back
            complete = complete & known[:, first : first + length]
            if back + 1 in self.context_widths:
                found[back + 1] = torch.where(complete, number, self.symbol_count ** (back + 1))
        return [found[width] for width in self.context_widths], extended[:, length:] if outgoing is None else outgoing
