"""Does a pretrained language model help? Fine-tuned from `yeast-lm` and from scratch, same shape, same steps.

python pipelines/experiments/transfer.py --enhancers DIR --yeasts DIR --output results/transfer

Two tables: the human enhancers (iEnhancer; chromosomes 3, 8, 9 and 10 are tested, 7 and 12 validate), and windows of
1,024 bp of three yeasts (chromosome VII is tested, XI validates), on neither of which `yeast-lm` was trained. Each is
learned from random weights of the shape of `yeast-lm` and from its weights, these at two learning rates; the k-mer
regression of `genomamba finetune` is beside them. A run that was stopped continues after the last finished model.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from experiment import Experiment, wilson_interval

from genomamba.io.fasta import read_records
from genomamba.tokenizer import CharacterTokenizer
from mambacore.errors import InputError
from mambapipelines.console import use_threads
from mambapipelines.files import write_whole
from mambapipelines.finetuning.train import FinetuningOptions, finetune

MODEL = "yeast-lm"
SHAPE = ("model.model_width=96", "model.layers=4", "model.state_size=8", "model.context_widths=[2,4,6,7]")
STARTS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "from scratch": (None, (*SHAPE, "optimizer.learning_rate=0.001")),
    "from yeast-lm": (MODEL, ("optimizer.learning_rate=0.001",)),
    "from yeast-lm, a fifth of the learning rate": (MODEL, ("optimizer.learning_rate=0.0002",)),
}
TESTED, VALIDATING = ("3", "8", "9", "10"), ("7", "12")
STRAINS = {"cerevisiae": "cerevisiae.DBVPG6765", "paradoxus": "paradoxus.CBS432", "arboricola": "arboricola.Sarb"}
WINDOW_BP = 1_024
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


def yeasts_table(folder: Path, seed: int) -> str:
    """Windows of three yeasts at random places of chromosomes, without unknown bases."""
    lines, decode = ["name\tsequence\tyeast\tsplit"], CharacterTokenizer().decode
    for number, (yeast, strain) in enumerate(STRAINS.items()):
        random = np.random.default_rng([seed, number])
        records = {record.name: record.tokens for record in read_records(folder / f"{strain}.fa.gz")}
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
                start = int(random.integers(len(tokens) - WINDOW_BP))
                text = decode(tokens[start : start + WINDOW_BP])
                if "N" not in text:
                    lines.append(f"{yeast}_{split}_{count}\t{text}\t{yeast}\t{split}")
                    count += 1
    return "\n".join(lines) + "\n"


def measure(table: Path, start: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune and return the metrics of the model and of the k-mer regression."""
    model, changes = STARTS[start]
    folder = options.output / "models" / f"{table.stem}-{list(STARTS).index(start)}"
    result = finetune(
        FinetuningOptions(
            table=str(table),
            output=folder,
            start_from=model,
            changes=(*changes, "validation.every_fraction=0.2"),
            resume=folder.is_dir(),
            epochs=options.epochs,
            seed=options.seed,
            threads=options.threads,
        )
    )
    print(f"{table.stem}, {start}: {result.metrics}", flush=True)
    return {row.predictor: {"rows": row.rows, **row.figures} for row in result.metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--enhancers", type=Path, metavar="DIR", help="folder of enhancer.cv.txt and non.cv.txt")
    parser.add_argument("--yeasts", type=Path, metavar="DIR", help="folder of the yeasts' assemblies")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the training rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    use_threads(options.threads)
    names = ("epochs", "seed", "threads")
    experiment = Experiment("transfer", options.output, {name: getattr(options, name) for name in names})
    tables = {}
    if options.enhancers is not None:
        tables["enhancers"] = enhancers_table(options.enhancers)
    if options.yeasts is not None:
        tables["yeasts"] = yeasts_table(options.yeasts, options.seed)
    if not tables:
        parser.error("give --enhancers, --yeasts or both")
    rows = []
    for name, text in tables.items():
        path = options.output / f"{name}.tsv"
        write_whole(path, text)
        beside: dict[str, dict[str, float]] = {}
        for number, start in enumerate(STARTS):
            found = experiment.part(f"{name}-{number}", lambda path=path, start=start: measure(path, start, options))
            for predictor, figures in found.items():
                if isinstance(figures, dict):
                    beside[predictor if "kmer" in predictor else start] = figures
        for predictor, figures in beside.items():
            count = int(figures["rows"])
            low, high = wilson_interval(round(figures["accuracy"] * count), count)
            shown = [f"{100 * value:.1f}" for value in (figures["accuracy"], low, high)]
            rows.append([name, predictor, *shown, f"{figures['mcc']:.3f}", f"{figures['auroc']:.3f}", count])
    header = ["table", "predictor", "accuracy %", "low", "high", "MCC", "AUROC", "test rows"]
    experiment.write(header, rows, None)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"transfer.py: {error}") from error
