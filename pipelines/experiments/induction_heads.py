"""Induction heads (Gu & Dao, arXiv 2312.00752, section 4.1.2): trained on length 256, tested up to length 2^20.

python pipelines/experiments/induction_heads.py --output results/induction_heads
python pipelines/experiments/induction_heads.py --output results/all --mixers selective rwkv gru --seeds 0 1

A sequence is random tokens. One place holds the special token, followed by the token to remember; the last position
holds the special token again, and the model must say what followed it the first time. A model that copies by distance,
or forgets at a fixed rate, fails at lengths it was not trained on.

Training begins with short sequences, in batches of as many positions: a length is doubled when it is learned, or when
its share of the steps is used up. This is the same for every mixer. The paper has no such warm-up and 204,800 steps.
With --mixed-lengths half of the steps after the warm-up are at shorter lengths, so that these are not unlearned.

A run that was stopped continues from the last state it kept. A row is a function of the seed and its number. A model
that answers fewer than a quarter at two lengths in a row is not tested further, so at some lengths fewer seeds are.
"""

import argparse
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
from mambacore.layers import MIXERS, ResidualStack
from mambapipelines.console import use_threads

TOKENS = 16  # as in the paper, table 11; the special token is one more
SPECIAL = TOKENS
WIDTH, LAYERS = 64, 2
TRAINING_LENGTH = 256
LENGTHS = tuple(2**exponent for exponent in range(6, 21))
# Long sequences go through the model in pieces that hand their state on, so memory does not grow with the length.
PIECE_LENGTH = 65_536
TRAINING_ROWS, TEST_ROWS = 0, 1  # the two streams of random numbers
# At each length as many sequences as hold this many positions, between the two bounds below.
TEST_POSITIONS = 2**18
MOST_SEQUENCES, FEWEST_SEQUENCES = 1024, 4
# Attention keeps every key and compares with all of them: its time grows with the square of the length.
LONGEST_FOR = {"attention": 2**16}
# A model that answers fewer than this share at so many lengths in a row is not tested at longer ones.
LOST_SHARE, LENGTHS_LOST = 0.25, 2
FIRST_LENGTH = 8


def rows_of(length: int, rows: int, seed: int, stream: int, first: int) -> tuple[Tensor, Tensor]:
    """(rows, length) tokens, and (rows,) the token that belongs after the last position."""
    random = np.random.default_rng([seed, stream, length, first])
    tokens = random.integers(TOKENS, size=(rows, length))
    place = random.integers(length - 2, size=rows)
    tokens[np.arange(rows), place] = SPECIAL
    tokens[:, -1] = SPECIAL
    return torch.from_numpy(tokens), torch.from_numpy(tokens[np.arange(rows), place + 1])


class InductionModel(nn.Module):
    """Embedding, stack and a choice of a token after the last position."""

    def __init__(self, mixer: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS + 1, WIDTH)
        self.stack = ResidualStack(WIDTH, [mixer] * LAYERS)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits (batch, tokens) after the last of (batch, length) tokens, and the state there."""
        hidden, state = self.stack(self.embedding(tokens), state)
        return self.head(hidden[:, -1]), state


def train(mixer: str, options: argparse.Namespace, kept: Path) -> tuple[InductionModel, int]:
    """A model trained with the warm-up of `length_warmup`, and its steps; `kept` is where states are kept."""
    torch.manual_seed(options.seed)
    model = InductionModel(mixer)

    def loss_at(length: int, step: int) -> Tensor:
        rows = options.batch * TRAINING_LENGTH // length
        tokens, answers = rows_of(length, rows, options.seed, TRAINING_ROWS, step)
        return F.cross_entropy(model(tokens)[0], answers)

    schedule = Schedule(
        FIRST_LENGTH,
        TRAINING_LENGTH,
        options.steps,
        options.enough,
        options.learning_rate,
        options.mixed_lengths,
        options.cooldown,
        options.seed,
    )
    steps, _ = length_warmup.train(mixer, model, loss_at, schedule, kept)
    return model, steps


@torch.inference_mode()
def accuracy(model: InductionModel, length: int, seed: int) -> tuple[int, int]:
    """How many sequences of a length are answered correctly, and how many there were."""
    sequences = min(MOST_SEQUENCES, max(FEWEST_SEQUENCES, TEST_POSITIONS // length))
    at_once = max(1, min(sequences, 2 * PIECE_LENGTH // length))
    correct = 0
    for first in range(0, sequences, at_once):
        count = min(at_once, sequences - first)
        tokens, answers = rows_of(length, count, seed, TEST_ROWS, first)
        state = None
        for begin in range(0, length, PIECE_LENGTH):
            logits, state = model(tokens[:, begin : begin + PIECE_LENGTH], state)
        correct += int((logits.argmax(-1) == answers).sum())
    return correct, sequences


def state_path(mixer: str, options: argparse.Namespace) -> Path:
    """Where the state of a model's training is kept until its results are."""
    return Path(options.output) / "parts" / f"{mixer}-{options.seed}.state"


