"""The commands `genomamba intervals`: audit genome splits for shared bases, repair them, or create new ones."""

from pathlib import Path
from typing import Annotated, cast

import typer

from mambapipelines.cli.options import input_error, names
from mambapipelines.cli.program import EXIT_CODES, command_group

application = command_group(
    "intervals",
    "Audit genome splits (train, valid, test) for shared bases, repair them, or create new ones.",
    no_arguments_is_help=True,
)

ReferenceOption = Annotated[
    str, typer.Option(metavar="FASTA", help="Genome, plain or compressed with bgzip; indexed once.")
]


@application.command(epilog=EXIT_CODES)
def audit(
    intervals: Annotated[
        str, typer.Option(metavar="FILE", help="Rows of chromosome, start, end and split without a header; - is stdin.")
    ],
    reference: ReferenceOption,
    length: Annotated[int, typer.Option(metavar="BP", help="Length of the windows that rows are extended to.")],
    rule: Annotated[str, typer.Option(metavar="NAME", help="How rows become windows: hyenadna, mamba or caduceus.")],
    fix: Annotated[
        str | None,
        typer.Option(
            metavar="drop|trim",
            help="Write rows without shared bases: drop rows that overlap another split, or trim them.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File for the rows of --fix.")
    ] = None,
) -> None:
    """Count the bases that windows of different splits share once rows are extended to the given length.

    The table on standard output has, for each pair of splits, a row per chromosome and one for `all`: bases covered by
    each split's windows, bases covered by both, windows of each split, and how many of them overlap the other split.

    With --fix, test rows are kept, validation rows yield to them, and training rows to both; the table still describes
    the original intervals.

    **Examples**

    `genomamba intervals audit --intervals human-sequences.bed --reference hg38.fa --length 1048576 --rule hyenadna`

    `genomamba intervals audit --intervals human-sequences.bed --reference hg38.fa --length 1048576 --rule caduceus
    --fix drop --output without-leak.bed`
    """
    from genomamba.data.interval_audit import REPAIRS, Repair, audit_intervals, audit_table, repair_intervals  # noqa: PLC0415
    from genomamba.data.intervals import SPLITS, intervals_text, read_intervals, window_rule  # noqa: PLC0415
    from genomamba.io.reference import Reference  # noqa: PLC0415
    from mambapipelines.console import note, show  # noqa: PLC0415
    from mambapipelines.files import check_writable_place, write_whole  # noqa: PLC0415

    chosen_rule = window_rule(rule)
    chosen_rule.require_length(length)
    if fix is not None and fix not in REPAIRS:
        raise input_error(f"--fix is '{fix}': use {' or '.join(REPAIRS)}.")
    if fix is not None and output is None:
        raise input_error(f"--fix {fix} writes intervals: name a file with --output FILE.")
    if output is not None:
        if fix is None:
            raise input_error(f"--output {output} is for repaired intervals: choose a repair with --fix drop or trim.")
        check_writable_place(output, "--output", (intervals, reference))
    with Reference(reference) as genome:
        lengths = genome.lengths
    rows = read_intervals(intervals, lengths, reference)
    for line in audit_table(audit_intervals(rows, chosen_rule, length, lengths)):
        show(line)
    if fix is None or output is None:
        return
    repaired, summaries = repair_intervals(rows, chosen_rule, length, lengths, cast(Repair, fix))
    left = {row.split for row in repaired}
    for split in SPLITS:
        if split not in left and any(row.split == split for row in rows):
            raise input_error(
                f"--fix {fix} leaves no {split} rows at {length} bp, so nothing was written: use a shorter --length, "
                "another --rule, or splits by chromosome (`genomamba intervals make`)."
            )
    write_whole(output, intervals_text(repaired))
    for summary in summaries:
        note(
            f"{summary.split}: {summary.rows_before} rows, {summary.rows_dropped} dropped, {summary.rows_trimmed} "
            f"trimmed, {summary.rows_after} written"
        )


@application.command(epilog=EXIT_CODES)
def make(
    reference: ReferenceOption,
    valid: Annotated[list[str], typer.Option(metavar="CHR[,CHR...]", help="Validation contigs. Repeatable.")],
    test: Annotated[list[str], typer.Option(metavar="CHR[,CHR...]", help="Test contigs. Repeatable.")],
    length: Annotated[int, typer.Option(metavar="BP", help="Length of a row in bases.")],
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="CHR[,CHR...]", help="Contigs to exclude. Repeatable.")
    ] = None,
    max_unknown: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Exclude rows with a larger share of N and other ambiguity codes."),
    ] = 0.01,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File for the rows.", show_default="standard output"),
    ] = None,
) -> None:
    """Tile a genome with non-overlapping rows, split by chromosome; contigs not named are for training.

    Whole chromosomes are held out, so windows of any length and rule share no bases between splits. Excluded sequence
    (incomplete rows at contig ends, shorter contigs, rows in gaps) is counted on standard error.

    **Example**

    `genomamba intervals make --reference yeast.fa --valid chrX --test chrVII,chrXI --exclude chrM --length 65536
    --output yeast.bed`
    """
    from genomamba.data.intervals import intervals_text, tile_contigs  # noqa: PLC0415
    from genomamba.io.reference import Reference  # noqa: PLC0415
    from mambapipelines.console import note, show  # noqa: PLC0415
    from mambapipelines.files import check_writable_place, write_whole  # noqa: PLC0415

    if not 0 <= max_unknown <= 1:
        raise input_error(f"--max-unknown is {max_unknown}: use a share from 0 to 1.")
    if output is not None:
        check_writable_place(output, "--output", (reference,))
    excluded = names(exclude or [], "--exclude")
    with Reference(reference) as genome:
        rows = list(tile_contigs(genome.lengths, length, names(valid, "--valid"), names(test, "--test"), excluded))
        kept = [
            row
            for row in rows
            if max_unknown == 1 or _unknown_share(genome.letters(row.chromosome, row.start, row.end)) <= max_unknown
        ]
        used = sum(size for name, size in genome.lengths.items() if name not in excluded)
        short = sum(size < length for name, size in genome.lengths.items() if name not in excluded)
    for split in ("train", "valid", "test"):
        if not any(row.split == split for row in kept):
            raise input_error(
                f"every {split} row of {length} bp has more than {max_unknown:g} of unknown bases: use a shorter "
                "--length, a larger --max-unknown, or other contigs."
            )
    text = intervals_text(kept)
    if output is None:
        show(text.rstrip("\n"))
    else:
        write_whole(output, text)
    counts = ", ".join(f"{split} {sum(row.split == split for row in kept)}" for split in ("train", "valid", "test"))
    note(
        f"rows of {length} bp: {counts}; excluded: {len(rows) - len(kept)} rows with unknown bases, {short} shorter "
        f"contigs, {used - len(rows) * length} bp that fill no row"
    )


def _unknown_share(letters: bytes) -> float:
    known = sum(letters.count(base) for base in (b"A", b"C", b"G", b"T", b"U", b"a", b"c", b"g", b"t", b"u"))
    return 1 - known / len(letters)
