"""`genomamba predict`: predictions for FASTA records or the rows of a table, in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np

from genomamba.data.targets import TargetDescription
from genomamba.io.compression import STANDARD_INPUT, Rewound, opened, source_label
from genomamba.io.sources import read_sequences
from genomamba.io.tables import read_sequence_table
from genomamba.models.sequence_model import load_sequence_model
from genomamba.prediction.metrics import Predictions
from genomamba.prediction.predict import NamedTokens, predict_sequences, prediction_columns, prediction_values
from mambacore.errors import InputError
from mambacore.safe_text import table_line
from mambapipelines.console import WorkProgress, counted, note
from mambapipelines.device import begin_computing
from mambapipelines.files import check_writable_place, written_whole

NOT_AVAILABLE: Final = "NA"


@dataclass(frozen=True)
class PredictionOptions:
    """Options of `genomamba predict`.

    Attributes:
        model_folder: folder written by `genomamba finetune`, or `hf://...`.
        sources: FASTA files or tables, plain or gzipped, recognised by their first character; "-" is standard input.
        fasta, reference: FASTA files with the records or the intervals of tables.
        output: file for the table; `None` is standard output.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        device, precision: see `mambapipelines.device.choose`.
    """

    model_folder: str
    sources: Sequence[str]
    fasta: str | None = None
    reference: str | None = None
    output: Path | None = None
    threads: int | None = None
    device: str = "auto"
    precision: str = "float32"


def predict_files(options: PredictionOptions) -> int:
    """Write one row per record, in input order, and return their number.

    Raises:
        InputError: if an option, the model folder or a file is invalid; no output file is left then.
    """
    if list(options.sources).count(STANDARD_INPUT) > 1:
        raise InputError("standard input ('-') is named twice: it can be read only once.")
    if options.output is not None:
        check_writable_place(options.output, "--output", (*options.sources, options.fasta, options.reference))
    placement = begin_computing(options.device, options.precision, options.threads)
    model = load_sequence_model(options.model_folder)[0].to(placement.device)
    description, count = model.config.targets, 0
    with ExitStack() as opened:
        stream = opened.enter_context(written_whole(options.output)) if options.output else sys.stdout.buffer
        opened.enter_context(placement.autocast())
        bar = options.output is not None or not sys.stdout.isatty()
        progress = opened.enter_context(WorkProgress("predict", None, lines_elsewhere=False, bar=bar))
        stream.write(_header(description).encode() + b"\n")
        for source in options.sources:
            for name, length, values in predict_sequences(model, _read(source, options), progress.advance):
                stream.write(f"{_row(description, name, length, values)}\n".encode())
                count += 1
        stream.flush()
    note(counted(count, "record"))
    return count


def predictions_table(
    description: TargetDescription, names: Sequence[str], lengths: Sequence[int], predictions: Predictions
) -> str:
    """Return the table of predictions: `record`, `length` (bp) and predictions with six significant digits.

    For classes `call`, `probability` and `p_CLASS` for each; for labels `p_COLUMN` for each; for numbers the columns. A
    record without bases has NA.
    """
    lines = [_header(description)]
    lines += [_row(description, *row) for row in zip(names, lengths, predictions, strict=True)]
    return "\n".join(lines) + "\n"


def _header(description: TargetDescription) -> str:
    return table_line(["record", "length", *prediction_columns(description)])


def _row(description: TargetDescription, name: str, length: int, values: np.ndarray) -> str:
    return table_line([name, str(length), *map(_shown, prediction_values(description, values))])


def _shown(value: Any) -> str:
    if value is None:
        return NOT_AVAILABLE
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _read(source: str, options: PredictionOptions) -> Iterator[NamedTokens]:
    """The records of a FASTA or FASTQ file, or the rows of a table."""
    label = source_label(source)
    with opened(source, label) as content:
        rewound = Rewound(content, label)
        stream = cast(BinaryIO, rewound)
        if rewound.begins_with((b">", b"@", b"")):
            yield from ((record.name, record.tokens) for record in read_sequences(stream))
            return
        table = read_sequence_table(stream, [], options.fasta, options.reference)
    yield from zip(table.names, table.tokens, strict=True)
