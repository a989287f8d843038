"""Which species is each record from? Records of any length, streamed through the model's state in bounded memory."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt
import torch

from genomamba.fasta import STANDARD_INPUT, SpooledRecord, is_gzipped, spool_records
from genomamba.fastq import read_sequence_events
from genomamba.genomes import UNCLASSIFIED
from genomamba.models import SpeciesClassifier, load_classifier
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambapipelines.calibration import PIECE_LENGTH_BP, FloatArray
from mambapipelines.classification_batches import RecordEvidence, count_known, evidence_of_records
from mambapipelines.classification_outputs import UNKNOWN, CallSinks, Group, Groups, group_rule, write_multiqc
from mambapipelines.classification_processes import (
    Share,
    evidence_by_processes,
    evidence_by_torchrun,
    rereadable_sources,
    torchrun_share,
    write_part,
)
from mambapipelines.classification_unknown import LikelihoodQuantiles, best_likelihood
from mambapipelines.console import BaseProgress, check_writable_place, note, use_threads, write_whole, written_whole

NOT_AVAILABLE: Final = "NA"
# Short records wait for others of similar length, which go through the model together; the waiting is bounded.
MOST_WAITING_RECORDS: Final = 1024
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
        sources: FASTA or FASTQ files, plain or gzipped; "-" is standard input.
        output: where the table goes; `None` is standard output.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        minimum_length: records of fewer bases are `unclassified`.
        unknown_below: records whose best class has a smaller probability are `unknown`.
        report: HTML page to write.
        piece_length: bases that go through the model at once; the result does not depend on it.
        unknown_rate: records that fewer than this share of held-out windows are as unlikely as are `unknown`.
        group_by: which records belong together (`classification_outputs.group_rule`).
        groups_output: where the table of groups goes.
        multiqc: summary for MultiQC to write, named `..._mqc.tsv`.
        classified_output: folder, or name with {call}, for the sequences of each class.
        unclassified_output: file for the sequences of records called `unknown` or `unclassified`.
        processes: how many share the work, each with `threads` threads.
    """

    model_folder: Path
    sources: Sequence[str]
    output: Path | None = None
    threads: int | None = None
    minimum_length: int = 1
    unknown_below: float = 0.0
    report: Path | None = None
    piece_length: int = PIECE_LENGTH_BP
    unknown_rate: float = 0.0
    group_by: str | None = None
    groups_output: Path | None = None
    multiqc: Path | None = None
    classified_output: str | None = None
    unclassified_output: Path | None = None
    processes: int = 1


