"""Tables of results, returned by the methods of a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mambacore.errors import InputError
from mambacore.safe_text import table_line

if TYPE_CHECKING:
    import pandas


class ResultTable(Sequence[dict[str, Any]]):
    """A small table: a sequence of rows, each a mapping from column to value.

    Unavailable values are `None`, such as the probabilities of an unclassified record.

    Args:
        columns: names of the columns.
        rows: values in the order of the columns.
    """

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.columns = tuple(columns)
        self.rows = [tuple(row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return row number `index` as a mapping, a table for a slice, or a column (a list) for its name."""
        if isinstance(index, str):
            if index not in self.columns:
                raise KeyError(f"there is no column {index!r}: the columns are {', '.join(self.columns)}")
            place = self.columns.index(index)
            return [row[place] for row in self.rows]
        if isinstance(index, slice):
            return ResultTable(self.columns, self.rows[index])
        return dict(zip(self.columns, self.rows[index], strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))

    def __str__(self) -> str:
        """Return the table as tab-separated text, with NA for unavailable values."""
        lines = [table_line(self.columns)]
        lines += [table_line(map(_shown, row)) for row in self.rows]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} rows: {', '.join(self.columns)}>"

    def to_pandas(self) -> pandas.DataFrame:
        """Return the table as a data frame.

        Raises:
            InputError: if pandas is not installed.
        """
        try:
            import pandas  # noqa: PLC0415 - optional
        except ImportError as error:
            raise InputError("to_pandas needs pandas, which is not installed: `pip install pandas`.") from error
        return pandas.DataFrame(self.rows, columns=list(self.columns))


class Embeddings(ResultTable):
    """One vector per sequence or window.

    Attributes:
        vectors: (rows, width) float32; NaN for a sequence without bases.
    """

    def __init__(self, rows: Sequence[tuple[str, int, int]], vectors: npt.NDArray[np.float32]) -> None:
        super().__init__(("name", "start", "end"), rows)
        self.vectors = vectors

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with the name, start and end, and one column per channel, numbered from 0."""
        frame = super().to_pandas()
        return frame.join(type(frame)(self.vectors))


def _shown(value: Any) -> str:
    if value is None:
        return "NA"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
