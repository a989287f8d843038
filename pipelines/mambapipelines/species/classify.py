"""Species classification of files: records of any length, streamed through the model's state in bounded memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from genomamba.classification.evidence import PIECE_LENGTH_BP, RecordEvidence
from genomamba.classification.novelty import LikelihoodQuantiles
from genomamba.classification.records import Classification, Groups, RecordClassifier, Share
from genomamba.io.compression import STANDARD_INPUT, is_compressed
from genomamba.models.species_classifier import load_classifier
from mambacore.errors import InputError
from mambacore.safe_text import table_line
from mambapipelines.console import WorkProgress, counted, note
from mambapipelines.device import Placement, begin_computing
from mambapipelines.files import check_writable_place, written_whole
from mambapipelines.species.mates import answer_pair, interleaved, pairs
from mambapipelines.species.outputs import CallSinks, biom_text, group_rule, kraken_report, multiqc_text
from mambapipelines.species.processes import (
    evidence_by_processes,
    evidence_by_torchrun,
    rereadable_sources,
    torchrun_share,
    write_part,
)
from mambapipelines.species.rows import (
    HISTOGRAM_BINS,
    MOST_LISTED_RECORDS,
    MOST_PLOTTED_RECORDS,
    NOT_AVAILABLE,
    ClassificationSummary,
    table_header,
    table_row,
)
from mambapipelines.species.shards import merged_shards, parse_shard, shard_settings, write_shard

# Re-exported for modules that use a classification.
__all__ = [
    "HISTOGRAM_BINS",
    "MOST_LISTED_RECORDS",
    "MOST_PLOTTED_RECORDS",
    "NOT_AVAILABLE",
    "Classification",
    "ClassificationOptions",
    "ClassificationSummary",
    "RecordClassifier",
    "classify_files",
    "table_header",
    "table_row",
]

# A line of 80 bases has 81 bytes; only for the estimate of the time left.
BASES_PER_BYTE: Final = 80 / 81


@dataclass(frozen=True)
class ClassificationOptions:
    """Options of `genomamba classify`.

    Attributes:
        model_folder: folder written by `genomamba train`.
        sources: FASTA or FASTQ files, plain or gzipped; "-" is standard input.
        output: file for the table; `None` is standard output.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        minimum_length: records of fewer bases are `unclassified`.
        unknown_below: records whose best class has a smaller probability are `unknown`.
        report: HTML page to write.
        piece_length: bases processed at once; the result does not depend on it.
        unknown_rate: records whose p-value against held-out windows is below this are `unknown`.
        unknown_shared: records of whose long words no class has this share are `unknown`.
        group_by: which records belong together (see `outputs.group_rule`).
        groups_output: file for the table of groups.
        multiqc: summary for MultiQC, named `..._mqc.tsv`.
        classified_output: folder, or file name with {call}, for the sequences of each class.
        unclassified_output: file for the sequences of `unknown` and `unclassified` records.
        processes: number of processes, each with `threads` threads.
        kraken_report: file for the calls in the format of Kraken's report.
        biom: file for the records of each source by call, as a BIOM table.
        parts: folder of what independent jobs found (see `shards`); merged into the outputs unless `shard` is given.
        shard: "K/N", compute the K-th of N shards into `parts` and nothing else.
        paired: mates, which follow each other in one source or are in two sources, are one call.
        device, precision: see `mambapipelines.device.choose`.
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
    unknown_shared: float = 0.0
    group_by: str | None = None
    groups_output: Path | None = None
    multiqc: Path | None = None
    classified_output: str | None = None
    unclassified_output: Path | None = None
    processes: int = 1
    paired: bool = False
    kraken_report: Path | None = None
    biom: Path | None = None
    parts: Path | None = None
    shard: str | None = None
    device: str = "auto"
    precision: str = "float32"


