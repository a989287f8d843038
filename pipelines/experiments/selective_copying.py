"""Selective copying (Gu & Dao, arXiv 2312.00752, section 4.1.1), and which parts of a mixer must be selective.

python pipelines/experiments/selective_copying.py --output results/selective_copying
python pipelines/experiments/selective_copying.py --output results/selective_copying --only step+input none

Symbols are scattered among blanks; after them as many positions ask for the symbols in order, and only these count. The
distances between symbols vary, so a system that is the same at every position cannot tell symbols from blanks by time.
The step size, the input matrix B and the output matrix C of the selective mixer depend on the input in all eight
combinations; the others are parameters (the option `selective` of the mixer).

Training begins with short sequences, in batches of as many positions (`length_warmup.py`); lengths beyond those that a
model was trained on are tested, too. A run that was stopped continues. A row is a function of the seed and its number.
"""

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import length_warmup
import numpy as np
import torch
from experiment import Experiment, line_plot, wilson_interval
from length_warmup import Schedule
from torch import Tensor, nn
from torch.nn import functional as F

from mambacore.errors import InputError
from mambacore.layers import ResidualStack
from mambacore.layers.selective import SELECTED
from mambapipelines.console import use_threads

SYMBOLS, KINDS = 4, 8  # to remember in each sequence, and how many there are to choose from
BLANK, ASK = KINDS, KINDS + 1
WIDTH, LAYERS = 64, 2
FIRST_LENGTH = 16
TEST_LENGTHS = tuple(2**exponent for exponent in range(6, 15))
POSITIONS_PER_STEP = 2048
TRAINING_ROWS, TEST_ROWS = 0, 1  # the two streams of random numbers
TEST_POSITIONS, MOST_SEQUENCES, FEWEST_SEQUENCES = 2**16, 256, 16
COMBINATIONS = {
    "+".join(names) or "none": names
    for count in range(len(SELECTED), -1, -1)
    for names in combinations(SELECTED, count)
}


def rows_of(length: int, rows: int, seed: int, stream: int, first: int) -> tuple[Tensor, Tensor]:
    """Tokens (rows, length + symbols), and the symbols in order (rows, symbols)."""
    random = np.random.default_rng([seed, stream, length, first])
    symbols = random.integers(KINDS, size=(rows, SYMBOLS))
    places = np.sort(random.random((rows, length)).argsort(1)[:, :SYMBOLS], axis=1)
    tokens = np.full((rows, length + SYMBOLS), BLANK)
    np.put_along_axis(tokens, places, symbols, 1)
    tokens[:, length:] = ASK
    return torch.from_numpy(tokens), torch.from_numpy(symbols)


class CopyingModel(nn.Module):
    """Embedding, stack and a choice of a symbol at the positions that ask."""

    def __init__(self, selective: tuple[str, ...]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(KINDS + 2, WIDTH)
        self.stack = ResidualStack(WIDTH, [{"name": "selective", "selective": selective}] * LAYERS)
        self.head = nn.Linear(WIDTH, KINDS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, symbols, kinds) at the last positions of (batch, length + symbols) tokens."""
        hidden, _ = self.stack(self.embedding(tokens))
        return self.head(hidden[:, -SYMBOLS:])


def measure(name: str, options: argparse.Namespace, kept: Path) -> dict[str, Any]:
    """Train one model and test it at every length."""
    torch.manual_seed(options.seed)
    model = CopyingModel(COMBINATIONS[name])

    def loss_at(length: int, step: int) -> Tensor:
        rows = max(1, POSITIONS_PER_STEP // (length + SYMBOLS))
        tokens, symbols = rows_of(length, rows, options.seed, TRAINING_ROWS, step)
        return F.cross_entropy(model(tokens).flatten(0, 1), symbols.flatten())

    schedule = Schedule(FIRST_LENGTH, options.length, options.steps, 0.0, options.learning_rate)
    steps, reached = length_warmup.train(name, model, loss_at, schedule, kept)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, Any] = {"parameters": parameters, "steps": steps, "reached": reached, "tested": {}}
    for length in TEST_LENGTHS:
        result["tested"][str(length)] = accuracy(model, length, options.seed)
        print(f"{name}: length {length}: {result['tested'][str(length)]}", flush=True)
    return result


@torch.inference_mode()
def accuracy(model: CopyingModel, length: int, seed: int) -> dict[str, int]:
    """Sequences, those with every symbol right, and the symbols that are right."""
    sequences = min(MOST_SEQUENCES, max(FEWEST_SEQUENCES, TEST_POSITIONS // length))
    at_once = max(1, min(sequences, TEST_POSITIONS // length))
    found = {"sequences": sequences, "whole": 0, "symbols": 0}
    for first in range(0, sequences, at_once):
        tokens, symbols = rows_of(length, min(at_once, sequences - first), seed, TEST_ROWS, first)
        right = model(tokens).argmax(-1) == symbols
        found["whole"] += int(right.all(1).sum())
        found["symbols"] += int(right.sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", default=list(COMBINATIONS), choices=list(COMBINATIONS), metavar="NAME")
    parser.add_argument("--length", type=int, default=256, help="longest sequence to train on; a power of two")
    parser.add_argument("--steps", type=int, default=800, help="of each model")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.length < FIRST_LENGTH or options.length.bit_count() != 1:
        parser.error(f"--length must be a power of two from {FIRST_LENGTH} on, not {options.length}")
    use_threads(options.threads)
    names = ("length", "steps", "learning_rate", "seed", "threads")
    experiment = Experiment("selective_copying", options.output, {name: getattr(options, name) for name in names})
    results = {}
    for name in options.only:
        kept = options.output / "parts" / f"{name}.state"
        results[name] = experiment.part(name, lambda name=name, kept=kept: measure(name, options, kept))  # type: ignore[misc]
        kept.unlink(missing_ok=True)
    rows, curves = [], {}
    for name, result in results.items():
        shares = []
        for length, tested in result["tested"].items():
            shares.append(100 * tested["symbols"] / (SYMBOLS * tested["sequences"]))
            interval = wilson_interval(tested["whole"], tested["sequences"])
            whole = [f"{100 * share:.1f}" for share in (tested["whole"] / tested["sequences"], *interval)]
            model = [name, result["parameters"], result["reached"]]
            rows.append([*model, f"{int(length):,}", f"{shares[-1]:.1f}", *whole, tested["sequences"]])
        curves[name] = ([int(length) for length in result["tested"]], shares)
    picture = line_plot(curves, f"length of the sequence (trained up to {options.length})", "symbols right (%)")
    picture.axes[0].axvline(options.length, color="0.6", linestyle="--", linewidth=1)
    picture.axes[0].axhline(100 / KINDS, color="0.8", linewidth=1)
    header = ["selective", "parameters", "trained up to", "length", "symbols right %", "whole %", "low", "high"]
    experiment.write([*header, "sequences"], rows, picture)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"selective_copying.py: {error}") from error
