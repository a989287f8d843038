"""Scoring the variants of a VCF file: the run behind `genomamba score-variants`, and its two outputs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from genomamba.io.reference import Reference
from genomamba.io.vcf import Variant, VariantFile, read_chromosome_map, require_equal_contigs, require_shared_contigs
from genomamba.models.language_model import load_language_model
from genomamba.scoring.variant_scores import (
    ALLELE_COLUMNS,
    AlleleScore,
    StrandScore,
    VariantScorer,
    allele_values,
    require_window,
    score_variants,
)
from mambacore.errors import InputError
from mambacore.safe_text import table_line
from mambapipelines.console import WorkProgress, counted, note
from mambapipelines.device import begin_computing
from mambapipelines.files import check_writable_place, written_whole

FORMATS = ("tsv", "vcf")
MISSING = "NA"
RATIO_KEY, DISTANCE_KEY, STATUS_KEY = "GENOMAMBA_LLR", "GENOMAMBA_DISTANCE", "GENOMAMBA_STATUS"


@dataclass(frozen=True)
class VariantScoringOptions:
    """Options of `genomamba score-variants`; its `--help` describes each."""

    model: str
    variants: str
    reference: str
    output: Path | None
    output_format: str | None
    window: int
    span: int
    both_strands: bool
    chromosome_map: Path | None
    threads: int | None
    device: str = "auto"
    precision: str = "float32"


def run_variant_scoring(options: VariantScoringOptions) -> None:
    """Score every alternative allele and write a table row per allele, or the annotated VCF record.

    Raises:
        InputError: the files or options contradict each other.
    """
    require_window(options.window)
    output_format = _format(options)
    if options.output is not None:
        inputs = (options.variants, options.reference, options.chromosome_map)
        check_writable_place(options.output, "--output", inputs)
    placement = begin_computing(options.device, options.precision, options.threads)
    names = {} if options.chromosome_map is None else read_chromosome_map(options.chromosome_map)
    with VariantFile(options.variants) as variants, Reference(options.reference) as genome:
        # A first pass without the model detects a wrong reference early and counts the alleles for the progress bar.
        chromosomes: Counter[str] = Counter()
        alleles = 0
        for variant in variants.records():
            chromosomes[names.get(variant.chromosome, variant.chromosome)] += 1
            alleles += max(1, len(variant.alternatives))
        require_shared_contigs(list(chromosomes), genome.lengths, variants.label, options.reference)
        stated = {names.get(name, name): length for name, length in variants.contig_lengths.items()}
        of_variants = {name: stated.get(name) for name in chromosomes}
        require_equal_contigs(of_variants, genome.lengths, variants.label, options.reference)
        scorer = VariantScorer(load_language_model(options.model).to(placement.device), options.span)
        results = score_variants(
            variants.records(with_lines=output_format == "vcf"),
            genome,
            scorer,
            options.window,
            options.both_strands,
            names,
        )
        statuses: Counter[str] = Counter()
        with (
            _text_output(options.output) as output,
            WorkProgress("scoring", alleles * options.window, lines_elsewhere=True) as progress,
            placement.autocast(),
        ):
            if output_format == "vcf":
                output.write(annotated_header(variants.header_text))
            else:
                output.write(table_line(ALLELE_COLUMNS) + "\n")
            line_of: Callable[[Variant, Sequence[AlleleScore]], str] = (
                annotated_line if output_format == "vcf" else table_rows
            )
            for variant, scores in results:
                output.write(line_of(variant, scores))
                statuses.update(score.status for score in scores)
                progress.advance(len(scores) * options.window)
    _report(sum(chromosomes.values()), statuses, chromosomes, genome, options.reference)


def table_rows(variant: Variant, scores: Sequence[AlleleScore]) -> str:
    """One line per allele of a record, in the order of `ALLELE_COLUMNS`."""
    lines = []
    for allele in scores:
        values = zip(ALLELE_COLUMNS, allele_values(variant, allele), strict=True)
        lines.append(table_line(_shown(column, value) for column, value in values) + "\n")
    return "".join(lines)


def _shown(column: str, value: object) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.6g}" if column == "embedding_distance" else f"{value:.5f}"
    return str(value)


def annotated_header(header: str) -> str:
    """The VCF header with the declarations of the annotations, added once."""
    keys = (RATIO_KEY, DISTANCE_KEY, STATUS_KEY)
    lines = [line for line in header.splitlines() if not any(line.startswith(f"##INFO=<ID={key},") for key in keys)]
    declared = [
        f'##INFO=<ID={RATIO_KEY},Number=A,Type=Float,Description="Log-likelihood ratio (natural) of the alternative '
        'to the reference under a language model of DNA, mean of the strands">',
        f'##INFO=<ID={DISTANCE_KEY},Number=A,Type=Float,Description="Euclidean distance of the mean embeddings of the '
        'two windows, mean of the strands">',
        f'##INFO=<ID={STATUS_KEY},Number=.,Type=String,Description="Per allele: scored, or why it has no score">',
    ]
    place = next(number for number, line in enumerate(lines) if line.startswith("#CHROM"))
    return "\n".join([*lines[:place], *declared, *lines[place:]]) + "\n"


def annotated_line(variant: Variant, scores: Sequence[AlleleScore]) -> str:
    """The record with the annotations added to INFO and nothing else changed."""
    fields = variant.line.split("\t")
    found = [allele.score for allele in scores]
    kept = [
        entry
        for entry in fields[7].split(";")
        if entry != "." and entry.partition("=")[0] not in (RATIO_KEY, DISTANCE_KEY, STATUS_KEY)
    ]
    if variant.alternatives:
        kept.append(f"{RATIO_KEY}=" + ",".join("." if score is None else _ratio(score) for score in found))
        kept.append(
            f"{DISTANCE_KEY}="
            + ",".join("." if score is None else f"{score.embedding_distance:.6g}" for score in found)
        )
    kept.append(f"{STATUS_KEY}=" + ",".join(allele.status for allele in scores))
    return "\t".join([*fields[:7], ";".join(kept), *fields[8:]]) + "\n"


def _ratio(score: StrandScore | None) -> str:
    return MISSING if score is None else f"{score.log_likelihood_ratio:.5f}"


def _format(options: VariantScoringOptions) -> str:
    named = "tsv" if options.output is None else _format_of_name(options.output)
    if options.output_format is None:
        return named
    if options.output_format not in FORMATS:
        raise InputError(f"--format is '{options.output_format}': use {' or '.join(FORMATS)}.")
    return options.output_format


def _format_of_name(path: Path) -> str:
    name = path.name.removesuffix(".gz").removesuffix(".bgz")
    return "vcf" if name.endswith(".vcf") else "tsv"


@contextmanager
def _text_output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file written atomically and compressed with bgzip if its name ends in .gz or .bgz."""
    if path is None:
        yield sys.stdout
        return
    with written_whole(path) as stream:
        if path.name.endswith((".gz", ".bgz")):
            import pysam  # noqa: PLC0415 - an extra, which has been needed before this

            with pysam.BGZFile(stream.name, "wb", None) as compressed:
                yield cast(TextIO, _Encoded(compressed.write))
        else:
            yield cast(TextIO, _Encoded(stream.write))


class _Encoded:
    """A text stream over a binary one."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def write(self, text: str) -> None:
        self._write(text.encode())


def _report(
    records: int, statuses: Counter[str], chromosomes: Counter[str], genome: Reference, reference_label: str
) -> None:
    alleles = sum(statuses.values())
    others = ", ".join(f"{count} {status}" for status, count in statuses.most_common() if status != "scored")
    note(
        f"{counted(records, 'record')}, {counted(alleles, 'allele')}: {statuses['scored']} scored"
        + (f", {others}" if others else "")
    )
    missing = [name for name in chromosomes if name not in genome.lengths]
    if missing:
        note(f"not in {reference_label}: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}")
    mismatches = statuses["reference_mismatch"]
    if mismatches:
        note(
            f"{mismatches} of {alleles} alleles do not have the reference's bases in REF and were not scored: "
            "is this the assembly that the variants were called against?"
        )