def measure(mixer: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model and test it at every length."""
    model, steps = train(mixer, options, state_path(mixer, options))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, Any] = {"parameters": parameters, "steps": steps, "correct": {}, "sequences": {}}
    lost = 0
    for length in LENGTHS:
        if length > min(options.longest, LONGEST_FOR.get(mixer, options.longest)) or lost == LENGTHS_LOST:
            break
        correct, sequences = accuracy(model, length, options.seed)
        result["correct"][str(length)], result["sequences"][str(length)] = correct, sequences
        lost = lost + 1 if correct < LOST_SHARE * sequences else 0
        print(f"{mixer}: length {length}: {correct} of {sequences}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    default = ["selective", "s4d", "attention"]
    parser.add_argument("--mixers", nargs="+", default=default, choices=sorted(MIXERS))
    parser.add_argument("--steps", type=int, default=4000, help="at most, for each mixer")
    parser.add_argument("--enough", type=float, default=0.005, help="stop below this mean loss of 100 steps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--mixed-lengths", action="store_true", help="keep half of the steps at shorter lengths after the warm-up"
    )
    parser.add_argument(
        "--cooldown", type=float, default=0.0, metavar="SHARE", help="of the steps, in which the learning rate falls"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="longest sequence to test on")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not 0 <= options.cooldown <= 1:
        parser.error(f"--cooldown must be a share from 0 to 1, not {options.cooldown}")
    use_threads(options.threads)
    names = ["steps", "enough", "batch", "learning_rate", "longest", "threads"]
    # Left out where they are off, so that folders from before these options can be continued.
    names += [name for name in ("mixed_lengths", "cooldown") if getattr(options, name)]
    experiment = Experiment("induction_heads", options.output, {name: getattr(options, name) for name in names})
    found: dict[str, list[dict[str, Any]]] = {mixer: [] for mixer in options.mixers}
    # Seed by seed, so that a run that was stopped has compared all mixers.
    for seed in options.seeds:
        for mixer in options.mixers:
            own = argparse.Namespace(**vars(options), seed=seed)
            found[mixer].append(
                experiment.part(f"{mixer}-{seed}", lambda mixer=mixer, own=own: measure(mixer, own))  # type: ignore[misc]
            )
            state_path(mixer, own).unlink(missing_ok=True)
    rows: list[list[object]] = []
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for mixer, results in found.items():
        curves[mixer] = ([], [])
        for length in LENGTHS:
            tested = [result for result in results if str(length) in result["correct"]]
            if not tested:
                break
            correct, sequences = (sum(one[name][str(length)] for one in tested) for name in ("correct", "sequences"))
            shares = [one["correct"][str(length)] / one["sequences"][str(length)] for one in tested]
            values = (correct / sequences, *wilson_interval(correct, sequences), min(shares), max(shares))
            steps = max(result["steps"] for result in results)
            figures = [f"{100 * value:.1f}" for value in values]
            rows.append([mixer, tested[0]["parameters"], steps, f"{length:,}", len(tested), *figures, sequences])
            curves[mixer][0].append(length)
            curves[mixer][1].append(100 * correct / sequences)
    picture = line_plot(curves, f"length of the sequence (trained at {TRAINING_LENGTH})", "accuracy (%)")
    picture.axes[0].axvline(TRAINING_LENGTH, color="0.6", linestyle="--", linewidth=1)
    picture.axes[0].axhline(100 / TOKENS, color="0.8", linewidth=1)
    header = ["mixer", "parameters", "steps", "length", "seeds", "accuracy %", "low", "high", "least", "most"]
    experiment.write([*header, "sequences"], rows, picture)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"induction_heads.py: {error}") from error
