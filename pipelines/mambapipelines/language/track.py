"""Log-likelihood tracks along a genome: the run behind `genomamba track`, written as bedGraph or bigWig."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

import numpy as np

from genomamba.data.bed import Region, merged, parse_region, read_bed
from genomamba.io.reference import Reference
from genomamba.models.language_model import load_language_model
from genomamba.scoring.tracks import TrackMaker, TrackPiece, runs
from mambacore.errors import InputError
from mambacore.safe_text import safe_field, table_line
from mambapipelines.console import WorkProgress, note
from mambapipelines.device import begin_computing
from mambapipelines.files import check_writable_place, written_whole

BIGWIG_ENDINGS = (".bw", ".bigwig")


@dataclass(frozen=True)
class TrackOptions:
    """Options of `genomamba track`; its `--help` describes each."""

    model: str
    reference: str
    output: Path | None
    regions: list[str]
    bed: str | None
    both_strands: bool
    context: int
    window: int
    threads: int | None
    device: str = "auto"
    precision: str = "float32"
    igv_session: Path | None = None


def run_track(options: TrackOptions) -> None:
    """Write the log-likelihood of every base of the regions, and a summary per contig.

    Raises:
        InputError: the files or options contradict each other.
    """
    if options.igv_session is not None:
        if options.output is None:
            raise InputError("--igv-session opens the file of --output: give both.")
        if options.igv_session.suffix != ".xml":
            raise InputError(f"--igv-session {options.igv_session}: IGV opens sessions whose names end in .xml.")
        check_writable_place(options.igv_session, "--igv-session", (options.reference, options.bed))
    if options.output is not None:
        check_writable_place(options.output, "--output", (options.reference, options.bed))
        if _is_bigwig(options.output) and importlib.util.find_spec("pyBigWig") is None:
            raise InputError(
                "writing bigWig needs pyBigWig, which is not installed: `pip install 'genomamba[tables]'`, or name a "
                "file that ends in .bedgraph."
            )
    placement = begin_computing(options.device, options.precision, options.threads)
    with Reference(options.reference) as genome:
        regions = _regions(options, genome)
        language_model = load_language_model(options.model).to(placement.device)
        maker = TrackMaker(language_model, genome, options.both_strands, options.context, options.window)
        sums: dict[str, tuple[float, int, int]] = {}
        total = sum(region.end - region.start for region in regions) * maker.readings
        with (
            _writer(options.output, genome.lengths) as writer,
            WorkProgress("reading", total, lines_elsewhere=True) as progress,
            placement.autocast(),
        ):
            for region in regions:
                for piece in maker.pieces(region):
                    if isinstance(piece, int):
                        progress.advance(piece)
                        continue
                    writer.write(piece)
                    scored = piece.values[~np.isnan(piece.values)].astype(np.float64)
                    log_likelihood, bases, positions = sums.get(region.contig, (0.0, 0, 0))
                    sums[region.contig] = (
                        log_likelihood + float(scored.sum()),
                        bases + len(scored),
                        positions + len(piece.values),
                    )
    if options.igv_session is not None and options.output is not None:
        with written_whole(options.igv_session) as stream:
            stream.write(igv_session(options.igv_session, options.output, options.reference, regions))
    _summarise(sums)


def igv_session(session: Path, track: Path, reference: str, regions: Sequence[Region]) -> bytes:
    """A session of IGV (igv.org) that shows a track of the reference, at the first region.

    Paths are relative to the session's folder, so that all three can be moved together.
    """
    place = session.resolve().parent
    path = os.path.relpath(track.resolve(), place)
    root = ElementTree.Element("Session", genome=os.path.relpath(Path(reference).resolve(), place), version="8")
    if regions:
        root.set("locus", f"{regions[0].contig}:{regions[0].start + 1}-{regions[0].end}")
    resources = ElementTree.SubElement(root, "Resources")
    ElementTree.SubElement(resources, "Resource", path=path, type="bigwig" if _is_bigwig(track) else "bedgraph")
    panel = ElementTree.SubElement(root, "Panel", name="DataPanel")
    ElementTree.SubElement(
        panel, "Track", id=path, name="log-likelihood (nats)", renderer="LINE_PLOT", windowFunction="mean", height="80"
    )
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _regions(options: TrackOptions, genome: Reference) -> list[Region]:
    if options.bed is not None and options.regions:
        raise InputError("--bed and --region both say where: give one of them.")
    if options.bed is not None:
        regions = read_bed(options.bed, genome.lengths, options.reference)
    elif options.regions:
        regions = [parse_region(text, genome.lengths, options.reference) for text in options.regions]
    else:
        regions = [Region(name, 0, length) for name, length in genome.lengths.items() if length]
    return merged(regions, genome.lengths)


class _Writer(Protocol):
    def write(self, piece: TrackPiece) -> None: ...


class _BedGraph:
    """Writes lines of contig, start, end and value; bases without a value get no line."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, piece: TrackPiece) -> None:
        contig = safe_field(piece.contig)
        for begin, end in runs(piece.values):
            values = piece.values[begin:end].tolist()
            self._stream.write(
                "".join(
                    f"{contig}\t{place}\t{place + 1}\t{value:.5g}\n"
                    for place, value in enumerate(values, piece.start + begin)
                ).encode()
            )


class _BigWig:
    """Writes one value per base, in contiguous stretches."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def write(self, piece: TrackPiece) -> None:
        for begin, end in runs(piece.values):
            values = piece.values[begin:end].tolist()
            self._opened.addEntries(piece.contig, piece.start + begin, values=values, span=1, step=1)


@contextmanager
def _writer(path: Path | None, contig_lengths: Mapping[str, int]) -> Iterator[_Writer]:
    if path is None:
        yield _BedGraph(sys.stdout.buffer)
        return
    with written_whole(path) as stream:
        if not _is_bigwig(path):
            yield _BedGraph(stream)
            return
        import pyBigWig  # noqa: PLC0415 - an extra

        opened = pyBigWig.open(stream.name, "w")
        try:
            opened.addHeader(list(contig_lengths.items()))
            yield _BigWig(opened)
        finally:
            opened.close()


def _is_bigwig(path: Path) -> bool:
    return path.name.lower().endswith(BIGWIG_ENDINGS)


def _summarise(sums: Mapping[str, tuple[float, int, int]]) -> None:
    """Print bases, scored bases and perplexity of each contig, and their total if there are several."""
    note("contig\tbases\tscored\tlog_likelihood_per_base\tperplexity")
    rows = list(sums.items())
    if len(rows) > 1:
        log_likelihoods, scored, bases = zip(*sums.values(), strict=True)
        rows.append(("all", (math.fsum(log_likelihoods), sum(scored), sum(bases))))
    for name, (log_likelihood, scored_bases, positions) in rows:
        mean = log_likelihood / scored_bases if scored_bases else math.nan
        note(table_line([name, str(positions), str(scored_bases), f"{mean:.5f}", f"{math.exp(-mean):.4f}"]))
