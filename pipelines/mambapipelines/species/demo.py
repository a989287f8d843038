"""The demo: simulated genomes, from FASTA files to a report."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from genomamba.baselines import BASELINE_NAMES
from genomamba.data.gene_simulation import simulate_genomes
from genomamba.data.genomes import GenomeCollection, GenomeSpecification
from genomamba.data.simulation import DEFAULT_TREE, ROOT, SimulatedGenomes
from genomamba.models.species_classifier import load_classifier
from genomamba.tokenizer import ANY_BASE_TOKEN, CharacterTokenizer, Tokens
from mambacore.errors import InputError
from mambapipelines.console import format_duration, note, show, use_threads
from mambapipelines.device import Placement, choose
from mambapipelines.files import write_whole
from mambapipelines.pages.html import Picture, Section, Table, page
from mambapipelines.pages.plots import plot_accuracy_by_length, plot_training_curve, plot_tree
from mambapipelines.species.classify import ClassificationOptions, ClassificationSummary, classify_files
from mambapipelines.species.evaluate import (
    MODEL_NAME,
    PLOT_NAME,
    TABLE_NAME,
    AccuracyRow,
    accuracy_by_length,
    classifiers_of,
    fit_named_baselines,
    table_text,
)
from mambapipelines.species.report import classification_table, describe_lengths
from mambapipelines.species.train import SpeciesTrainingOptions, SpeciesTrainingResult, train_species_classifier

TRAINING_LENGTH_BP: Final = 4_096
EVALUATION_LENGTHS_BP: Final = (256, 1_024, 4_096, 16_384, 65_536)
WINDOWS_PER_CLASS: Final = 200
# Contigs: three of each of these lengths from different species, and three special ones.
CONTIG_LENGTHS_BP: Final = (1_000, 5_000, 20_000, 80_000)
CONTIGS_PER_LENGTH: Final = 3
SHORT_CONTIG_BP: Final = 60
SHORTEST_CLASSIFIED_BP: Final = 100
GAPPED_CONTIG_BP: Final = 30_000
GAP_FRACTION: Final = 0.5
# Random stream of the contigs, independent of the simulation's.
CONTIG_STREAM: Final = 1_000

MARKER_NAME: Final = "demo.json"
GENOMES_NAME, MODEL_FOLDER_NAME, CONTIGS_NAME = "genomes", "model", "contigs.fa"
CLASSIFICATION_NAME, REPORT_NAME = "classification.tsv", "report.html"
FOLDERS_MADE: Final = (GENOMES_NAME, MODEL_FOLDER_NAME)
FILES_MADE: Final = (REPORT_NAME, TABLE_NAME, PLOT_NAME, CLASSIFICATION_NAME, CONTIGS_NAME)

COLUMN_TITLES: Final[Mapping[str, str]] = {
    MODEL_NAME: "this model",
    "kmer": "k-mers",
    "markov": "Markov",
    "composition": "GC and N only",
}


@dataclass(frozen=True)
class DemoOptions:
    """Options of `genomamba demo`.

    Attributes:
        output: folder for all results; those of an earlier demo there are replaced.
        minutes: time limit of the training.
        recipe: name or file of the training recipe.
        changes: values that replace the recipe's, each written `section.key=value`.
        seed: of the simulation, the training and the windows.
        threads: number of CPU threads; `None` keeps PyTorch's choice.
        device: see `mambapipelines.device.choose`.
        precision: the same; `None` takes the recipe's for training and float32 for the rest.
    """

    output: Path
    minutes: float = 3.0
    recipe: str = "demo"
    changes: Sequence[str] = ()
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    precision: str | None = None


@dataclass(frozen=True)
class DemoResult:
    """Results of a demo.

    Attributes:
        rows: accuracy by length of the model and the baselines.
        sections: of the report.
    """

    rows: list[AccuracyRow]
    sections: list[Section]


def run_demo(options: DemoOptions) -> DemoResult:
    """Simulate, train, evaluate, classify, report, and print a summary on standard output.

    `report.html` is written last, so its presence means that the demo has finished.

    Raises:
        InputError: the folder holds something other than an earlier demo, or cannot be written to.
    """
    start_seconds = time.monotonic()
    use_threads(options.threads)
    folder = options.output
    _prepare_folder(folder, options)
    note("simulating five species")
    clade = simulate_genomes(options.seed)
    paths = clade.write_fasta(folder / GENOMES_NAME)
    training = train_species_classifier(
        SpeciesTrainingOptions(
            genomes=[GenomeSpecification(species, (str(path),)) for species, path in paths.items()],
            holdout=clade.holdout_names,
            length=TRAINING_LENGTH_BP,
            output=folder / MODEL_FOLDER_NAME,
            minutes=options.minutes,
            recipe=options.recipe,
            changes=options.changes,
            seed=options.seed,
            threads=options.threads,
            device=options.device,
            precision=options.precision,
        )
    )
    precision = options.precision or "float32"
    rows = _evaluate(clade, folder / MODEL_FOLDER_NAME, options.seed, choose(options.device, precision))
    picture = plot_accuracy_by_length(rows, len(clade.species_names))
    write_whole(folder / TABLE_NAME, table_text(rows))
    write_whole(folder / PLOT_NAME, picture)
    write_whole(folder / CONTIGS_NAME, contigs_text(clade, options.seed))
    classified = classify_files(
        ClassificationOptions(
            model_folder=folder / MODEL_FOLDER_NAME,
            sources=[str(folder / CONTIGS_NAME)],
            output=folder / CLASSIFICATION_NAME,
            minimum_length=SHORTEST_CLASSIFIED_BP,
            device=options.device,
            precision=precision,
        )
    )
    sections = [
        _introduction(clade, training),
        _simulation_section(clade),
        _training_section(training),
        _accuracy_section(rows, picture),
        _classification_section(classified),
    ]
    write_whole(folder / REPORT_NAME, page("genomamba demo: which species is this contig from?", sections))
    show(_summary(folder, rows, training, time.monotonic() - start_seconds).rstrip("\n"))
    return DemoResult(rows, sections)


def contigs_text(clade: SimulatedGenomes, seed: int) -> str:
    """FASTA of contigs from the held-out chromosomes; each name begins with the true species.

    Besides contigs of several lengths there are the reverse complement of one of them, one that is too short, and one
    that is half N.
    """
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(CONTIG_STREAM,))))
    tokenizer = CharacterTokenizer()
    contigs: dict[str, Tokens] = {}

    def cut(number: int, length: int) -> tuple[str, Tokens]:
        species = clade.species_names[number % len(clade.species_names)]
        chromosome = clade.holdout_names[number % len(clade.holdout_names)]
        tokens = clade.chromosomes[species][chromosome]
        length = min(length, len(tokens))
        start = int(random.integers(len(tokens) - length + 1))
        return f"{species}_{chromosome}_{length}bp", tokens[start : start + length]

    number = 0
    for length in CONTIG_LENGTHS_BP:
        for _ in range(CONTIGS_PER_LENGTH):
            name, tokens = cut(number, length)
            contigs[name] = tokens
            number += 1
    contigs[f"{name}_reverse_complement"] = tokenizer.reverse_complement(tokens)
    name, tokens = cut(number, SHORT_CONTIG_BP)
    contigs[f"{name}_too_short"] = tokens
    name, tokens = cut(number + 1, GAPPED_CONTIG_BP)
    gapped = tokens.copy()
    gap_start = round(len(gapped) * (1 - GAP_FRACTION) / 2)
    gapped[gap_start : gap_start + round(len(gapped) * GAP_FRACTION)] = ANY_BASE_TOKEN
    contigs[f"{name}_half_N"] = gapped
    return "".join(f">{name}\n{tokenizer.decode(tokens)}\n" for name, tokens in contigs.items())


def _prepare_folder(folder: Path, options: DemoOptions) -> None:
    """Create the folder and mark it as a demo's; only what a demo writes is ever removed from it."""
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output {folder} is a file: give a folder.")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER_NAME).is_file():
            raise InputError(f"--output {folder} holds files that are not from a demo: give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES_MADE:
            (folder / name).unlink(missing_ok=True)
        for name in FOLDERS_MADE:
            if (folder / name).exists():
                shutil.rmtree(folder / name)
    except OSError as error:
        raise InputError(
            f"--output {folder} cannot be created or cleared ({error.strerror}): give another folder."
        ) from error
    marker = {"made_by": "genomamba demo", "seed": options.seed, "minutes": options.minutes}
    write_whole(folder / MARKER_NAME, json.dumps(marker, indent=2) + "\n")


def _evaluate(clade: SimulatedGenomes, model_folder: Path, seed: int, placement: Placement) -> list[AccuracyRow]:
    """Evaluate the model and the baselines on the same held-out windows."""

    def collection(names: Sequence[str]) -> GenomeCollection:
        return GenomeCollection.from_tokens(
            {species: {name: clade.chromosomes[species][name] for name in names} for species in clade.species_names}
        )

    model, _ = load_classifier(model_folder)
    note("fitting the baselines")
    training = collection(clade.training_names)
    fitted = fit_named_baselines(training, EVALUATION_LENGTHS_BP, seed, BASELINE_NAMES)
    held_out = collection(clade.holdout_names)
    with placement.autocast():
        return accuracy_by_length(
            classifiers_of(model.to(placement.device), fitted),
            held_out,
            EVALUATION_LENGTHS_BP,
            per_class=WINDOWS_PER_CLASS,
            seed=seed,
            windows_per_independent=1,
        )


def _introduction(clade: SimulatedGenomes, training: SpeciesTrainingResult) -> Section:
    text = (
        f"A classifier of {len(clade.species_names)} simulated species was trained in "
        f"{format_duration(training.seconds)} on {', '.join(clade.training_names)}. All results are measured on "
        f"{' and '.join(clade.holdout_names)}, which were held out."
    )
    return Section("", [text])


def _simulation_section(clade: SimulatedGenomes) -> Section:
    branches = Table(
        ["branch", "from", "substitutions per site", "equilibrium GC", "transition/transversion ratio"],
        [
            [
                branch.name,
                branch.parent,
                f"{branch.substitutions_per_site:g}",
                f"{branch.equilibrium_gc:.0%}",
                f"{branch.transition_ratio:g}",
            ]
            for branch in DEFAULT_TREE
        ],
    )
    lengths = clade.chromosomes[clade.species_names[0]]
    chromosomes = ", ".join(f"{name} {len(tokens):,} bp" for name, tokens in lengths.items())
    text = (
        f"Ancestral chromosomes ({chromosomes}; seed {clade.seed}) evolve along the tree below (Tamura 1992). About "
        "half of each chromosome is genes, whose codon usage drifts along every branch, and every branch has a family "
        "of transposons of its own, which jumps into the gaps between genes. The genes of the held-out chromosomes "
        "share no ancestor with the others; the transposons of a species are on all its chromosomes. No Bayes optimum "
        "is known for this model of evolution."
    )
    return Section(
        "Simulated clade",
        [text, Picture(plot_tree(DEFAULT_TREE, ROOT), "Phylogeny of the simulated species."), branches],
    )


def _training_section(training: SpeciesTrainingResult) -> Section:
    with training.metrics_path.open(newline="", encoding="utf-8") as stream:
        metrics = list(csv.DictReader(stream))
    steps = np.array([float(row["step"]) for row in metrics])
    loss = np.array([float(row["loss"]) for row in metrics])
    held_out = [(float(row["step"]), float(row["held_out_accuracy"])) for row in metrics if row["held_out_accuracy"]]
    caption = f"Loss and accuracy on held-out windows of {TRAINING_LENGTH_BP:,} bp over {training.steps:,} steps."
    content: list[str | Picture | Table] = [Picture(plot_training_curve(steps, loss, held_out), caption)]
    if training.calibration is not None:
        before, after = (training.calibration[f"expected_calibration_error_{when}"] for when in ("before", "after"))
        content.append(f"Expected calibration error: {before:.1%} before, {after:.1%} after calibration.")
    return Section("Training", content)


def _accuracy_section(rows: Sequence[AccuracyRow], picture: bytes) -> Section:
    lengths = sorted({row.length for row in rows})
    by_place = {(row.length, row.classifier): row for row in rows}
    table_rows = []
    for length in lengths:
        cells = [by_place[length, name] for name in COLUMN_TITLES]
        shown = [f"{cell.accuracy:.1%} ({cell.low:.0%}-{cell.high:.0%})" for cell in cells]
        table_rows.append([f"{length:,}", *shown, f"{cells[0].windows} ({cells[0].independent_windows})"])
    text = (
        f"Windows of {describe_lengths(lengths)}, the same for all classifiers. k-mers: logistic regression on "
        "canonical k-mer spectra. Markov: likelihood under one Markov model per species. Both were fitted, and their "
        "hyperparameters chosen, on the model's training sequences. GC and N only: a negative control. "
        "In parentheses: 95 % intervals, and non-overlapping windows."
    )
    header = ["window (bp)", *COLUMN_TITLES.values(), "windows"]
    caption = "Accuracy by window length with 95 % intervals."
    return Section("Accuracy by length", [text, Picture(picture, caption), Table(header, table_rows)])


def _classification_section(summary: ClassificationSummary) -> Section:
    text = (
        f"{CONTIGS_NAME}: contigs of the held-out chromosomes; each name begins with the true species. The reverse "
        f"complement gets the same call as its contig. Records below {SHORTEST_CLASSIFIED_BP} bp are unclassified."
    )
    return Section("Classified contigs", [text, classification_table(summary.class_names, summary.listed)])


def _summary(folder: Path, rows: Sequence[AccuracyRow], training: SpeciesTrainingResult, seconds: float) -> str:
    by_place = {(row.length, row.classifier): row.accuracy for row in rows}
    width = max(map(len, COLUMN_TITLES.values())) + 2
    lines = [
        f"Five simulated species, trained for {format_duration(training.seconds)} ({training.steps:,} steps), "
        f"{format_duration(seconds)} in all. Accuracy on held-out chromosomes (chance 20%):",
        "",
        f"{'window':>10}" + "".join(f"{title:>{width}}" for title in COLUMN_TITLES.values()),
    ]
    for length in sorted({row.length for row in rows}):
        shares = "".join(f"{by_place[length, name]:>{width}.1%}" for name in COLUMN_TITLES)
        lines.append(f"{length:>7,} bp{shares}")
    lines += [
        "",
        f"{folder / REPORT_NAME}: report with plots",
        f"{folder / MODEL_FOLDER_NAME}: the model; try `genomamba classify {folder / MODEL_FOLDER_NAME} "
        f"{folder / CONTIGS_NAME}`",
        f"{folder / GENOMES_NAME}: the genomes it was trained on",
    ]
    return "\n".join(lines) + "\n"
