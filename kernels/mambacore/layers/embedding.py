"""Embeddings of characters together with the characters just before them."""

import torch
from torch import Tensor, nn

from mambacore.parallel import active_ranks, history_over_ranks


class ContextEmbedding(nn.Module):
    """The sum of one embedding per context width: that of the last 1, ..., `width` symbols up to a position.

    A table for contexts of 6 letters gives the first layer at once what a stack of short convolutions must compose.
    Contexts that hold a symbol outside the alphabet, or that reach before the start, add nothing.

    Args:
        symbol_count: size of the alphabet that contexts are made of; symbols are numbered from 0.
        context_widths: the widths, each with a table of `symbol_count ** width + 1` entries.
        model_width: channels of the result.
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
        """How many earlier symbols the next position needs."""
        return max(self.context_widths) - 1

    def forward(self, symbols: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed (batch, length) integers; those outside [0, symbol_count) are symbols outside the alphabet.

        The state is the last `history` symbols, (batch, history), -1 where there were none.
        """
        numbers, state = self.context_numbers(symbols, state)
        embedded = self.tables[0](numbers[0])
        for table, number in zip(self.tables[1:], numbers[1:], strict=True):
            embedded = embedded + table(number)
        return embedded, state

    def context_numbers(self, symbols: Tensor, state: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """For each context width the row of its table at every position, (batch, length); and the state.

        The oldest symbol is the most significant digit. The last row stands for contexts that are not of the alphabet.
        """
        if state is None:
            state = symbols.new_full((symbols.shape[0], self.history), -1)
        outgoing, ranks = None, active_ranks()
        if ranks is not None and self.history > 0:
            # Zero stands for no symbol in an exchange, -1 here.
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