@dataclass(frozen=True)
class Classification:
    """The answer for one record; `probabilities` has one value per class and is `None` when `unclassified`.

    `typicality` is the share of held-out windows that are as unlikely as the record, where that was asked for.
    """

    name: str
    length: int
    call: str
    probabilities: FloatArray | None = field(compare=False)
    typicality: float | None = field(default=None, compare=False)

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
        unknown_rate: float = 0.0,
        quantiles: LikelihoodQuantiles | None = None,
    ) -> None:
        """Get ready; the arguments are as in `ClassificationOptions`, and `unknown_rate` needs `quantiles`.

        Raises:
            InputError: an argument is out of its range, or `unknown` would be ambiguous.
        """
        if minimum_length < 0:
            raise InputError(f"--min-length is {minimum_length}: give 0 or more bases.")
        if not 0 <= unknown_below <= 1:
            raise InputError(f"--unknown-below is {unknown_below}: give a probability from 0 to 1.")
        if piece_length < 1:
            raise InputError(f"--piece-length is {piece_length}: give 1 or more bases.")
        if not 0 <= unknown_rate < 1:
            raise InputError(f"--unknown-rate is {unknown_rate}: give a share from 0 to below 1.")
        self.class_names = tuple(model.config.class_names)
        if (unknown_below > 0 or unknown_rate > 0) and UNKNOWN in self.class_names:
            raise InputError(
                f"the model has a class named '{UNKNOWN}', which is what --unknown-below and --unknown-rate call "
                "records: leave the options out and filter by the column of probabilities."
            )
        self._model = model.eval()
        self._minimum_length = max(1, minimum_length)
        self._unknown_below = unknown_below
        self._piece_length = piece_length
        self._unknown_rate = unknown_rate
        self._quantiles = quantiles if unknown_rate > 0 else None

    @property
    def rates_typicality(self) -> bool:
        """Whether answers say how typical a record is."""
        return self._quantiles is not None

    def classify(self, source: str | BinaryIO, progress: BaseProgress | None = None) -> Iterator[Classification]:
        """Yield the answer for every record of a FASTA or FASTQ source, in its order.

        Records that follow each other closely go through the model together when they are of similar length; the
        answers do not depend on that, nor on the length of the pieces that longer records are cut into.

        Raises:
            InputError: the source is neither; earlier records may have been answered by then.
        """
        for _, record in self.evidence([source], Share(), progress):
            yield self.answer(record)

    def evidence(
        self, sources: Sequence[str | BinaryIO], share: Share, progress: BaseProgress | None = None
    ) -> Iterator[tuple[int, RecordEvidence]]:
        """Yield (number of the batch, evidence) for the records of a share of the batches, in the order of the input.

        Raises:
            InputError: a source is neither FASTA nor FASTQ of nucleotides.
        """
        batch = 0
        for place, source in enumerate(sources):
            waiting: list[_WaitingRecord] = []
            waiting_bases = 0
            with closing(spool_records(source, events_of=read_sequence_events)) as records:  # type: ignore[type-var]
                for record in records:
                    is_long = record.length > self._piece_length and record.length >= self._minimum_length
                    full = len(waiting) >= MOST_WAITING_RECORDS or waiting_bases >= MOST_WAITING_BASES
                    if waiting and (is_long or full):
                        yield from self._evidence_of_waiting(waiting, batch, share, place)
                        waiting, waiting_bases, batch = [], 0, batch + 1
                    if is_long:
                        if share.has(batch):
                            yield batch, replace(self._evidence_of_long(record, progress), source=place)
                        batch += 1
                        continue
                    waiting.append(self._take(record, share.has(batch)))
                    waiting_bases += record.length
                    if progress is not None:
                        progress.advance(record.length)
            if waiting:
                yield from self._evidence_of_waiting(waiting, batch, share, place)
                batch += 1

    def _take(self, record: SpooledRecord, wanted: bool) -> _WaitingRecord:
        if not wanted or record.length < self._minimum_length:
            return _WaitingRecord(record.name, record.length, None)
        return _WaitingRecord(record.name, record.length, next(record.forward_pieces(record.length)))

    def _evidence_of_waiting(
        self, waiting: Sequence[_WaitingRecord], batch: int, share: Share, source: int
    ) -> Iterator[tuple[int, RecordEvidence]]:
        if not share.has(batch):
            return
        tokens = [record.tokens for record in waiting if record.tokens is not None]
        rows = iter(evidence_of_records(self._model, tokens))
        for record in waiting:
            if record.tokens is None:
                yield batch, RecordEvidence(record.name, record.length, 0, None, source)
            else:
                yield batch, RecordEvidence(record.name, record.length, count_known(record.tokens), next(rows), source)

    @torch.inference_mode()
    def _evidence_of_long(self, record: SpooledRecord, progress: BaseProgress | None) -> RecordEvidence:
        """Evidence of a record that is streamed through the state, both strands side by side."""
        state, known_bases = None, 0
        strands = zip(
            record.forward_pieces(self._piece_length), record.reverse_complement_pieces(self._piece_length), strict=True
        )
        for forward, reverse in strands:
            mean_evidence, state = self._model(torch.from_numpy(np.stack([forward, reverse])), state)
            known_bases += count_known(forward)
            if progress is not None:
                progress.advance(len(forward))
        evidence = mean_evidence.double().mean(dim=0).numpy()
        return RecordEvidence(record.name, record.length, known_bases, evidence)

    @torch.inference_mode()
    def answer(self, record: RecordEvidence) -> Classification:
        """The call of a record from its evidence."""
        if record.evidence is None:
            return Classification(record.name, record.length, UNCLASSIFIED, None)
        logits = self._model.logits(torch.from_numpy(record.evidence)[None], record.length)
        probabilities = torch.softmax(logits, dim=-1)[0].numpy()
        best = int(probabilities.argmax())
        typicality = None
        if self._quantiles is not None:
            score = best_likelihood(record.evidence, record.known_bases / record.length)
            # A record of unknown bases only is like nothing.
            typicality = self._quantiles.typicality(float(score), record.length) if record.known_bases else 0.0
        unknown = probabilities[best] < self._unknown_below
        unknown |= typicality is not None and typicality < self._unknown_rate
        return Classification(
            record.name, record.length, UNKNOWN if unknown else self.class_names[best], probabilities, typicality
        )

    def answer_group(self, name: str, group: Group) -> Classification:
        """The call of records whose evidence is added up, with the confidence of one record of their joint length.

        Evidence is a log-likelihood ratio, so that of records that are all from one class adds up. The confidence was
        calibrated on stretches of one chromosome: groups of records that repeat each other are called too surely.
        """
        if not group.bases:
            return Classification(name, 0, UNCLASSIFIED, None)
        logits = self._model.logits(torch.from_numpy(group.total / group.bases)[None], group.bases).detach()
        probabilities = torch.softmax(logits, dim=-1)[0].numpy()
        best = int(probabilities.argmax())
        unknown = probabilities[best] < self._unknown_below
        return Classification(name, group.bases, UNKNOWN if unknown else self.class_names[best], probabilities)


