"""Regions of a genome, from BED files and command lines."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast

from genomamba.data.intervals import table_lines
from genomamba.io.compression import source_label
from genomamba.io.reference import suggest_names
from mambacore.errors import InputError

Strand = Literal["+", "-", "."]
STRANDS: Final = ("+", "-", ".")

_POSITION = re.compile(r"[0-9]{1,15}")
_REGION = re.compile(r"(?P<contig>.+?):(?P<start>[0-9,]{1,20})(?:-(?P<end>[0-9,]{0,20}))?")


@dataclass(frozen=True, slots=True)
class Region:
    """Bases [start, end) of a contig, 0-based; on strand "-" their reverse complement."""

    contig: str
    start: int
    end: int
    name: str = "."
    strand: Strand = "."


def read_bed(
    path: str | os.PathLike[str], contig_lengths: Mapping[str, int], reference_label: str = "the reference"
) -> list[Region]:
    """Read a BED file with at least three columns, plain or gzipped, "-" for standard input, in file order.

    The fourth column is the name and the sixth the strand; columns are separated by tabs or, as UCSC allows, by spaces.

    Raises:
        InputError: if a row is not valid BED, or not within a contig.
    """
    regions = []
    for text, place in table_lines(path, "regions"):
        fields = text.split("\t") if "\t" in text else text.split()
        fields = [field.strip() for field in fields]
        if len(fields) < 3:
            raise InputError(f"{place} has fewer than 3 columns: write chromosome, start and end, separated by tabs.")
        contig, start, end = fields[:3]
        for what, number in (("start", start), ("end", end)):
            if not _POSITION.fullmatch(number):
                raise InputError(f"{place} has the {what} '{number}': write an integer number of bases.")
        strand = fields[5] if len(fields) > 5 else "."
        if strand not in STRANDS:
            raise InputError(f"{place} has the strand '{strand}': use +, - or a dot.")
        name = fields[3] if len(fields) > 3 and fields[3] else "."
        region = Region(contig, int(start), int(end), name, cast(Strand, strand))
        require_region(region, contig_lengths, reference_label, place)
        regions.append(region)
    if not regions:
        raise InputError(f"{source_label(path)} has no regions: give lines of chromosome, start and end.")
    return regions


def parse_region(text: str, contig_lengths: Mapping[str, int], reference_label: str = "the reference") -> Region:
    """Parse `contig`, `contig:start-end`, `contig:start-` or `contig:start`, 1-based, end inclusive, as in samtools.

    Raises:
        InputError: if the text has another form, or the region is not within a contig.
    """
    if text in contig_lengths:
        return Region(text, 0, contig_lengths[text])
    match = _REGION.fullmatch(text)
    if match is None:
        raise InputError(f"{reference_label} has no contig '{text}': {suggest_names(text, contig_lengths)}.")
    start, end = ((match[part] or "").replace(",", "") for part in ("start", "end"))
    if start and not int(start):
        raise InputError(f"the region '{text}' starts at 0: its positions count from 1, unlike those of a BED file.")
    # Without an end the region extends to that of the contig.
    last = int(end) if end else max(contig_lengths.get(match["contig"], 0), 1)
    region = Region(match["contig"], int(start or 0) - 1, last)
    require_region(region, contig_lengths, reference_label, f"the region '{text}'")
    return region


def require_region(region: Region, contig_lengths: Mapping[str, int], reference_label: str, place: str) -> None:
    """Check that a region is not empty and lies within a contig.

    Raises:
        InputError: if it does not; the message gives the place and the reason.
    """
    length = contig_lengths.get(region.contig)
    if length is None:
        raise InputError(
            f"{place} names the contig '{region.contig}', which {reference_label} does not have: "
            f"{suggest_names(region.contig, contig_lengths)}."
        )
    if not 0 <= region.start < region.end:
        raise InputError(f"{place} is empty: its end must be after its start.")
    if region.end > length:
        raise InputError(
            f"{place} ends at {region.end}, beyond the {length} bp of '{region.contig}' in {reference_label}: is this "
            "the right assembly?"
        )


def merged(regions: list[Region], contig_lengths: Mapping[str, int]) -> list[Region]:
    """Return disjoint regions in the order of the contigs, merging those that overlap or touch."""
    order = {contig: number for number, contig in enumerate(contig_lengths)}
    result: list[Region] = []
    for region in sorted(regions, key=lambda one: (order[one.contig], one.start)):
        last = result[-1] if result else None
        if last is not None and last.contig == region.contig and region.start <= last.end:
            result[-1] = Region(last.contig, last.start, max(last.end, region.end))
        else:
            result.append(Region(region.contig, region.start, region.end))
    return result
