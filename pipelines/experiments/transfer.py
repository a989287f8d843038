"""Does a pretrained language model help? Fine-tuned from `yeast-lm` and from scratch, same shape, same steps.

python pipelines/experiments/transfer.py --enhancers DIR --yeasts DIR --output results/transfer --seeds 0 1 2

Two tables: the human enhancers (iEnhancer; chromosomes 3, 8, 9 and 10 are tested, 7 and 12 validate), and windows of
three yeasts (chromosome VII is tested, XI validates), on neither of which `yeast-lm` was trained. Each is learned from
random weights of the shape of `yeast-lm` and from its weights, at several learning rates; the k-mer regression of
`genomamba finetune` is beside them. The rows are the same for all seeds, which change the initial weights and the
order of the rows. A run that was stopped continues after the last finished model.

The interval of an accuracy is over test rows, that of a difference over test rows whose predictions are paired; neither
holds the seed, whose effect the range shows.
"""

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiment import Experiment, wilson_interval

from genomamba.io.fasta import read_records
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError
from mambapipelines.console import use_threads
from mambapipelines.files import write_whole
from mambapipelines.finetuning.evaluate import MODEL_NAME, PREDICTIONS_NAME
from mambapipelines.finetuning.train import FinetuningOptions, finetune

MODEL = "yeast-lm"
SHAPE = ("model.model_width=96", "model.layers=4", "model.state_size=8", "model.context_widths=[2,4,6,7]")
SCRATCH = "from scratch"
# Name to the language model and changes of the recipe; the learning rate of the recipe is 0.001.
STARTS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    SCRATCH: (None, SHAPE),
    f"from {MODEL}": (MODEL, ()),
    f"from {MODEL}, a fifth of the learning rate": (MODEL, ("optimizer.learning_rate=0.0002",)),
    f"{SCRATCH}, three times the learning rate": (None, (*SHAPE, "optimizer.learning_rate=0.003")),
    f"from {MODEL}, three times the learning rate": (MODEL, ("optimizer.learning_rate=0.003",)),
}
CONTROL = "kmer"
LEAST_PROBABILITY = 1e-6
TESTED, VALIDATING = ("3", "8", "9", "10"), ("7", "12")
STRAINS = {"cerevisiae": "cerevisiae.DBVPG6765", "paradoxus": "paradoxus.CBS432", "arboricola": "arboricola.Sarb"}
SUFFIX = ".fa.gz"
TABLE_SEED = 0  # of the windows of the yeasts
WINDOWS = {"train": 300, "valid": 50, "test": 200}  # of each yeast


def enhancers_table(folder: Path) -> str:
    """Sequence, label and split of each enhancer and non-enhancer."""
    lines = ["name\tsequence\tenhancer\tsplit"]
    for file, label in (("enhancer.cv.txt", "yes"), ("non.cv.txt", "no")):
        for block in (folder / file).read_text(encoding="ascii").split(">")[1:]:
            name, *parts = block.split()
            chromosome = name.split("_")[0].upper().removeprefix("CHR")
            split = "test" if chromosome in TESTED else "valid" if chromosome in VALIDATING else "train"
            lines.append(f"{label}_{name}\t{''.join(parts)}\t{label}\t{split}")
    return "\n".join(lines) + "\n"


def yeasts_table(folder: Path, window: int) -> str:
    """Windows of so many bases of three yeasts at random places of chromosomes, without unknown bases."""
    lines, decode = ["name\tsequence\tyeast\tsplit"], CharacterTokenizer().decode
    for number, (yeast, strain) in enumerate(STRAINS.items()):
        random = np.random.default_rng([TABLE_SEED, number])
        records = {record.name: record.tokens for record in read_records(folder / f"{strain}{SUFFIX}")}
        parts = {
            "train": [tokens for name, tokens in records.items() if name not in ("chrVII", "chrX", "chrXI")],
            "valid": [records["chrXI"]],
            "test": [records["chrVII"]],
        }
        for split, chromosomes in parts.items():
            shares = np.array([len(one) for one in chromosomes], dtype=float)
            count = 0
            while count < WINDOWS[split]:
                tokens = chromosomes[random.choice(len(chromosomes), p=shares / shares.sum())]
                start = int(random.integers(len(tokens) - window))
                text = decode(tokens[start : start + window])
                if "N" not in text:
                    lines.append(f"{yeast}_{split}_{count}\t{text}\t{yeast}\t{split}")
                    count += 1
    return "\n".join(lines) + "\n"