@dataclass(frozen=True)
class _WaitingRecord:
    """A short record; without tokens it is too short to be classified, or another process's."""

    name: str
    length: int
    tokens: Tokens | None


def classify_files(options: ClassificationOptions) -> ClassificationSummary:
    """Classify the records of FASTA and FASTQ files; the table goes to a file or standard output, row after row.

    Columns are tab-separated: `record`, `length` (bp), `call`, `probability` (of the best class), then `p_NAME` for
    every class, and `typicality` with `unknown_rate`. Probabilities have six decimals, and are NA where the call is
    `unclassified`. Under `torchrun` only the first process writes; the others return an empty summary.

    Raises:
        InputError: anything wrong with the options, the model folder or the files. No output file is left then.
    """
    _check_places(options)
    launched = torchrun_share()
    if options.processes < 1:
        raise InputError(f"--processes is {options.processes}: give 1 or more.")
    if launched is not None:
        _refuse_under_torchrun(options)
    use_threads(options.threads)
    classifier = _make_classifier(options)
    start_seconds = time.monotonic()
    with ExitStack() as opened:
        sources: Sequence[str] = options.sources
        sinks = None
        if options.classified_output is not None or options.unclassified_output is not None:
            sinks = CallSinks(options.classified_output, options.unclassified_output, classifier.class_names)
            _refuse_inputs(sinks.paths, options.sources, "--classified-out or --unclassified-out")
        if sinks is not None or options.processes > 1:
            sources = opened.enter_context(rereadable_sources(options.sources))
        # Rows on the same terminal would be drawn over by a bar, and show the progress themselves.
        bar = (options.output is not None or not sys.stdout.isatty()) and (launched is None or launched.rank == 0)
        progress = BaseProgress("classify", _estimate_bases(sources), lines_elsewhere=False, bar=bar)
        opened.enter_context(progress)
        records: Iterator[RecordEvidence] | None
        if launched is not None:
            records = opened.enter_context(
                evidence_by_torchrun(lambda share: classifier.evidence(sources, share), launched)
            )
        elif options.processes > 1:
            settings = replace(options, sources=tuple(sources))
            records = opened.enter_context(
                evidence_by_processes(
                    partial(_work_on_share, settings), options.processes, lambda: progress.advance(0, "working")
                )
            )
        else:
            records = (record for _, record in classifier.evidence(sources, Share(), progress))
        if records is None:
            return ClassificationSummary(classifier.class_names)
        summary = _write_answers(options, classifier, records, sinks, sources, progress)
    if options.report is not None:
        from mambapipelines.report import classification_page  # noqa: PLC0415 - matplotlib, only when asked for

        write_whole(options.report, classification_page(summary, options.model_folder, options.sources))
    seconds = time.monotonic() - start_seconds
    calls = ", ".join(f"{count:,} {call}" for call, count in sorted(summary.records.items()))
    note(f"{summary.record_count:,} records of {summary.base_count:,} bp in {seconds:.1f} s: {calls}")
    return summary


def _make_classifier(options: ClassificationOptions) -> RecordClassifier:
    model, details = load_classifier(options.model_folder)
    quantiles = None
    if 0 < options.unknown_rate < 1:
        quantiles = LikelihoodQuantiles.from_details(details, options.unknown_rate)
    return RecordClassifier(
        model,
        options.minimum_length,
        options.unknown_below,
        options.piece_length,
        options.unknown_rate,
        quantiles,
    )


def _work_on_share(options: ClassificationOptions, share: Share, folder: str) -> None:
    """What one of several processes does; a sentence for the user is left in the folder."""
    use_threads(options.threads)
    classifier = _make_classifier(options)
    try:
        write_part(lambda own: classifier.evidence(options.sources, own), share, Path(folder))
    except InputError:
        sys.exit(2)


