"""Species by length with the stack alone: mixers, two sizes, from scratch and from a language model, at equal steps.

python pipelines/experiments/species_by_length.py --yeasts DIR --output results/species --seeds 0 1 2
python pipelines/experiments/species_by_length.py --yeasts DIR --output results/species --models 's4d, width 32'

Three yeasts, chromosomes VII and XI held out and tested. Every model is the species classifier of `genomamba train`
without its counted parts (Markov models, k-mer regressions, words), so that only the stack answers. All take as many
steps on the same windows. The two sizes are two layers of width 32, and the shape of `yeast-lm`, which was trained on
the training chromosomes of these yeasts and on neither of those tested. The baselines of `genomamba evaluate` are
beside them, on the same windows.

Two rows for each model: as trained, and centred. Evidence is averaged over a window, so a constant difference between
the classes' evidence, left over from a short training, decides more and more calls the longer the window is. Centred
means that the mean evidence of each class over training windows, as many of every class, is subtracted.

Nothing is chosen on the tested chromosomes: the last state is tested, and calibration, which uses them, never changes
which class is called. Intervals are Wilson's at 95 % for the mean over the seeds; they count windows that do not
overlap and do not hold the seed, whose effect the range shows. Models and seeds can be added to a folder by further
runs; the table shows all that it holds. A run that was stopped continues.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiment import Experiment, line_plot

from genomamba.classification.evidence import evidence_of_records
from genomamba.data.genomes import GenomeCollection, GenomeSpecification, load_genomes
from genomamba.data.windows import WindowSampler
from genomamba.models.species_classifier import SpeciesClassifier, load_classifier
from genomamba.tokenizer import Tokens
from mambacore.errors import InputError
from mambapipelines.device import begin_computing
from mambapipelines.species.evaluate import (
    AccuracyRow,
    Scores,
    accuracy_by_length,
    fit_named_baselines,
    wilson_interval,
)
from mambapipelines.species.train import SpeciesTrainingOptions, train_species_classifier

STRAINS = {"cerevisiae": "cerevisiae.DBVPG6765", "paradoxus": "paradoxus.CBS432", "arboricola": "arboricola.Sarb"}
HELD_OUT = ("chrVII", "chrXI")
LANGUAGE_MODEL = "yeast-lm"
SIZES = {
    "width 32": ("model.model_width=32", "model.layers=2", "model.state_size=8"),
    "width 96": (
        "model.model_width=96",
        "model.layers=4",
        "model.state_size=8",
        "model.context_widths=[1,2,4,6,7]",
    ),
}
MIXERS = ("selective", "s4d", "attention")
# Name to the language model and changes of the recipe.
MODELS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    f"{mixer}, {size}": (None, (*shape, f"model.mixer={mixer}")) for size, shape in SIZES.items() for mixer in MIXERS
}
MODELS[f"selective, width 96, from {LANGUAGE_MODEL}"] = (LANGUAGE_MODEL, ())
# The layers learn the next base alone by default, and the heads the classes; here the layers learn the classes, too.
MODELS["selective, width 32, layers learn the classes"] = (
    None,
    (*SIZES["width 32"], "model.classification_gradient=1"),
)
MODELS[f"selective, width 96, layers learn the classes, from {LANGUAGE_MODEL}"] = (
    LANGUAGE_MODEL,
    ("model.classification_gradient=1",),
)
# Attention at the larger size takes longer than all others together.
DEFAULT = [name for name in MODELS if name != "attention, width 96"]
# The stack alone, without validations, which nothing here depends on.
COMMON = (
    "parts.markov=false",
    "parts.kmer=false",
    "parts.words=false",
    "parts.gate=false",
    "batch.bases_per_step=16384",
    "validation.every_fraction=1",
    "validation.windows_per_class=8",
)
TRAINING_LENGTH = 2_048
# Windows per class at each length, as far as the held-out chromosomes have so many that do not overlap.
WINDOWS = {2**10: 200, 2**12: 150, 2**14: 48, 2**16: 12, 2**18: 4, 2**20: 1}
# Attention compares all pairs of positions: its time grows with the square of the length.
LONGEST_FOR = {"attention": 2**12, "s4d": 2**18}
LONGEST_OF_LARGE = 2**16  # which take several times as long
WINDOWS_SEED = 0
CONFIG_FILE = "config.json"
CENTRING_WINDOWS, CENTRING_LENGTH = 90, 4_096
CENTRED = ", centred"
BASELINES = "baselines"


def specifications(folder: Path) -> list[GenomeSpecification]:
    """One assembly of each yeast."""
    return [GenomeSpecification(name, (str(folder / f"{strain}.fa.gz"),)) for name, strain in STRAINS.items()]


def accuracies(classifiers: dict[str, Scores], test: GenomeCollection, longest: int) -> list[dict[str, Any]]:
    """Rows of the evaluation at every length up to `longest`, on windows that do not overlap."""
    rows: list[AccuracyRow] = []
    for length, count in WINDOWS.items():
        if length <= longest:
            rows += accuracy_by_length(
                classifiers, test, [length], per_class=count, seed=WINDOWS_SEED, windows_per_independent=1
            )
    return [dataclasses.asdict(row) for row in rows]


class StackCalls:
    """Classes that a model calls, as trained and centred, with one pass over each group of windows.

    Args:
        model: the classifier, without counted parts.
        training: sequences to take the windows from that the evidence is centred on.
    """

    def __init__(self, model: SpeciesClassifier, training: GenomeCollection) -> None:
        self.model = model
        sampler = WindowSampler(training, CENTRING_LENGTH, WINDOWS_SEED, by_length=True)
        tokens, labels = sampler.sample_batch(0, CENTRING_WINDOWS)
        evidence = evidence_of_records(model, tokens)
        of_class = [evidence[labels == label].mean(axis=0) for label in range(len(training.class_names))]
        self.mean = np.mean(of_class, axis=0)
        self._last: tuple[Sequence[Tokens], np.ndarray] | None = None

    def evidence(self, windows: Sequence[Tokens]) -> np.ndarray:
        """(windows, classes) mean evidence per base, both strands averaged."""
        if self._last is None or self._last[0] is not windows:
            self._last = (windows, evidence_of_records(self.model, windows))
        return self._last[1]

    def classifiers(self) -> dict[str, Scores]:
        """Both by the suffix of their names."""
        return {
            "": lambda windows, _: (self.evidence(windows).argmax(axis=1), None),
            CENTRED: lambda windows, _: ((self.evidence(windows) - self.mean).argmax(axis=1), None),
        }


def measure(
    name: str, seed: int, training: GenomeCollection, test: GenomeCollection, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one model and test it at every length."""
    start, changes = MODELS[name]
    folder = options.output / "models" / f"{list(MODELS).index(name)}-{seed}"
    if not (folder / CONFIG_FILE).exists():  # else the model is finished
        train_species_classifier(
            SpeciesTrainingOptions(
                genomes=specifications(options.yeasts),
                length=TRAINING_LENGTH,
                output=folder,
                holdout=HELD_OUT,
                steps=options.steps,
                changes=(*COMMON, *changes),
                seed=seed,
                resume=folder.is_dir(),
                threads=options.threads,
                start_from=start,
            )
        )
    model, _ = load_classifier(folder)
    placement = begin_computing("cpu", options.precision, options.threads)
    mixer = name.partition(",")[0]
    longest = min(options.longest, LONGEST_FOR.get(mixer, options.longest))
    if "width 96" in name:
        longest = min(longest, LONGEST_OF_LARGE)
    with placement.autocast():
        rows = accuracies(StackCalls(model, training).classifiers(), test, longest)
    return {"rows": rows, "parameters": sum(parameter.numel() for parameter in model.parameters())}