def classify_files(options: ClassificationOptions) -> ClassificationSummary:
    """Classify the records of FASTA and FASTQ files; the table goes to a file or standard output, row after row.

    Columns are tab-separated: `record`, `length` (bp), `call`, `probability` (of the best class), then `p_NAME` for
    every class, `p_value` with `unknown_rate` and `shared` with `unknown_shared`. Probabilities and shares have six
    decimals, and are NA where the call is `unclassified`. Under `torchrun` only the first process writes; the others
    return an empty summary.

    Raises:
        InputError: anything wrong with the options, the model folder or the files. No output file is left behind.
    """
    _check_places(options)
    _check_shards(options)
    launched = torchrun_share()
    if options.processes < 1:
        raise InputError(f"--processes is {options.processes}: give 1 or more.")
    if launched is not None:
        _refuse_under_torchrun(options)
    placement = begin_computing(options.device, options.precision, options.threads)
    classifier = _make_classifier(options, placement)
    start_seconds = time.monotonic()
    with ExitStack() as opened:
        opened.enter_context(placement.autocast())
        sources: Sequence[str] = options.sources
        labels = sources
        if options.paired:
            sources, labels = opened.enter_context(interleaved(sources))
        sinks = None
        if options.classified_output is not None or options.unclassified_output is not None:
            sinks = CallSinks(options.classified_output, options.unclassified_output, classifier.class_names)
            opened.callback(sinks.remove_empty_folder)
            _refuse_inputs(sinks.paths, options.sources, "--classified-out or --unclassified-out")
        if sinks is not None or options.processes > 1:
            sources = opened.enter_context(rereadable_sources(sources))
        # On a terminal the rows themselves show the progress, and a bar would overwrite them.
        bar = (options.output is not None or not sys.stdout.isatty()) and (launched is None or launched.rank == 0)
        progress = WorkProgress("classify", _estimate_bases(sources), lines_elsewhere=False, bar=bar)
        opened.enter_context(progress)
        records: Iterator[RecordEvidence] | None
        shards = None
        if options.parts is not None:
            shards = shard_settings(options.model_folder, options.sources, options.piece_length, options.paired)
        if options.shard is not None and options.parts is not None and shards is not None:
            share = parse_shard(options.shard)
            write_shard(lambda own: classifier.evidence(sources, own, progress.advance), share, options.parts, shards)
            note(f"shard {options.shard} is in {options.parts}")
            return ClassificationSummary(classifier.class_names)
        if options.parts is not None and shards is not None:
            records = merged_shards(options.parts, shards)
        elif launched is not None:
            records = opened.enter_context(
                evidence_by_torchrun(lambda share: classifier.evidence(sources, share), launched)
            )
        elif options.processes > 1:
            settings = replace(options, sources=tuple(sources))
            records = opened.enter_context(
                evidence_by_processes(
                    _work_on_share, (settings,), options.processes, lambda: progress.advance(0, "working")
                )
            )
        else:
            records = (record for _, record in classifier.evidence(sources, Share(), progress.advance))
        if records is None:
            return ClassificationSummary(classifier.class_names)
        summary = _write_answers(options, classifier, records, sinks, (sources, labels), progress)
    seconds = time.monotonic() - start_seconds
    calls = ", ".join(f"{count:,} {call}" for call, count in sorted(summary.records.items()))
    note(f"{counted(summary.record_count, 'record')} of {summary.base_count:,} bp in {seconds:.1f} s: {calls}")
    return summary


def _make_classifier(options: ClassificationOptions, placement: Placement) -> RecordClassifier:
    model, details = load_classifier(options.model_folder)
    quantiles = None
    if 0 < options.unknown_rate < 1:
        quantiles = LikelihoodQuantiles.from_details(details, options.unknown_rate)
    return RecordClassifier(
        model.to(placement.device),
        options.minimum_length,
        options.unknown_below,
        options.piece_length,
        options.unknown_rate,
        quantiles,
        options.unknown_shared,
    )


def _work_on_share(share: Share, folder: Path, options: ClassificationOptions) -> None:
    """Work of one of several processes; the message of an `InputError` is left in the folder."""
    placement = begin_computing(options.device, options.precision, options.threads, announced=False)
    classifier = _make_classifier(options, placement)
    try:
        with placement.autocast():
            write_part(lambda own: classifier.evidence(options.sources, own), share, folder)
    except InputError:
        sys.exit(2)


def _write_answers(
    options: ClassificationOptions,
    classifier: RecordClassifier,
    records: Iterator[RecordEvidence],
    sinks: CallSinks | None,
    sources: tuple[Sequence[str], Sequence[str]],
    progress: WorkProgress,
) -> ClassificationSummary:
    """Write the table and all other outputs; files appear when all are complete, the table last.

    `sources` are the paths that are read, and what they are called.
    """
    paths, labels = sources
    summary = ClassificationSummary(classifier.class_names)
    groups = Groups(group_rule(options.group_by)) if options.group_by is not None else None
    counts_by_source: dict[str, dict[str, int]] = {label: {} for label in labels}
    with ExitStack() as written:
        stream = written.enter_context(written_whole(options.output)) if options.output else sys.stdout.buffer
        stream.write(table_header(classifier.class_names, classifier.extra_columns))
        stream.flush()
        alone = 0
        for mates in pairs(records) if options.paired else ([record] for record in records):
            row = answer_pair(classifier, mates)
            alone += len(mates) == 1
            stream.write(table_row(row, len(classifier.class_names), classifier.extra_columns))
            if options.output is None:
                stream.flush()  # a reader at the other end of a pipe sees every row immediately
            summary.add(row)
            counts = counts_by_source[labels[mates[0].source]]
            counts[row.call] = counts.get(row.call, 0) + 1
            for record in mates:
                if groups is not None:
                    groups.add(record, row.p_value)
                if sinks is not None:
                    sinks.add(row.call)
            progress.advance(0, counted(summary.record_count, "record"))
        stream.flush()
        if groups is not None and options.groups_output is not None:
            _write_beside(written, options.groups_output, _group_table(classifier, groups))
        _note_unpaired(alone if options.paired else 0, summary.record_count)
        if groups is not None and groups.without:
            note(f"{counted(groups.without, 'record')} in no group of --group-by, left out of its table")
        if options.multiqc is not None:
            text = multiqc_text(counts_by_source, classifier.class_names)
            _write_beside(written, options.multiqc, text.encode())
        if options.kraken_report is not None:
            text = kraken_report(summary.records, classifier.class_names)
            _write_beside(written, options.kraken_report, text.encode())
        if options.biom is not None:
            _write_beside(written, options.biom, biom_text(counts_by_source, classifier.class_names).encode())
        if options.report is not None:
            from mambapipelines.species.report import classification_page  # noqa: PLC0415 - matplotlib, only when asked for

            page = classification_page(summary, options.model_folder, options.sources)
            _write_beside(written, options.report, page.encode())
        if sinks is not None:
            sinks.write(paths, written)
    return summary