def measure(table: Path, start: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune; returns the metrics of the model and of the k-mer regression, and what the model says of each row."""
    model, changes = STARTS[start]
    folder = options.output / "models" / f"{table.stem}-{list(STARTS).index(start)}-{seed}"
    result = finetune(
        FinetuningOptions(
            table=str(table),
            output=folder,
            start_from=model,
            changes=(*changes, "validation.every_fraction=0.2"),
            resume=folder.is_dir(),
            epochs=options.epochs,
            seed=seed,
            threads=options.threads,
        )
    )
    print(f"{table.stem}, {start}, seed {seed}: {result.metrics}", flush=True)
    with (folder / PREDICTIONS_NAME).open(encoding="utf-8") as lines:
        predictions = list(csv.DictReader(lines, delimiter="\t"))
    # The names of both tables begin with the label.
    labels = [row["record"].split("_")[0] for row in predictions]
    pairs = list(zip(predictions, labels, strict=True))
    return {
        "metrics": {row.predictor: {"rows": row.rows, **row.figures} for row in result.metrics},
        "right": [int(row["call"] == label) for row, label in pairs],
        "nats": [-math.log(max(float(row[f"p_{label}"]), LEAST_PROBABILITY)) for row, label in pairs],
    }


def summary_row(found: Sequence[dict[str, Any]], scratch: Sequence[dict[str, Any]] | None) -> list[str]:
    """Figures of the seeds of one start: means, the range of the accuracy, and the difference from `scratch`."""
    right, nats = (np.array([one[name] for one in found], dtype=float) for name in ("right", "nats"))
    own, count = right.mean(1), right.shape[1]
    interval = wilson_interval(right.mean() * count, count)
    aurocs = [one["metrics"][MODEL_NAME]["auroc"] for one in found]
    shown = [f"{100 * value:.1f}" for value in (right.mean(), *interval, own.min(), own.max())]
    row = [str(len(found)), *shown, f"{nats.mean():.4f}", f"{np.mean(aurocs):.3f}"]
    if scratch is None:
        return [*row, ""]
    pairs = right.mean(0) - np.mean([one["right"] for one in scratch], axis=0)
    half = 1.96 * pairs.std(ddof=1) / count**0.5
    return [
        *row,
        f"{100 * pairs.mean():+.1f} ({100 * (pairs.mean() - half):+.1f} to {100 * (pairs.mean() + half):+.1f})",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--enhancers", type=Path, metavar="DIR", help="folder of enhancer.cv.txt and non.cv.txt")
    parser.add_argument("--yeasts", type=Path, metavar="DIR", help="folder of the yeasts' assemblies")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--epochs", type=float, default=1, help="passes over the training rows")
    parser.add_argument("--window", type=int, default=1_024, metavar="BP", help="length of the windows of the yeasts")
    parser.add_argument("--starts", nargs="+", default=list(STARTS)[:3], choices=list(STARTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    use_threads(options.threads)
    names = ("epochs", "window", "threads")
    experiment = Experiment("transfer", options.output, {name: getattr(options, name) for name in names})
    tables = {}
    if options.enhancers is not None:
        tables["enhancers"] = enhancers_table(options.enhancers)
    if options.yeasts is not None:
        tables["yeasts"] = yeasts_table(options.yeasts, options.window)
    if not tables:
        parser.error("give --enhancers, --yeasts or both")
    rows = []
    for name, text in tables.items():
        path = options.output / f"{name}.tsv"
        write_whole(path, text)
        found: dict[str, list[dict[str, Any]]] = {start: [] for start in options.starts}
        # Seed by seed, so that a run that was stopped has compared all starts.
        for seed in options.seeds:
            for start in options.starts:
                part = f"{name}-{list(STARTS).index(start)}-{seed}"
                found[start].append(
                    experiment.part(part, lambda path=path, start=start, seed=seed: measure(path, start, seed, options))  # type: ignore[misc]
                )
        for start, results in found.items():
            scratch = found.get(SCRATCH) if start != SCRATCH else None
            rows.append([name, start, *summary_row(results, scratch)])
        control = found[options.starts[0]][0]["metrics"].get(CONTROL)
        if control is not None:
            count = int(control["rows"])
            interval = wilson_interval(control["accuracy"] * count, count)
            shown = [f"{100 * value:.1f}" for value in (control["accuracy"], *interval)]
            rows.append([name, CONTROL, "", *shown, "", "", "", f"{control['auroc']:.3f}", ""])
    header = [
        "table",
        "predictor",
        "seeds",
        "accuracy %",
        "low",
        "high",
        "least",
        "most",
        "nats",
        "AUROC",
        "difference",
    ]
    experiment.write(header, rows, None)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"transfer.py: {error}") from error