def measure_baselines(
    training: GenomeCollection, test: GenomeCollection, options: argparse.Namespace
) -> dict[str, Any]:
    """Fit the baselines, whose hyperparameters are chosen on training sequences, and test them at every length."""
    lengths = [length for length in WINDOWS if length <= options.longest]
    fitted = fit_named_baselines(training, lengths, WINDOWS_SEED, ("kmer", "markov", "composition"))
    classifiers: dict[str, Scores] = {
        name: lambda windows, length, name=name: (fitted.predict(name, windows, length), None)  # type: ignore[misc]
        for name in fitted.names
    }
    return {"rows": accuracies(classifiers, test, options.longest)}


def table_rows(name: str, results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row per length: the mean over seeds, its interval, and the range."""
    rows = []
    for place, first in enumerate(results[0]["rows"]):
        shares = [result["rows"][place]["accuracy"] for result in results]
        mean = sum(shares) / len(shares)
        trials = min(first["windows"], first["independent_windows"])
        shown = [f"{100 * value:.1f}" for value in (mean, *wilson_interval(mean, trials), min(shares), max(shares))]
        parameters = f"{results[0]['parameters']:,}" if "parameters" in results[0] else ""
        rows.append([name, parameters, f"{first['length']:,}", str(len(shares)), *shown, str(first["windows"])])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yeasts", type=Path, required=True, metavar="DIR", help="folder of the yeasts' assemblies")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", nargs="*", default=DEFAULT, choices=list(MODELS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=250, help="of each model, 16,384 bases each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--longest", type=int, default=max(WINDOWS), help="longest windows to test on")
    parser.add_argument("--precision", default="float32", help="of the linear layers in the test")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    names = ("steps", "longest", "precision", "threads")
    experiment = Experiment("species", options.output, {name: getattr(options, name) for name in names})
    training, test = load_genomes(specifications(options.yeasts)).split(HELD_OUT)
    found = {BASELINES: experiment.part(BASELINES, lambda: measure_baselines(training, test, options))}
    # Seed by seed, so that a run that was stopped has compared all models.
    for seed in options.seeds:
        for name in options.models:
            part = f"{name}, seed {seed}"
            found[part] = experiment.part(
                part, lambda name=name, seed=seed: measure(name, seed, training, test, options)
            )  # type: ignore[misc]
    rows: list[list[str]] = []
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name in MODELS:
        results = experiment.finished(f"{name}, seed *")
        for suffix in ("", CENTRED) if results else ():
            own = [{**one, "rows": [row for row in one["rows"] if row["classifier"] == suffix]} for one in results]
            rows += table_rows(name + suffix, own)
    for baseline in dict.fromkeys(row["classifier"] for row in found[BASELINES]["rows"]):
        measured = [row for row in found[BASELINES]["rows"] if row["classifier"] == baseline]
        rows += table_rows(baseline, [{"rows": measured}])
    for row in rows:
        if row[0] in MODELS:
            continue  # as trained: the plot has the centred ones alone
        lengths, shares = curves.setdefault(row[0], ([], []))
        lengths.append(int(row[2].replace(",", "")))
        shares.append(float(row[4]))
    picture = line_plot(curves, "length, bp", "accuracy (%)")
    picture.axes[0].axhline(100 / len(STRAINS), color="0.8", linewidth=1)
    header = ["model", "parameters", "length", "seeds", "accuracy %", "low", "high", "least", "most", "windows"]
    experiment.write(header, rows, picture)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"species_by_length.py: {error}") from error
