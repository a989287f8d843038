"""Metrics of every step of a run: a table, and events for TensorBoard."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TextIO

from mambacore.errors import InputError
from mambacore.files import replaced_when_whole

METRICS_NAME: Final = "metrics.csv"
EVENTS_NAME: Final = "events"


class MetricsLog:
    """Log of metrics: a table that is flushed after every row, and events for TensorBoard.

    Args:
        folder: of the run; made where it is missing.
        columns: of the table; `step` is one of them.
        first_step: later rows of an earlier process are dropped, here and in TensorBoard.

    Raises:
        InputError: if the table of an earlier process is damaged.
    """

    def __init__(self, folder: Path, columns: Sequence[str], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import, and only training logs

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_NAME
        _cut_back(path, columns, first_step)
        self._file: TextIO = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        self._events = SummaryWriter(str(folder / EVENTS_NAME), purge_step=first_step + 1)

    def append(self, row: dict[str, object]) -> None:
        """Write one row; missing values are empty."""
        self._writer.writerow(row)
        self._file.flush()
        for name, value in row.items():
            if name != "step" and value != "":
                self._events.add_scalar(name, float(str(value)), int(str(row["step"])))

    def close(self) -> None:
        """Close table and events."""
        self._file.close()
        # A disk that is full has been reported by then, or the events are the only thing lost.
        with contextlib.suppress(OSError):
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics log, in order; a last row that a killed process left unfinished is passed over.

    Raises:
        InputError: if the file is damaged; the message gives the line.
    """
    return list(_checked_rows(path)) if path.is_file() else []


def _checked_rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the metrics {path} cannot be read ({error}): restore the file or move it away.") from error
    lines = text[: text.rfind("\n") + 1].splitlines()
    reader = csv.DictReader(lines)
    try:
        for row in reader:
            int(row["step"])
            for value in row.values():
                float("0" if value == "" else value)
            yield row
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the metrics {path} are damaged at line {reader.line_num}: restore the file or move it away."
        ) from error


def _cut_back(path: Path, columns: Sequence[str], step: int) -> None:
    """Truncate the table to the rows up to `step`."""
    kept = [row for row in read_metrics(path) if int(row["step"]) <= step] if step > 0 else []
    if kept and tuple(kept[0]) != tuple(columns):
        raise InputError(
            f"the metrics {path} have the columns {', '.join(kept[0])} and this run writes {', '.join(columns)}: "
            "move the file away."
        )
    with replaced_when_whole(path) as stream:
        rows = [",".join(columns), *(",".join(row[column] for column in columns) for row in kept)]
        stream.write("".join(f"{row}\n" for row in rows).encode())