def _note_unpaired(alone: int, calls: int) -> None:
    """Report how many reads of `--paired` had no mate."""
    if alone:
        hint = "" if alone < calls else ": mates have one name, or names that end in /1 and /2"
        note(f"{counted(alone, 'record')} without a mate, called alone{hint}")


def _write_beside(written: ExitStack, path: Path, content: bytes) -> None:
    """Write a file that appears when `written` is left, before those opened earlier."""
    stream: BinaryIO = written.enter_context(written_whole(path))
    stream.write(content)
    stream.flush()  # a full disk is noticed before any file has got its name


def _group_table(classifier: RecordClassifier, groups: Groups) -> bytes:
    """One row per group: group, records, length (classified bp), then the columns of the table of records."""
    header = _cells(table_header(classifier.class_names, classifier.extra_columns))
    lines = [_line(["group", "records", *header[1:]])]
    for name, group in groups.by_name.items():
        row = table_row(classifier.answer_group(name, group), len(classifier.class_names), classifier.extra_columns)
        name_cell, *figures = _cells(row)
        lines.append(_line([name_cell, str(group.records), *figures]))
    return b"".join(lines)


def _cells(line: bytes) -> list[str]:
    return line.decode().rstrip("\n").split("\t")


def _line(cells: Sequence[str]) -> bytes:
    return table_line(cells).encode() + b"\n"


def _check_places(options: ClassificationOptions) -> None:
    """Refuse unreadable inputs and outputs that would overwrite an input, before any work is done."""
    if not options.sources:
        raise InputError("there is nothing to classify: name a FASTA or FASTQ file, or '-' for standard input.")
    if list(options.sources).count(STANDARD_INPUT) > 1:
        raise InputError("standard input ('-') is named twice: it can be read only once.")
    for source in options.sources:
        # Reading ahead from a pipe would lose data.
        if source != STANDARD_INPUT and (not os.path.exists(source) or os.path.isdir(source) or os.path.isfile(source)):
            is_compressed(source)
    places = {
        "--output": options.output,
        "--report": options.report,
        "--groups-output": options.groups_output,
        "--multiqc": options.multiqc,
        "--kraken-report": options.kraken_report,
        "--biom": options.biom,
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
        check_writable_place(path, option, (*options.sources, options.group_by))
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise InputError(f"{other} and {option} are both {path}: choose two names.")


def _refuse_inputs(paths: Sequence[Path], sources: Sequence[str], option: str) -> None:
    for path in paths:
        for source in sources:
            if source != STANDARD_INPUT and path.is_file() and os.path.samefile(path, source):
                raise InputError(f"{option} {path} is also an input: choose another name.")


def _check_shards(options: ClassificationOptions) -> None:
    """Refuse what makes no sense with `--shard` and `--parts`."""
    if options.shard is not None:
        parse_shard(options.shard)
        if options.parts is None:
            raise InputError("--shard needs a folder for what it finds: add --parts DIR.")
        written = (
            options.output, options.report, options.groups_output, options.multiqc, options.kraken_report, options.biom,
            options.classified_output, options.unclassified_output,
        )  # fmt: skip
        if any(place is not None for place in written):
            raise InputError("--shard writes into --parts only: give the other outputs to the call that merges.")
    if options.parts is not None and (options.processes > 1 or torchrun_share() is not None):
        raise InputError("--parts is for independent jobs: leave out --processes and torchrun.")


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
    """Approximate number of bases, for the time left; `None` if a source is compressed or not a file."""
    total_bytes = 0
    for source in sources:
        if source == STANDARD_INPUT or not os.path.isfile(source) or is_compressed(source):
            return None
        total_bytes += os.path.getsize(source)
    return round(total_bytes * BASES_PER_BYTE)
