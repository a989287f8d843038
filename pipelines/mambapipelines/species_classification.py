"""Which species is each record from? Records of any length, streamed through the model's state in bounded memory."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt
import torch

from genomamba.fasta import STANDARD_INPUT, SpooledRecord, is_gzipped, spool_records
from genomamba.genomes import UNCLASSIFIED
from genomamba.models import SpeciesClassifier, load_classifier
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambapipelines.calibration import PIECE_LENGTH_BP, FloatArray, strand_averaged_evidence
from mambapipelines.console import BaseProgress, check_writable_place, note, use_threads, write_whole, written_whole

UNKNOWN: Final = "unknown"
"""The call of a record whose best class is less probable than `--unknown-below`."""

NOT_AVAILABLE: Final = "NA"
# Short records wait for others of their length, which go through the model together; the waiting is bounded.
MOST_WAITING_RECORDS: Final = 256
MOST_WAITING_BASES: Final = 1 << 20
HISTOGRAM_BINS: Final = 20
MOST_LISTED_RECORDS: Final = 1_000
MOST_PLOTTED_RECORDS: Final = 5_000
# A FASTA file of 80 bases a line has 81 bytes for them; this is only for the estimate of the time left.
BASES_PER_BYTE: Final = 80 / 81


@dataclass(frozen=True)
class ClassificationOptions:
    """What `genomamba classify` is asked to do.

    Attributes:
        model_folder: folder written by `genomamba train`.
        sources: FASTA files, plain or gzipped; "-" is standard input.
        output: where the table goes; `None` is standard output.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        minimum_length: records of fewer bases are `unclassified`.
        unknown_below: records whose best class has a smaller probability are `unknown`.
        report: HTML page to write.
        piece_length: bases that go through the model at once; the result does not depend on it.
    """

    model_folder: Path
    sources: Sequence[str]
    output: Path | None = None
    threads: int | None = None
    minimum_length: int = 1
    unknown_below: float = 0.0
    report: Path | None = None
    piece_length: int = PIECE_LENGTH_BP


@dataclass(frozen=True)
class Classification:
    """The answer for one record; `probabilities` has one value per class and is `None` when `unclassified`."""

    name: str
    length: int
    call: str
    probabilities: FloatArray | None = field(compare=False)

    @property
    def probability(self) -> float:
        """Probability of the best class; not a number when `unclassified`."""
        return math.nan if self.probabilities is None else float(self.probabilities.max())


@dataclass
class ClassificationSummary:
    """What a report needs to know about all records, in bounded memory.

    Attributes:
        class_names: in the order of the model.
        records, bases: counts by call.
        histogram: (20,) records by probability of the best class, bins of 0.05.
        listed: the first records.
        plotted: a uniform random sample of the classified records.
    """

    class_names: tuple[str, ...]
    records: dict[str, int] = field(default_factory=dict)
    bases: dict[str, int] = field(default_factory=dict)
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, dtype=np.int64))
    listed: list[Classification] = field(default_factory=list)
    plotted: list[Classification] = field(default_factory=list)
    _classified: int = 0
    _random: np.random.Generator = field(default_factory=lambda: np.random.Generator(np.random.PCG64(0)))

    def add(self, row: Classification) -> None:
        """Count one record."""
        self.records[row.call] = self.records.get(row.call, 0) + 1
        self.bases[row.call] = self.bases.get(row.call, 0) + row.length
        if len(self.listed) < MOST_LISTED_RECORDS:
            self.listed.append(row)
        if row.probabilities is None:
            return
        self.histogram[min(HISTOGRAM_BINS - 1, int(row.probability * HISTOGRAM_BINS))] += 1
        self._classified += 1
        if len(self.plotted) < MOST_PLOTTED_RECORDS:
            self.plotted.append(row)
            return
        place = int(self._random.integers(self._classified))  # reservoir sampling (Vitter 1985, algorithm R)
        if place < MOST_PLOTTED_RECORDS:
            self.plotted[place] = row

    @property
    def record_count(self) -> int:
        """Records of all calls."""
        return sum(self.records.values())

    @property
    def base_count(self) -> int:
        """Bases of all calls."""
        return sum(self.bases.values())


class RecordClassifier:
    """Classifies records one after the other with a model, both strands averaged."""

    def __init__(
        self,
        model: SpeciesClassifier,
        minimum_length: int = 1,
        unknown_below: float = 0.0,
        piece_length: int = PIECE_LENGTH_BP,
    ) -> None:
        """Get ready; the arguments are as in `ClassificationOptions`.

        Raises:
            InputError: an argument is out of its range, or `unknown` would be ambiguous.
        """
        if minimum_length < 0:
            raise InputError(f"--min-length is {minimum_length}: give 0 or more bases.")
        if not 0 <= unknown_below <= 1:
            raise InputError(f"--unknown-below is {unknown_below}: give a probability from 0 to 1.")
        if piece_length < 1:
            raise InputError(f"--piece-length is {piece_length}: give 1 or more bases.")
        self.class_names = tuple(model.config.class_names)
        if unknown_below > 0 and UNKNOWN in self.class_names:
            raise InputError(
                f"the model has a class named '{UNKNOWN}', which is what --unknown-below calls records: "
                "leave the option out and filter by the column of probabilities."
            )
        self._model = model.eval()
        self._minimum_length = max(1, minimum_length)
        self._unknown_below = unknown_below
        self._piece_length = piece_length

    def classify(self, source: str | BinaryIO, progress: BaseProgress | None = None) -> Iterator[Classification]:
        """Yield the answer for every record of a FASTA source, in its order.

        Records of one length that follow each other closely go through the model together; the answers do not depend
        on that, nor on the length of the pieces that longer records are cut into.

        Raises:
            InputError: the source is not FASTA of nucleotides; earlier records may have been answered by then.
        """
        waiting: list[_WaitingRecord] = []
        waiting_bases = 0
        with closing(spool_records(source)) as records:  # type: ignore[type-var]  # a generator
            for record in records:
                is_long = record.length > self._piece_length and record.length >= self._minimum_length
                if is_long:
                    yield from self._classify_waiting(waiting)
                    waiting, waiting_bases = [], 0
                    yield self._answer(record.name, record.length, self._evidence_of_long(record, progress))
                    continue
                waiting.append(self._take(record))
                waiting_bases += record.length
                if progress is not None:
                    progress.advance(record.length)
                if len(waiting) >= MOST_WAITING_RECORDS or waiting_bases >= MOST_WAITING_BASES:
                    yield from self._classify_waiting(waiting)
                    waiting, waiting_bases = [], 0
        yield from self._classify_waiting(waiting)

    def _take(self, record: SpooledRecord) -> _WaitingRecord:
        if record.length < self._minimum_length:
            return _WaitingRecord(record.name, record.length, None)
        return _WaitingRecord(record.name, record.length, next(record.forward_pieces(record.length)))

    def _classify_waiting(self, waiting: Sequence[_WaitingRecord]) -> Iterator[Classification]:
        places_by_length: dict[int, list[int]] = {}
        for place, record in enumerate(waiting):
            if record.tokens is not None:
                places_by_length.setdefault(record.length, []).append(place)
        evidence: dict[int, FloatArray] = {}
        for places in places_by_length.values():
            tokens = np.stack([record.tokens for place in places if (record := waiting[place]).tokens is not None])
            evidence.update(zip(places, strand_averaged_evidence(self._model, tokens), strict=True))
        for place, record in enumerate(waiting):
            yield self._answer(record.name, record.length, evidence.get(place))

    @torch.inference_mode()
    def _evidence_of_long(self, record: SpooledRecord, progress: BaseProgress | None) -> FloatArray:
        """Evidence per base, (classes,), of a record that is streamed through the state, both strands side by side."""
        state = None
        strands = zip(
            record.forward_pieces(self._piece_length), record.reverse_complement_pieces(self._piece_length), strict=True
        )
        for forward, reverse in strands:
            mean_evidence, state = self._model(torch.from_numpy(np.stack([forward, reverse])), state)
            if progress is not None:
                progress.advance(len(forward))
        return mean_evidence.double().mean(dim=0).numpy()

    @torch.inference_mode()
    def _answer(self, name: str, length: int, evidence: FloatArray | None) -> Classification:
        if evidence is None:
            return Classification(name, length, UNCLASSIFIED, None)
        logits = self._model.logits(torch.from_numpy(evidence)[None], length)
        probabilities = torch.softmax(logits, dim=-1)[0].numpy()
        best = int(probabilities.argmax())
        call = UNKNOWN if probabilities[best] < self._unknown_below else self.class_names[best]
        return Classification(name, length, call, probabilities)


@dataclass(frozen=True)
class _WaitingRecord:
    """A short record; without tokens it is too short to be classified."""

    name: str
    length: int
    tokens: Tokens | None


def classify_files(options: ClassificationOptions) -> ClassificationSummary:
    """Classify the records of FASTA files; the table goes to a file or standard output, row after row.

    Columns are tab-separated: `record`, `length` (bp), `call`, `probability` (of the best class), then `p_NAME` for
    every class. Probabilities have six decimals, and are NA where the call is `unclassified`.

    Raises:
        InputError: anything wrong with the options, the model folder or the files. No output file is left then.
    """
    _check_places(options)
    use_threads(options.threads)
    model, _ = load_classifier(options.model_folder)
    classifier = RecordClassifier(model, options.minimum_length, options.unknown_below, options.piece_length)
    summary = ClassificationSummary(classifier.class_names)
    start_seconds = time.monotonic()
    with ExitStack() as opened:
        stream = opened.enter_context(written_whole(options.output)) if options.output else sys.stdout.buffer
        # Rows on the same terminal would be drawn over by a bar, and show the progress themselves.
        bar = options.output is not None or not sys.stdout.isatty()
        progress = opened.enter_context(
            BaseProgress("classify", _estimate_bases(options.sources), lines_elsewhere=False, bar=bar)
        )
        stream.write(table_header(classifier.class_names))
        stream.flush()
        for source in options.sources:
            for row in classifier.classify(source, progress):
                stream.write(table_row(row, len(classifier.class_names)))
                stream.flush()
                summary.add(row)
                progress.advance(0, f"{summary.record_count:,} records")
    if options.report is not None:
        from mambapipelines.report import classification_page  # noqa: PLC0415 - matplotlib, only when asked for

        write_whole(options.report, classification_page(summary, options.model_folder, options.sources))
    seconds = time.monotonic() - start_seconds
    calls = ", ".join(f"{count:,} {call}" for call, count in sorted(summary.records.items()))
    note(f"{summary.record_count:,} records of {summary.base_count:,} bp in {seconds:.1f} s: {calls}")
    return summary


def table_header(class_names: Sequence[str]) -> bytes:
    """The first line of the table, UTF-8."""
    return (
        "\t".join(["record", "length", "call", "probability", *(f"p_{name}" for name in class_names)]).encode() + b"\n"
    )


def table_row(row: Classification, class_count: int) -> bytes:
    """One line of the table, UTF-8."""
    if row.probabilities is None:
        figures = [NOT_AVAILABLE] * (1 + class_count)
    else:
        figures = [f"{value:.6f}" for value in (row.probability, *row.probabilities)]
    return "\t".join([row.name, str(row.length), row.call, *figures]).encode("utf-8", "replace") + b"\n"


def _check_places(options: ClassificationOptions) -> None:
    """Refuse inputs that cannot be read, and outputs that would overwrite something, before any work is done."""
    if not options.sources:
        raise InputError("there is nothing to classify: name a FASTA file, or '-' for standard input.")
    if list(options.sources).count(STANDARD_INPUT) > 1:
        raise InputError("standard input ('-') is named twice: it can be read only once.")
    for source in options.sources:
        # A pipe must not be looked into, because what is read from it is gone.
        if source != STANDARD_INPUT and (not os.path.exists(source) or os.path.isdir(source) or os.path.isfile(source)):
            is_gzipped(source)
    for path, option in ((options.output, "--output"), (options.report, "--report")):
        if path is None:
            continue
        check_writable_place(path, option)
        for source in options.sources:
            if source != STANDARD_INPUT and path.is_file() and os.path.samefile(path, source):
                raise InputError(f"{option} {path} is also an input: choose another name.")
    if (
        options.output is not None
        and options.report is not None
        and options.output.resolve() == options.report.resolve()
    ):
        raise InputError(f"--output and --report are both {options.output}: choose two names.")


def _estimate_bases(sources: Sequence[str]) -> int | None:
    """About how many bases there are, for the time left; `None` when a source is compressed or not a file."""
    total_bytes = 0
    for source in sources:
        if source == STANDARD_INPUT or not os.path.isfile(source) or is_gzipped(source):
            return None
        total_bytes += os.path.getsize(source)
    return round(total_bytes * BASES_PER_BYTE)
