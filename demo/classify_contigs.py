"""Job 1 of the demo: real contigs of chromosomes that the model has not seen, and one that belongs to no class."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import genomamba
from genomamba.classification.class_track import class_track
from genomamba.classification.parts import CountedParts
from genomamba.io.sources import read_sequences
from mambacore.errors import InputError
from mambapipelines.pages.html import Item, Picture, Section, Table
from mambapipelines.pages.plots import plot_accuracy_by_length, plot_class_track
from mambapipelines.species.evaluate import AccuracyRow, wilson_interval

CONTIGS = Path(__file__).with_name("contigs.fa.gz")
MODEL = "shipped://yeasts"
# Records whose p-value against held-out windows is below this are called unknown.
UNKNOWN_RATE = 0.01
KMERS = "k-mers"
SHOWN_BP = 16_384
TRACKED = "cerevisiae_65536_1"


def classify_contigs() -> Section:
    """Calls, accuracy by length beside k-mers, the evidence along a contig, and the contig that is of no class."""
    begin = time.monotonic()
    model = genomamba.load(MODEL)
    contigs = list(read_sequences(str(CONTIGS)))
    try:
        table = model.classify(str(CONTIGS), unknown_rate=UNKNOWN_RATE)
        detection = f"Records with a p-value below {UNKNOWN_RATE:g} against held-out windows are called unknown."
    except InputError as error:
        table = model.classify(str(CONTIGS))
        detection = f"This model calls nothing unknown: {error}"
    seconds = time.monotonic() - begin
    truths = [contig.name.rsplit("_", 2)[0] if contig.name.count("_") > 1 else "" for contig in contigs]
    truths = [truth if truth in model.class_names else "" for truth in truths]
    kmer_calls = _kmer_calls(model, [contig.tokens for contig in contigs])
    rows = []
    for contig, row, kmer in zip(contigs, table, kmer_calls, strict=True):
        if len(contig.tokens) >= SHOWN_BP:
            p_value = row.get("p_value")
            shown = ["" if value is None else f"{value:.3f}" for value in (row["probability"], p_value)]
            rows.append([row["record"], contig.description, f"{row['length']:,}", row["call"], *shown, kmer or ""])
    counted = _accuracy(table["length"], truths, table["call"], "genomamba")
    if any(kmer_calls):
        counted += _accuracy(table["length"], truths, kmer_calls, KMERS)
    bases = sum(table["length"])
    tokens = next(contig.tokens for contig in contigs if contig.name == TRACKED)
    track = class_track(model.model, tokens)
    content: list[Item] = [
        f"{len(contigs)} contigs, {bases:,} bp, from chromosome VII of three yeasts and from Escherichia coli, "
        f"classified by the shipped model `yeasts` in {seconds:.0f} s. The model was trained without chromosome VII. "
        f"{detection}",
        Picture(
            plot_accuracy_by_length(counted, len(model.class_names)),
            "Share of contigs called correctly, by length, with 95 % intervals.",
        ),
        _accuracy_table(counted),
        Picture(
            plot_class_track(track.boundaries, track.probabilities, model.class_names, TRACKED),
            f"Evidence along {TRACKED}: probabilities of the classes in each window, given all before it.",
        ),
        f"Contigs of {SHOWN_BP:,} bp and more:",
        Table(["record", "from", "length (bp)", "call", "probability", "p-value", KMERS], rows),
        "The same on your own contigs: genomamba classify yeasts contigs.fa > calls.tsv",
    ]
    return Section("Classify: which yeast is this contig from?", content)


def _kmer_calls(model: genomamba.LoadedSpeciesClassifier, contigs: Sequence[np.ndarray]) -> list[str | None]:
    """The calls of the model's k-mer regression by itself, fitted to the same chromosomes; None where it has none."""
    parts = model.model.parts
    names = [] if parts is None else [name for name in parts.names if name.startswith("kmer")]
    if not names:
        return [None] * len(contigs)
    wanted = next((name for name in names if name.startswith("kmer 6")), names[0])
    alone = CountedParts((), (), tuple(part for part in parts.kmers if part.name == wanted))
    return [model.class_names[int(alone.evidence(tokens)[0].argmax())] for tokens in contigs]


def _accuracy(
    lengths: Sequence[int], truths: Sequence[str], calls: Sequence[str | None], name: str
) -> list[AccuracyRow]:
    """Accuracy on the contigs of each length that there are several of."""
    rows = []
    for length in sorted(set(lengths)):
        chosen = [place for place, found in enumerate(lengths) if found == length and truths[place]]
        if len(chosen) < 2:
            continue
        accuracy = float(np.mean([calls[place] == truths[place] for place in chosen]))
        low, high = wilson_interval(accuracy, len(chosen))
        rows.append(AccuracyRow(length, name, accuracy, low, high, len(chosen), len(chosen), None))
    return rows


def _accuracy_table(rows: Sequence[AccuracyRow]) -> Table:
    names = list(dict.fromkeys(row.classifier for row in rows))
    cells = {(row.length, row.classifier): f"{row.accuracy:.0%} ({row.low:.0%}-{row.high:.0%})" for row in rows}
    counts = {row.length: row.windows for row in rows}
    body = [[f"{length:,}", str(counts[length]), *(cells[length, name] for name in names)] for length in sorted(counts)]
    return Table(["length (bp)", "contigs", *names], body)