def _write_answers(
    options: ClassificationOptions,
    classifier: RecordClassifier,
    records: Iterator[RecordEvidence],
    sinks: CallSinks | None,
    sources: Sequence[str],
    progress: BaseProgress,
) -> ClassificationSummary:
    """Write the table and everything beside it."""
    summary = ClassificationSummary(classifier.class_names)
    groups = Groups(group_rule(options.group_by)) if options.group_by is not None else None
    counts_by_source: dict[str, dict[str, int]] = {source: {} for source in options.sources}
    with ExitStack() as opened:
        stream = opened.enter_context(written_whole(options.output)) if options.output else sys.stdout.buffer
        stream.write(table_header(classifier.class_names, classifier.rates_typicality))
        stream.flush()
        for record in records:
            row = classifier.answer(record)
            stream.write(table_row(row, len(classifier.class_names), classifier.rates_typicality))
            stream.flush()
            summary.add(row)
            counts = counts_by_source[options.sources[record.source]]
            counts[row.call] = counts.get(row.call, 0) + 1
            if groups is not None:
                groups.add(record.name, record.length, record.evidence)
            if sinks is not None:
                sinks.add(row.call)
            progress.advance(0, f"{summary.record_count:,} records")
        if groups is not None and options.groups_output is not None:
            write_whole(options.groups_output, _group_table(classifier, groups))
        if groups is not None and groups.without:
            note(f"{groups.without:,} records belong to no group of --group-by and are in none of its rows")
        if options.multiqc is not None:
            write_multiqc(options.multiqc, counts_by_source, classifier.class_names)
        if sinks is not None:
            sinks.write(sources)
    return summary


def _group_table(classifier: RecordClassifier, groups: Groups) -> bytes:
    """One row per group: group, records, length (classified bp), call, probability, p_NAME for every class."""
    header = table_header(classifier.class_names).split(b"\t")
    lines = [b"\t".join([b"group", b"records", *header[1:]])]
    for name, group in groups.by_name.items():
        cells = table_row(classifier.answer_group(name, group), len(classifier.class_names)).split(b"\t")
        lines.append(b"\t".join([cells[0], str(group.records).encode(), *cells[1:]]))
    return b"".join(lines)


def table_header(class_names: Sequence[str], typicality: bool = False) -> bytes:
    """The first line of the table, UTF-8."""
    columns = ["record", "length", "call", "probability", *(f"p_{name}" for name in class_names)]
    return "\t".join(columns + ["typicality"] * typicality).encode() + b"\n"


def table_row(row: Classification, class_count: int, typicality: bool = False) -> bytes:
    """One line of the table, UTF-8."""
    if row.probabilities is None:
        figures = [NOT_AVAILABLE] * (1 + class_count)
    else:
        figures = [f"{value:.6f}" for value in (row.probability, *row.probabilities)]
    if typicality:
        figures.append(NOT_AVAILABLE if row.typicality is None else f"{row.typicality:.6f}")
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
    places = {
        "--output": options.output,
        "--report": options.report,
        "--groups-output": options.groups_output,
        "--multiqc": options.multiqc,
        "--unclassified-out": options.unclassified_output,
    }
    if (options.group_by is None) != (options.groups_output is None):
        raise InputError("--group-by and --groups-output belong together: give both or neither.")
    if options.group_by is not None:
        group_rule(options.group_by)
    if options.multiqc is not None and not options.multiqc.name.endswith("_mqc.tsv"):
        raise InputError(f"--multiqc {options.multiqc}: MultiQC finds only names that end in _mqc.tsv.")
    taken: dict[Path, str] = {}
    for option, path in places.items():
        if path is None:
            continue
        check_writable_place(path, option)
        _refuse_inputs([path], options.sources, option)
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise InputError(f"{other} and {option} are both {path}: choose two names.")


def _refuse_inputs(paths: Sequence[Path], sources: Sequence[str], option: str) -> None:
    for path in paths:
        for source in sources:
            if source != STANDARD_INPUT and path.is_file() and os.path.samefile(path, source):
                raise InputError(f"{option} {path} is also an input: choose another name.")


def _refuse_under_torchrun(options: ClassificationOptions) -> None:
    if options.processes > 1:
        raise InputError("--processes is given under torchrun, which starts processes itself: leave it out.")
    for source in options.sources:
        if source == STANDARD_INPUT or (os.path.exists(source) and not os.path.isfile(source)):
            raise InputError(
                f"{'standard input' if source == STANDARD_INPUT else source} can be read only once, and every process "
                "of torchrun reads all input: write it to a file, or use --processes."
            )


def _estimate_bases(sources: Sequence[str]) -> int | None:
    """About how many bases there are, for the time left; `None` when a source is compressed or not a file."""
    total_bytes = 0
    for source in sources:
        if source == STANDARD_INPUT or not os.path.isfile(source) or is_gzipped(source):
            return None
        total_bytes += os.path.getsize(source)
    return round(total_bytes * BASES_PER_BYTE)
