"""Pretraining at 1,048,576 bases (Gu & Dao, arXiv 2312.00752, section 4.3): does context help, and from where on?

python pipelines/experiments/pretraining.py --yeasts DIR --output results/pretraining
python pipelines/experiments/pretraining.py --yeasts DIR --output results/pretraining --model yeast-lm
python pipelines/experiments/pretraining.py --yeasts DIR --output results/pretraining --ship

A causal model of yeast DNA is trained in two parts: many steps on windows of 8,192 bases, then windows that double
from 16,384 to 1,048,576 bases, backpropagated exactly. The chromosomes of each assembly that are trained on are joined
to one sequence, because only chromosome IV is longer than a million bases; chromosomes X and XI validate, VII tests.

The test: the first 1,048,576 bases of chromosome VII, cut into windows of each length. All lengths score the same
bases, so that a base differs only in how much comes before it in its window. Beside it is the best interpolated Markov
model of order 0 to 12, counted on both strands of all training bases. Intervals are over blocks of 65,536 bases.

With `--model` nothing is trained. A run that was stopped continues. `--ship` puts the trained model into the package as
`yeast-lm`, with a card of these figures.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import Experiment, command_line, line_plot
from scipy import stats

from genomamba.baselines.interpolated_markov import fit_markov_models
from genomamba.io.fasta import read_records
from genomamba.models.language_model import load_language_model
from genomamba.scoring.likelihood import causal_losses
from genomamba.tokenizer import CharacterTokenizer, Tokens
from mambacore.errors import InputError
from mambapipelines.console import use_threads
from mambapipelines.files import write_whole
from mambapipelines.language.train import PretrainingOptions, pretrain

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from ship_model import REPOSITORY, ship  # noqa: E402 - a script in the folder above

VALIDATION, TEST = ("chrX", "chrXI"), "chrVII"
TRAINING_RECORD, VALIDATION_RECORD = "training", "validation"
GAP = b"N" * 100
FIRST_LENGTH, LENGTH = 8_192, 1_048_576
LENGTHS = tuple(2**exponent for exponent in range(10, 21, 2))
BLOCK = 65_536
MARKOV_ORDER = 12
VALIDATION_BASES = 500_000
BASES_AT_ONCE = 65_536


def join_chromosomes(yeasts: Path, folder: Path) -> list[str]:
    """Write each assembly as a FASTA file of three records: training chromosomes, X with XI, and VII."""
    folder.mkdir(parents=True, exist_ok=True)
    decode = CharacterTokenizer().decode
    paths = []
    for source in sorted(yeasts.glob("*.fa.gz")):
        path = folder / source.name.removesuffix(".gz")
        paths.append(str(path))
        if path.exists():
            continue
        joined: dict[str, list[bytes]] = {TRAINING_RECORD: [], VALIDATION_RECORD: [], TEST: []}
        for record in read_records(str(source)):
            place = TEST if record.name == TEST else TRAINING_RECORD
            joined[VALIDATION_RECORD if record.name in VALIDATION else place].append(decode(record.tokens).encode())
        text = b"".join(b">" + name.encode() + b"\n" + GAP.join(parts) + b"\n" for name, parts in joined.items())
        write_whole(path, text)
    if not paths:
        raise InputError(f"{yeasts} holds no SPECIES.STRAIN.fa.gz: name the folder with the yeasts' assemblies.")
    return paths


def train(paths: Sequence[str], folder: Path, options: argparse.Namespace) -> Path:
    """Both parts of the training; each is finished already or continues."""
    shared: dict[str, Any] = {
        "references": paths,
        "valid_chromosomes": [VALIDATION_RECORD],
        "test_chromosomes": [TEST],
        "threads": options.threads,
        "resume": True,
    }
    first = folder / "short"
    pretrain(
        PretrainingOptions(
            length=FIRST_LENGTH,
            output=first,
            recipe=str(HERE / "pretraining-short.yaml"),
            steps=options.short_steps,
            **shared,
        )
    )
    last = folder / "model"
    pretrain(
        PretrainingOptions(
            length=LENGTH,
            output=last,
            start_from=str(first),
            recipe=str(HERE / "pretraining-long.yaml"),
            steps=options.long_steps,
            **shared,
        )
    )
    return last


def test_bases(path: str) -> Tokens:
    """The first bases of the test chromosome."""
    return next(record.tokens for record in read_records(path) if record.name == TEST)[:LENGTH]


@torch.inference_mode()
def losses_by_length(model: str, paths: Sequence[str], lengths: Sequence[int]) -> dict[str, Any]:
    """Mean loss of each block at each length, nats per base."""
    loaded = load_language_model(model)
    found: dict[str, list[float]] = {str(length): [] for length in lengths}
    for path in paths:
        tokens = torch.from_numpy(test_bases(path).astype(np.int64))
        for length in lengths:
            rows = tokens.view(-1, length)
            losses = torch.zeros(rows.shape)
            for first in range(0, len(rows), max(1, BASES_AT_ONCE // length)):
                some = rows[first : first + max(1, BASES_AT_ONCE // length)]
                losses[first : first + len(some), 1:] = causal_losses(loaded, some).float()
            # The first base of each of the shortest windows is not scored at any length.
            blocks = losses.view(-1, LENGTHS[0])[:, 1:].reshape(LENGTH // BLOCK, -1)
            found[str(length)] += blocks.double().mean(dim=1).tolist()
            print(f"{Path(path).name}, {length}: {math.exp(np.mean(found[str(length)])):.4f}", flush=True)
    return {"losses": found, "parameters": sum(one.numel() for one in loaded.model.parameters())}


def markov_losses(paths: Sequence[str], tested: Sequence[str]) -> dict[str, Any]:
    """Mean loss of each block under the Markov model that is best on the validation chromosomes."""
    records = {path: {record.name: record.tokens for record in read_records(path)} for path in paths}
    validation = [records[path][VALIDATION_RECORD][: VALIDATION_BASES // len(paths)] for path in paths]
    fitted = fit_markov_models((records[path][TRAINING_RECORD] for path in paths), validation, MARKOV_ORDER)
    losses: list[float] = []
    for path in tested:
        scored = -fitted.best.log_probabilities(test_bases(path))
        losses += scored.reshape(-1, LENGTHS[0])[:, 1:].reshape(LENGTH // BLOCK, -1).mean(axis=1).tolist()
    return {"losses": losses, "order": fitted.best.order}


def ship_trained(
    model: Path, names: Sequence[str], options: argparse.Namespace, curve: Sequence[float], order: int, best: float
) -> Path:
    """Put the trained model among those that ship, with a card of its figures.

    Args:
        model: its folder.
        names: of the assemblies that it was trained on.
        options: of this script.
        curve: perplexity at each of `options.lengths`.
        order, best: order and perplexity of the best Markov model.
    """
    pairs = zip(options.lengths, curve, strict=True)
    card = (HERE / "pretraining-card.md").read_text(encoding="utf-8").format(
        assemblies=", ".join(names),
        command=command_line(),
        short_steps=options.short_steps,
        first_length=FIRST_LENGTH,
        long_steps=options.long_steps,
        length=LENGTH,
        tested=", ".join(options.tested),
        perplexities=", ".join(f"perplexity {found:.4f} with a context of {length:,} bases" for length, found in pairs),
        markov_order=order,
        markov_perplexity=best,
    )  # fmt: skip
    written = options.output / "card.md"
    write_whole(written, card)
    facts = {
        "task": "predict the next base of Saccharomyces DNA (causal)",
        "figures": f"perplexity {min(curve):.3f} per base on held-out chromosome VII, best Markov model {best:.3f}",
        "licence": "Apache-2.0",
    }
    return ship(model, "yeast-lm", facts, written, options.repository)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval (Student's t over blocks)."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yeasts", type=Path, required=True, metavar="DIR", help="folder with SPECIES.STRAIN.fa.gz")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", help="measure this model instead of training one")
    parser.add_argument("--short-steps", type=int, default=600)
    parser.add_argument("--long-steps", type=int, default=40)
    parser.add_argument("--tested", nargs="+", default=["cerevisiae.S288C", "paradoxus.CBS432"], metavar="ASSEMBLY")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="contexts, powers of two from 1,024 on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help="put the trained model into the package as yeast-lm")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="checkout to ship into")
    options = parser.parse_args(arguments)
    if options.ship and options.model:
        raise InputError("--ship is for the model that this run trains: leave out --model.")
    use_threads(options.threads)
    names = ("model",) if options.model else ("short_steps", "long_steps")
    experiment = Experiment(
        "pretraining", options.output, {name: getattr(options, name) for name in (*names, "tested", "lengths")}
    )
    paths = join_chromosomes(options.yeasts, options.output / "genomes")
    tested = [path for path in paths if Path(path).name.removesuffix(".fa") in options.tested]
    model = options.model or str(train(paths, options.output, options))
    found = experiment.part("model", lambda: losses_by_length(model, tested, options.lengths))
    markov = experiment.part("markov", lambda: markov_losses(paths, tested))
    rows, curve = [], []
    shortest = np.array(found["losses"][str(options.lengths[0])])
    for length in options.lengths:
        losses = np.array(found["losses"][str(length)])
        perplexity = [math.exp(value) for value in interval(losses)]
        curve.append(perplexity[0])
        gain = interval(shortest - losses) if length > options.lengths[0] else (0.0, 0.0, 0.0)
        ratio = interval(np.array(markov["losses"]) - losses)
        rows.append(
            [
                f"{length:,}",
                f"{perplexity[0]:.4f} ({perplexity[1]:.3f}-{perplexity[2]:.3f})",
                "{:.2f} ({:.2f} to {:.2f})".format(*(1000 * value for value in gain)),
                "{:.4f} ({:.4f}-{:.4f})".format(*(math.exp(value) for value in ratio)),
            ]
        )
    best = math.exp(interval(markov["losses"])[0])
    curves = {
        "yeast-lm": (options.lengths, curve),
        f"Markov, order {markov['order']}": (options.lengths, [best] * len(curve)),
    }
    picture = line_plot(curves, "context (bases)", "perplexity per base")
    header = ["context", "perplexity", "gain over 1,024, millinats", "Markov's perplexity by the model's"]
    notes = [
        f"Markov, order {markov['order']} (best on chromosomes X and XI): perplexity {best:.4f}. "
        f"{found['parameters']:,} parameters; {', '.join(options.tested)}; {len(shortest)} blocks of {BLOCK:,} bases.\n"
    ]
    experiment.write(header, rows, picture, notes)
    if options.ship:
        names = [Path(path).name.removesuffix(".fa") for path in paths]
        print(ship_trained(Path(model), names, options, curve, markov["order"], best))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"pretraining.py: {error}") from error
